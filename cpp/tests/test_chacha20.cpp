#include "privtuner/ring/chacha20.hpp"

#include <stdexcept>
#include <vector>

#include "check.hpp"

using privtuner::math::Isa;
using privtuner::math::usable_isas;
using privtuner::ring::chacha20_keystream;
using privtuner::ring::ChaChaNonce;
using Bytes = std::vector<std::uint8_t>;

namespace {

Bytes from_hex(const std::string& hex) {
  Bytes bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<std::uint8_t>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

std::string to_hex(const Bytes& bytes) {
  std::string hex;
  for (const std::uint8_t byte : bytes) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

Bytes keystream(const Bytes& key, const std::string& nonce_hex, std::uint32_t first, std::size_t blocks, Isa isa) {
  ChaChaNonce nonce;
  const Bytes bytes = from_hex(nonce_hex);
  for (std::size_t i = 0; i < nonce.size(); ++i) nonce[i] = bytes[i];
  Bytes out(blocks * 64);
  chacha20_keystream(key.data(), nonce, first, out.data(), blocks, isa);
  return out;
}

Bytes counting_key() {
  Bytes key(32);
  for (std::size_t i = 0; i < 32; ++i) key[i] = static_cast<std::uint8_t>(i);
  return key;
}

}  // namespace

TEST(rfc8439_section_2_3_2_block_function) {
  for (const Isa isa : usable_isas()) {
    CHECK_EQ(to_hex(keystream(counting_key(), "000000090000004a00000000", 1, 1, isa)),
             "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
             "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e");
  }
}

TEST(rfc8439_section_2_4_2_encryption) {
  const std::string plaintext =
      "Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be "
      "it.";
  for (const Isa isa : usable_isas()) {
    Bytes text = keystream(counting_key(), "000000000000004a00000000", 1, 2, isa);
    text.resize(plaintext.size());
    for (std::size_t i = 0; i < text.size(); ++i) text[i] ^= static_cast<std::uint8_t>(plaintext[i]);
    CHECK_EQ(to_hex(text),
             "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
             "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
             "5af90bbf74a35be6b40b8eedf2785e42874d");
  }
}

TEST(rfc8439_appendix_a_1_keystreams) {
  struct Vector {
    std::string key, nonce;
    std::uint32_t counter;
    std::string keystream;
  };
  const std::string zeros(64, '0');
  const Vector vectors[] = {
      {zeros, "000000000000000000000000", 0,
       "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
       "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"},
      {zeros, "000000000000000000000000", 1,
       "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
       "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"},
      {zeros.substr(1) + "1", "000000000000000000000000", 1,
       "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
       "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0"},
      {"00ff" + zeros.substr(4), "000000000000000000000000", 2,
       "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
       "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096"},
      {zeros, "000000000000000000000002", 0,
       "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
       "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d"},
  };
  for (const Isa isa : usable_isas()) {
    for (const Vector& v : vectors) {
      CHECK_EQ(to_hex(keystream(from_hex(v.key), v.nonce, v.counter, 1, isa)), v.keystream);
    }
  }
}

// Every count around the kernels' widths, so that whole batches, the batch aside and single blocks all show; the guard
// word behind the output must survive.
TEST(every_path_and_length_gives_the_portable_bytes) {
  const ChaChaNonce nonce{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  const Bytes key = counting_key();
  for (const Isa isa : usable_isas()) {
    for (std::size_t blocks = 0; blocks <= 70; ++blocks) {
      Bytes want(blocks * 64 + 8, 0xa5), got = want;
      chacha20_keystream(key.data(), nonce, 5, want.data(), blocks, Isa::portable);
      chacha20_keystream(key.data(), nonce, 5, got.data(), blocks, isa);
      CHECK(got == want);
      CHECK_EQ(got[blocks * 64], 0xa5);
    }
  }
}

TEST(a_stream_may_be_cut_anywhere) {
  for (const Isa isa : usable_isas()) {
    const Bytes whole = keystream(counting_key(), "000000000000000000000000", 7, 53, isa);
    for (std::size_t cut = 0; cut <= 53; ++cut) {
      Bytes joined = keystream(counting_key(), "000000000000000000000000", 7, cut, isa);
      const Bytes rest =
          keystream(counting_key(), "000000000000000000000000", 7 + static_cast<std::uint32_t>(cut), 53 - cut, isa);
      joined.insert(joined.end(), rest.begin(), rest.end());
      CHECK(joined == whole);
    }
  }
}

TEST(the_counter_may_reach_but_not_pass_its_end) {
  for (const Isa isa : usable_isas()) {
    const Bytes last = keystream(counting_key(), "000000000000000000000000", 0xffffffff, 1, isa);
    const Bytes tail = keystream(counting_key(), "000000000000000000000000", 0xffffffff - 19, 20, isa);
    CHECK(Bytes(tail.end() - 64, tail.end()) == last);
    CHECK_THROWS(std::length_error, keystream(counting_key(), "000000000000000000000000", 0xffffffff, 2, isa),
                 "2 blocks from block 4294967295");
  }
}

PRIVTUNER_TEST_MAIN
