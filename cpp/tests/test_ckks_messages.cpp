// The bytes of parameters, tensors and keys: what comes back is what was sent, and whatever else arrives is refused.
#include "privtuner/ckks/messages.hpp"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "message_tools.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/ckks/secret.hpp"

using namespace privtuner::ckks;
using privtuner::wire::MessageError;
using namespace tools;

namespace {

// Places in the body of a tensor (messages.hpp).
constexpr std::size_t kLevelAt = 72, kSeededAt = 76, kSeedAt = 80;

ParametersPtr insecure(int depth, int scale_bits = 30) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

template <class T>
Bytes forged(const Bytes& message, std::size_t at, T value) {
  return resealed(with(message, at, value));
}

template <class T>
Bytes bytes_of(const T& object) {
  Bytes out(message_bytes(object));
  write(object, out.data());
  return out;
}

Bytes bytes_of(const Parameters& parameters) {
  Bytes out(parameters_message_bytes());
  write(parameters, out.data());
  return out;
}

// One message of each kind and what reads it: reading and writing again gives the bytes.
struct Kind {
  const char* name;
  Bytes message;
  std::function<Bytes(const Bytes&)> again;
  bool addressed = false;  // subject and request say which message it is
};

struct Case {
  ParametersPtr p = insecure(1), deep = insecure(2);
  SecretKey secret{p}, owner{deep};
  std::vector<Kind> kinds;

  Case() {
    const auto add = [&](const char* name, Bytes message, std::function<Bytes(const Bytes&)> again) {
      kinds.push_back({name, std::move(message), std::move(again)});
    };
    const auto add_tensor = [&](const char* name, const TensorPtr& x) {
      add(name, bytes_of(*x), [this, expected = x->as_planned()](const Bytes& m) {
        return bytes_of(*read_tensor(p, &expected, m.data(), m.size()));
      });
    };
    add("parameters", bytes_of(*p), [](const Bytes& m) { return bytes_of(*read_parameters(m.data(), m.size())); });
    const auto x = encrypt(2, 1);
    add_tensor("seeded tensor", x);
    add_tensor("tensor", Evaluator(p).add(x, x));
    add_tensor("low tensor", encrypt(1, 0));
    add("public key", bytes_of(*secret.public_key()),
        [this](const Bytes& m) { return bytes_of(*read_public_key(p, nullptr, m.data(), m.size())); });
    add("keys", bytes_of(*keys(true, {5, 25})),
        [this](const Bytes& m) { return bytes_of(*read_keys(p, nullptr, m.data(), m.size())); });
    add_refreshes();
  }

  // Two ciphertexts, masked and refreshed.
  void add_refreshes() {
    const RefreshId id{{1, 2, 3}, 7};
    const std::vector<double> zeros(2 * deep->n());
    const auto encrypted = [&](int level) {
      return owner.encrypt_coefficients(zeros.data(), 2, {level, 1, {deep->scale(level), deep->scale(level)}});
    };
    Bytes masked(refresh_bytes(*deep, 2)), fresh(refreshed_bytes(*deep, 2, 1));
    write_refresh(*encrypted(2), id, masked.data());
    write_refreshed(*encrypted(1), id, fresh.data());
    kinds.push_back({"refresh", masked,
                     [this](const Bytes& m) {
                       RefreshId found;
                       const auto x = read_refresh(deep, 2, m.data(), m.size(), found);
                       Bytes out(refresh_bytes(*deep, 2));
                       write_refresh(*x, found, out.data());
                       return out;
                     },
                     true});
    kinds.push_back({"refreshed", fresh,
                     [this, id](const Bytes& m) {
                       Tensor x(deep, deep->slots(), 2, 1, false, nullptr);
                       read_refreshed(id, m.data(), m.size(), 0, 2, x);
                       x.seed.emplace();
                       std::memcpy(x.seed->data(), m.data() + kBodyAt, x.seed->size());
                       for (std::size_t f = 0; f < 2; ++f) {  // the seed's stream is what was read
                         Bytes stream(deep->n() * sizeof(std::uint64_t));
                         expand_mask(*deep, *x.seed, static_cast<std::uint32_t>(f), 1,
                                     reinterpret_cast<std::uint64_t*>(stream.data()));
                         CHECK_EQ(std::memcmp(stream.data(), x.row(f, 1, 1), stream.size()), 0);
                       }
                       Bytes out(refreshed_bytes(*deep, 2, 1));
                       write_refreshed(x, id, out.data());
                       return out;
                     },
                     true});
  }

  TensorPtr encrypt(std::size_t features, int level) const {
    const std::vector<double> values(3 * features, 0.25);
    return secret.encrypt({values.data(), nullptr, 3, features, static_cast<std::ptrdiff_t>(features), 1},
                          {level, 1, std::vector<double>(features, p->scale(level))});
  }

  std::shared_ptr<const EvaluationKeys> keys(bool relinearisation, const std::vector<std::uint32_t>& elements) const {
    auto made = std::make_shared<EvaluationKeys>();
    made->parameters = p;
    if (relinearisation) made->relinearisation = secret.relinearisation_key();
    for (const std::uint32_t element : elements) made->galois.emplace(element, secret.galois_key(element));
    return made;
  }

  const Kind& kind(const std::string& name) const {
    for (const Kind& kind : kinds) {
      if (kind.name == name) return kind;
    }
    throw std::logic_error(name);
  }
};

const Case& the_case() {
  static const Case made;
  return made;
}

// Either refused as a message or an object that gives these bytes again. Returns whether it was taken.
bool taken(const Kind& kind, const Bytes& message) {
  Bytes again;
  try {
    again = kind.again(message);
  } catch (const MessageError&) {
    return false;
  }
  CHECK(again == message);
  return true;
}

// A copy of exactly the message's size, so that reading past its end shows under a sanitizer.
bool taken_exactly(const Kind& kind, const std::uint8_t* data, std::size_t size) {
  return taken(kind, Bytes(data, data + size));
}

}  // namespace

TEST(what_is_sent_comes_back) {
  for (const Kind& kind : the_case().kinds) CHECK(taken(kind, kind.message));
  for (const auto& p : {insecure(0, 20), insecure(3, 40), insecure(5, 49)}) {
    const SecretKey secret(p);
    std::vector<double> values(12);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = 0.05 * static_cast<double>(i);
    for (int level = 0; level <= p->depth(); ++level) {
      const auto x = secret.encrypt({values.data(), nullptr, 4, 3, 3, 1},
                                    {level, 0.75, {p->scale(level), 0.5 * p->scale(level), 0x1p18}});
      const Bytes message = bytes_of(*x);
      const Tensor expected = x->as_planned();
      const auto y = read_tensor(p, &expected, message.data(), message.size());
      CHECK(y->seed == x->seed && y->scale == x->scale && y->noise == x->noise && y->shared == x->shared);
      CHECK_EQ(y->bound, 0.75);
      CHECK_EQ(y->tokens, std::size_t{4});
      CHECK_EQ(y->features, std::size_t{3});
      CHECK_EQ(y->level, level);
      CHECK(!y->planned);
      CHECK_EQ(std::memcmp(y->row(0, 0, 0), x->row(0, 0, 0), x->bytes()), 0);  // the expanded half as well
      // A view that does not begin at feature 0 cannot use the seed.
      const Tensor front = x->view(0, 2), back = x->view(1, 3);
      CHECK(front.seed.has_value() && !back.seed.has_value());
      for (const Tensor* part : {&front, &back}) {
        const Bytes bytes = bytes_of(*part);
        const Tensor planned = part->as_planned();
        const auto read = read_tensor(p, &planned, bytes.data(), bytes.size());
        CHECK_EQ(std::memcmp(read->row(0, 0, 0), part->row(0, 0, 0), part->bytes()), 0);
      }
    }
    const auto public_key = secret.public_key();
    const Bytes message = bytes_of(*public_key);
    CHECK(read_public_key(p, nullptr, message.data(), message.size())->words == public_key->words);
    const Bytes set = bytes_of(*p);
    CHECK_EQ(read_parameters(set.data(), set.size())->hash(), p->hash());
  }
  const auto& c = the_case();
  for (const bool relinearisation : {false, true}) {
    for (const auto& elements : {std::vector<std::uint32_t>{}, {5}, {5, 125, 2047}}) {
      const auto keys = c.keys(relinearisation, elements);
      const Bytes message = bytes_of(*keys);
      CHECK_EQ(message.size(), keys_message_bytes(*c.p, elements.size() + (relinearisation ? 1 : 0)));
      const auto read = read_keys(c.p, nullptr, message.data(), message.size());
      CHECK_EQ(read->relinearisation != nullptr, relinearisation);
      if (relinearisation) CHECK(read->relinearisation->words == keys->relinearisation->words);
      CHECK_EQ(read->galois.size(), elements.size());
      for (const std::uint32_t element : elements) {
        CHECK_EQ(read->galois.at(element).element, element);
        CHECK(read->galois.at(element).key->words == keys->galois.at(element).key->words);
      }
      CHECK_EQ(read->bytes(), keys->bytes());
    }
  }
}

TEST(a_planned_tensor_has_no_message) {
  const auto& p = the_case().p;
  const auto planned = planned_tensor(p, 3, 1, {1, 1, {p->scale(1)}}, false, nullptr);
  Bytes out(message_bytes(*planned));
  CHECK_THROWS(privtuner::ckks::Error, write(*planned, out.data()), "holds no ciphertext to send");
}

// Scale, bound and error come from the reader: the bytes of tensors that differ in nothing else are the same.
TEST(what_the_reader_knows_does_not_travel) {
  const auto& c = the_case();
  const auto x = c.encrypt(2, 1);
  auto other = std::make_shared<Tensor>(*x);
  for (auto* values : {&other->scale, &other->noise, &other->shared}) {
    for (double& value : *values) value = 8 * value + 1;
  }
  other->bound = 17;
  const Bytes message = bytes_of(*x);
  CHECK(bytes_of(*other) == message);
  CHECK_EQ(message.size(), kSeedAt + 32 + 2 * 1024 * (5 + 4));
  const Tensor expected = other->as_planned();
  const auto read = read_tensor(c.p, &expected, message.data(), message.size());
  CHECK(read->scale == other->scale && read->noise == other->noise && read->shared == other->shared);
  CHECK_EQ(read->bound, 17.0);
}

TEST(by_default_a_fresh_encryption_is_expected) {
  const auto& c = the_case();
  for (const std::size_t features : {std::size_t{1}, std::size_t{3}}) {
    const auto x = c.encrypt(features, 1);
    const Bytes message = bytes_of(*x);
    const auto y = read_tensor(c.p, nullptr, message.data(), message.size());
    CHECK(y->scale == x->scale && y->noise == x->noise && y->shared == x->shared && y->seed == x->seed);
    CHECK_EQ(y->bound, 1.0);
  }
  const Bytes low = c.kind("low tensor").message, computed = c.kind("tensor").message;
  CHECK_THROWS(MessageError, read_tensor(c.p, nullptr, low.data(), low.size()),
               "shape (3, 1) at level 0 where (3, 1) at level 1 is expected");
  CHECK_THROWS(MessageError, read_tensor(c.p, nullptr, computed.data(), computed.size()),
               "must say what it expects, by a planned tensor");
  const Bytes seeded = c.kind("seeded tensor").message;
  const Bytes huge = resealed(with(with(seeded, kTokensAt, 512u), kFeaturesAt, 65536u));
  CHECK_THROWS(MessageError, read_tensor(c.p, nullptr, huge.data(), huge.size()), "length does not fit");
}

TEST(what_is_expected_must_be_a_plan_of_these_parameters) {
  const auto& c = the_case();
  const auto x = c.encrypt(2, 1);
  const Bytes message = bytes_of(*x);
  CHECK_THROWS(privtuner::ckks::Error, read_tensor(c.p, x.get(), message.data(), message.size()),
               "not a planned tensor of " + c.p->name());
  const auto other = insecure(2);
  const auto planned = planned_tensor(other, 3, 2, {1, 1, {other->scale(1), other->scale(1)}}, false, nullptr);
  CHECK_THROWS(privtuner::ckks::Error, read_tensor(c.p, planned.get(), message.data(), message.size()),
               "not a planned tensor of " + c.p->name());
}

TEST(every_truncation_is_refused) {
  for (const Kind& kind : the_case().kinds) {
    // Every length near the ends and the fields, every 97th between.
    for (std::size_t size = 0; size < kind.message.size();
         size += size < 200 || size + 200 > kind.message.size() ? 1 : 97) {
      CHECK(!taken_exactly(kind, kind.message.data(), size));
      CHECK(
          !taken(kind, resized(Bytes(kind.message.begin(), kind.message.begin() + static_cast<std::ptrdiff_t>(size)))));
    }
    for (const std::size_t more : {1u, 7u, 8u, 4096u}) {
      Bytes longer = kind.message;
      longer.resize(longer.size() + more);
      CHECK(!taken(kind, longer));
      CHECK(!taken(kind, resized(longer)));
    }
  }
}

TEST(every_flipped_bit_is_noticed) {
  for (const Kind& kind : the_case().kinds) {
    const std::size_t size = kind.message.size();
    for (std::size_t at = 0; at < size; at += at < 136 ? 1 : 1 + size / 300) {
      for (int bit = 0; bit < 8; ++bit) {
        Bytes changed = kind.message;
        changed[at] = static_cast<std::uint8_t>(changed[at] ^ (1 << bit));
        CHECK(!taken(kind, changed));
        // What the head alone decides is wrong under a right checksum as well.
        if (at < kTokensAt && !(kind.addressed && at >= kSubjectAt)) CHECK(!taken(kind, resealed(changed)));
      }
    }
  }
}

TEST(each_field_is_named) {
  const auto& c = the_case();
  const auto refused = [](const Kind& kind, const Bytes& message, const std::string& part) {
    CHECK_THROWS(MessageError, kind.again(message), part);
  };
  for (const Kind& kind : c.kinds) {
    const std::uint64_t length = kind.message.size() - kBodyAt;
    refused(kind, {}, "of 0 bytes is shorter than its head");
    refused(kind, forged(kind.message, kVersionAt, std::uint16_t{1}), "wire version 1, this build speaks version 3");
    refused(kind, forged(kind.message, kKindAt, std::uint8_t{2}), "got request");
    for (const std::size_t at : {kDirectionAt, kSubjectAt, kSubjectAt + 15, kRequestAt, kRequestAt + 15}) {
      if (kind.addressed && at != kDirectionAt) continue;
      refused(kind, forged(kind.message, at, std::uint8_t{1}), "a field it does not use is not zero");
    }
    refused(kind, forged(kind.message, kHashAt, std::uint64_t{5}),
            std::string(kind.name) == "parameters" ? "derives other primes" : "made with other parameters than");
    refused(kind, forged(kind.message, kLengthAt, length + 1), "announces");
    refused(kind, forged(kind.message, kLengthAt, length - (std::uint64_t{1} << 63)), "announces");
    Bytes changed = kind.message;
    changed[kChecksumAt] ^= 1;
    refused(kind, changed, "checksum mismatch");
  }
  const Kind &masked = c.kind("refresh"), &fresh = c.kind("refreshed");
  for (const Kind* kind : {&masked, &fresh}) {
    refused(*kind, forged(kind->message, kTokensAt, 511u), "of 511 tokens");
    for (const std::uint32_t features : {0u, 1u, 3u, 0xffffffffu}) {
      refused(*kind, forged(kind->message, kFeaturesAt, features), "ciphertexts where 2 are due");
    }
    refused(*kind, resized(Bytes(kind->message.begin(), kind->message.end() - 1)), "of the wrong length");
    Bytes large = kind->message;
    std::fill_n(large.end() - 4, 4, std::uint8_t{255});
    refused(*kind, resealed(large), "a residue is not below its prime");
  }
  refused(masked, forged(masked.message, kRequestAt + 8, std::uint8_t{1}), "number of the message is out of range");
  for (const std::size_t at : {kSubjectAt, kSubjectAt + 15, kRequestAt, kRequestAt + 15}) {
    refused(fresh, forged(fresh.message, at, std::uint8_t{200}), "the answer to another message");
  }
  const Kind& tensor = c.kind("seeded tensor");
  for (const std::uint32_t tokens : {0u, 513u, 0xffffffffu})
    refused(tensor, forged(tensor.message, kTokensAt, tokens), "tokens, not in");
  for (const std::uint32_t features : {0u, 65537u, 0xffffffffu})
    refused(tensor, forged(tensor.message, kFeaturesAt, features), "number of features");
  const std::string expected = " where (3, 2) at level 1 is expected";
  for (const std::uint32_t features : {1u, 3u, 65536u}) {
    refused(tensor, forged(tensor.message, kFeaturesAt, features),
            "shape (3, " + std::to_string(features) + ") at level 1" + expected);
  }
  refused(tensor, forged(tensor.message, kTokensAt, 2u), "shape (2, 2) at level 1" + expected);
  for (const std::uint32_t level : {2u, 0x80000000u, 0xffffffffu})
    refused(tensor, forged(tensor.message, kLevelAt, level), "is above the parameters' depth");
  refused(tensor, forged(tensor.message, kLevelAt, 0u), "shape (3, 2) at level 0" + expected);
  refused(tensor, forged(tensor.message, kSeededAt, 0u), "length does not fit");
  refused(tensor, forged(tensor.message, kSeededAt, 2u), "a field is out of range");
  const std::size_t rows = kSeedAt + 32;
  // A residue that is not below its prime: the first limb has 5 bytes a word.
  Bytes over = tensor.message;
  std::fill_n(over.begin() + static_cast<std::ptrdiff_t>(rows + 5 * 1023), 5, std::uint8_t{255});
  refused(tensor, resealed(over), "a residue is not below its prime " + std::to_string(c.p->prime(0).q));
  Bytes q = tensor.message;
  std::memcpy(q.data() + rows, &c.p->prime(0).q, 5);
  refused(tensor, resealed(q), "a residue is not below its prime");
  --q[rows];
  CHECK(taken(tensor, resealed(q)));

  const Kind& key = c.kind("public key");
  over = key.message;
  std::fill_n(over.end() - 4, 4, std::uint8_t{255});
  refused(key, resealed(over), "public key: a residue is not below its prime");

  const Kind& keys = c.kind("keys");
  const std::size_t first = kBodyAt + 8, each = (keys.message.size() - first) / 3;
  refused(keys, forged(keys.message, kBodyAt, 2u), "length does not fit 2 keys");
  refused(keys, forged(keys.message, kBodyAt, 0xffffffffu), "length does not fit 4294967295 keys");
  refused(keys, forged(keys.message, kBodyAt + 4, 1u), "length does not fit");
  refused(keys, forged(keys.message, first + 4, 1u), "names no key");
  for (const std::uint32_t element : {0u, 1u, 2u, 25u, 2049u}) {
    refused(keys, forged(keys.message, first + each, element), "names no key, or keys are out of order");
  }
  refused(keys, forged(keys.message, first + 2 * each, 5u), "keys are out of order");
  over = keys.message;
  std::fill_n(over.end() - 4, 4, std::uint8_t{255});
  refused(keys, resealed(over), "evaluation keys: a residue is not below its prime");

  const Kind& set = c.kind("parameters");
  for (std::size_t field = 0; field < 6; ++field) {
    for (const std::uint32_t value : {255u, 256u, 0xffffffffu}) {
      CHECK(!taken(set, forged(set.message, kBodyAt + 4 * field, value)));
    }
  }
  refused(set, forged(set.message, kBodyAt, 41u), "depth 41 is outside");
  refused(set, forged(set.message, kBodyAt + 4, 31u), "this build derives other primes");
  refused(set, forged(set.message, kBodyAt + 16, 0u), "parameters: no 128-bit secure set");
}

TEST(messages_of_other_parameters_and_kinds_are_refused) {
  const auto& c = the_case();
  const auto other = std::make_shared<Parameters>(Wish{1, 31, 40, 10, true});  // rows of as many bytes
  for (const Kind& kind : c.kinds) {
    for (const Kind& reader : c.kinds) {
      if (kind.message[kKindAt] != reader.message[kKindAt])
        CHECK_THROWS(MessageError, reader.again(kind.message), "expected ");
    }
  }
  const Bytes& tensor = c.kind("tensor").message;
  const Bytes& key = c.kind("public key").message;
  const Bytes& keys = c.kind("keys").message;
  CHECK_THROWS(MessageError, read_tensor(other, nullptr, tensor.data(), tensor.size()),
               "made with other parameters than " + other->name());
  CHECK_THROWS(MessageError, read_public_key(other, nullptr, key.data(), key.size()), "made with other parameters");
  CHECK_THROWS(MessageError, read_keys(other, nullptr, keys.data(), keys.size()), "made with other parameters");
}

TEST(random_damage_under_a_right_checksum) {
  const auto& c = the_case();
  std::mt19937_64 random(77);
  const double extremes[] = {0,
                             -0.0,
                             1,
                             0x1p-1074,
                             0x1p1023,
                             -1,
                             std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()};
  std::size_t accepted = 0, refused = 0;
  const auto run = [&](const char* name, int count) {
    const Kind& kind = c.kind(name);
    for (int turn = 0; turn < count / check::kShare; ++turn) {
      Bytes message = kind.message;
      for (std::uint64_t changes = 1 + random() % 3; changes > 0; --changes) {
        const std::size_t size = message.size();
        if (size <= kBodyAt + 8) break;
        // Mostly the fields behind the header, at times anything.
        const std::size_t at = random() % 8 == 0 ? random() % (size - 8)
                                                 : kBodyAt + random() % std::min<std::size_t>(size - kBodyAt - 8, 96);
        switch (random() % 7) {
          case 0:
            message[at] = static_cast<std::uint8_t>(message[at] ^ (1u << random() % 8));
            break;
          case 1:
            message[at] = static_cast<std::uint8_t>(random());
            break;
          case 2: {
            const auto value = static_cast<std::uint32_t>(random() % 4);
            std::memcpy(message.data() + at / 4 * 4, &value, 4);
            break;
          }
          case 3: {
            const double value = extremes[random() % 8];
            std::memcpy(message.data() + at / 8 * 8, &value, 8);
            break;
          }
          case 4: {
            const std::uint64_t value = random() % 2 == 0 ? ~std::uint64_t{0} : random();
            std::memcpy(message.data() + at / 8 * 8, &value, 8);
            break;
          }
          case 5:
            if (random() % 4 == 0) message.resize(kBodyAt + random() % (size - kBodyAt));
            break;
          default:
            if (random() % 4 == 0)
              message.insert(message.begin() + static_cast<std::ptrdiff_t>(at), 1 + random() % 64, std::uint8_t{0});
        }
      }
      ++(taken(kind, resized(message)) ? accepted : refused);
    }
  };
  run("seeded tensor", 30000);
  run("low tensor", 40000);
  run("tensor", 20000);
  run("public key", 10000);
  run("keys", 1500);
  // Deep checks were reached: damage to words and seeds alone gives another valid object, all else is refused.
  CHECK_LT(std::size_t{1000 / check::kShare}, accepted);
  CHECK_LT(std::size_t{1000 / check::kShare}, refused);
}

TEST(random_damage_to_parameters) {
  const auto& c = the_case();
  const Kind& kind = c.kind("parameters");
  std::mt19937_64 random(78);
  for (int turn = 0; turn < 300; ++turn) {
    // Small rings: reading derives the set before it can tell.
    Bytes message = kind.message;
    const std::uint32_t fields[] = {
        static_cast<std::uint32_t>(random() % 12), static_cast<std::uint32_t>(random() % 60),
        static_cast<std::uint32_t>(random() % 60), static_cast<std::uint32_t>(random() % 12),
        static_cast<std::uint32_t>(random() % 3),  static_cast<std::uint32_t>(random() % 8 == 0)};
    for (int changes = 0; changes < 2; ++changes) {
      const std::size_t field = random() % 6;
      std::memcpy(message.data() + kBodyAt + 4 * field, &fields[field], 4);
    }
    // A set that is secure without being called so is another message of the same hash: bytes need not agree.
    try {
      const Bytes sealed = resealed(message);
      CHECK_EQ(read_parameters(sealed.data(), sealed.size())->hash(), c.p->hash());
    } catch (const MessageError&) {
    }
  }
}

PRIVTUNER_TEST_MAIN
