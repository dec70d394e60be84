// The envelope: what comes back is what was sealed, every other head is refused with a reason, a body is read once.
#include "privtuner/wire/envelope.hpp"

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "message_tools.hpp"
#include "privtuner/math/parallel.hpp"

using namespace privtuner::wire;
using namespace tools;

namespace {

Bytes sealed(const Head& head, std::size_t body) {
  Bytes message(kHeadBytes, 0xa5);
  for (std::size_t i = 0; i < body; ++i) message.push_back(static_cast<std::uint8_t>(i * 37 + i / 251));
  seal(head, message.data(), message.size());
  return message;
}

Head some_head() {
  Head head{Kind::tensor, Direction::backward, 0x0123456789abcdefu};
  for (std::uint8_t i = 0; i < 16; ++i) {
    head.subject[i] = i;
    head.request[i] = static_cast<std::uint8_t>(16 + i);
  }
  head.tokens = 7;
  head.features = 0x01020304;
  return head;
}

bool same(const Head& a, const Head& b) {
  return a.kind == b.kind && a.direction == b.direction && a.parameters == b.parameters && a.subject == b.subject &&
         a.request == b.request && a.tokens == b.tokens && a.features == b.features;
}

Head read(const Bytes& message, Kind kind = Kind::tensor) { return open(kind, message.data(), message.size()); }

class Threads {
 public:
  explicit Threads(int n) : before_(privtuner::math::num_threads()) { privtuner::math::set_num_threads(n); }
  ~Threads() { privtuner::math::set_num_threads(before_); }

 private:
  int before_;
};

}  // namespace

TEST(known_places) {
  const Bytes message = sealed(some_head(), 8);
  Bytes known = {'P', 'V', 'T', 'N', 3, 0, 5, 1, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01};
  for (std::uint8_t i = 0; i < 32; ++i) known.push_back(i);
  for (const int byte : {7, 0, 0, 0, 4, 3, 2, 1, 8, 0, 0, 0, 0, 0, 0, 0}) {
    known.push_back(static_cast<std::uint8_t>(byte));
  }
  CHECK(Bytes(message.begin(), message.begin() + kChecksumAt) == known);
  CHECK_EQ(get<std::uint64_t>(message, kChecksumAt), checksum(message, message.size()));
  CHECK(resealed(message) == message);
}

TEST(what_is_sealed_comes_back) {
  for (const std::size_t body : {0, 1, 7, 8, 63, 64, 65, 1023, 1024, 1025, 5000}) {
    const Bytes message = sealed(some_head(), body);
    const Head head = read(message);
    CHECK(same(head, some_head()));
    CHECK_EQ(head.length, body);
    CHECK_EQ(head.message_bytes(), message.size());
    const Bytes two = joined({message, sealed(some_head(), 3)});
    CHECK_EQ(peek(two.data(), two.size()).length, body);
    CHECK_EQ(open_first(Kind::tensor, two.data(), two.size()).length, body);
    CHECK_THROWS(MessageError, read(two), "tensor: 75 bytes too many");
  }
}

TEST(every_refusal_has_one_reason) {
  const Bytes good = sealed(some_head(), 5);
  const auto refused = [&](const Bytes& message, const std::string& reason) {
    CHECK_THROWS(MessageError, peek(message.data(), message.size()), "message" + reason);
    CHECK_THROWS(MessageError, read(message, Kind::public_key), "public key" + reason);
    CHECK_THROWS(MessageError, open_first(Kind::tensor, message.data(), message.size()), "tensor" + reason);
  };
  refused({}, " of 0 bytes is shorter than its head of 72 bytes: truncated?");
  refused(Bytes(good.begin(), good.begin() + 71), " of 71 bytes is shorter");
  refused(with(good, 0, 'p'), ": not a privtuner message");
  for (const int version : {0, 1, 2, 4, 258}) {
    refused(with(good, kVersionAt, static_cast<std::uint16_t>(version)),
            ": wire version " + std::to_string(version) +
                ", this build speaks version 3: install the same privtuner on both");
  }
  for (const int kind : {0, static_cast<int>(privtuner::wire::kKindNames.size()) + 1, 255}) {
    refused(with(good, kKindAt, static_cast<std::uint8_t>(kind)), ": unknown kind " + std::to_string(kind));
  }
  for (const int direction : {2, 255}) {
    refused(with(good, kDirectionAt, static_cast<std::uint8_t>(direction)),
            ": unknown direction " + std::to_string(direction));
  }
  // The third wraps around to 0 when the head is added.
  for (const std::uint64_t length :
       {std::uint64_t{6}, ~std::uint64_t{0}, ~std::uint64_t{0} - 71, std::uint64_t{1} << 63}) {
    refused(with(good, kLengthAt, length),
            ": announces " + std::to_string(length) + " bytes after its head, only 5 are here: truncated?");
  }
  CHECK_THROWS(MessageError, read(good, Kind::reply), "expected a message of kind reply, got tensor");
  CHECK_THROWS(MessageError, read(with(good, kLengthAt, std::uint64_t{4})), "tensor: 1 bytes too many");
  CHECK_THROWS(MessageError, read(with(good, kChecksumAt, get<std::uint64_t>(good, kChecksumAt) + 1)),
               "tensor: checksum mismatch: the message was changed on its way");
}

TEST(every_changed_bit_and_every_other_size_is_refused) {
  const Bytes good = sealed(some_head(), 100);
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      CHECK_THROWS(MessageError, read(with(good, at, static_cast<std::uint8_t>(good[at] ^ (1 << bit)))), "");
    }
    const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[at]);
    std::copy_n(good.begin(), at, exact.get());
    CHECK_THROWS(MessageError, open(Kind::tensor, exact.get(), at), "truncated?");
    CHECK_THROWS(MessageError, peek(exact.get(), at), "truncated?");
  }
}

TEST(a_body_is_seen_once_and_copied_whole) {
  for (const int threads : {1, 5}) {
    const Threads count(threads);
    for (const std::size_t size : {0u, 1u, 1024u, 1025u, 100000u, (4u << 20) + 13u}) {
      const Bytes message = sealed(some_head(), size);
      for (const bool copied : {false, true}) {
        Bytes copy(message.size() + 1, 0x11);
        std::mutex mutex;
        std::vector<std::pair<std::size_t, std::size_t>> ranges;
        bool in_place = true;
        Reading reading;
        if (copied) reading.copy = copy.data();
        reading.look = [&](const std::uint8_t* body, std::size_t length, std::size_t begin, std::size_t end) {
          const std::lock_guard<std::mutex> lock(mutex);
          const std::size_t front = std::min(length, kLookBytes);
          in_place = in_place && length == size && (body == copy.data() + kHeadBytes) == copied &&
                     std::equal(body, body + front, message.data() + kHeadBytes) &&
                     std::equal(body + begin, body + end, message.data() + kHeadBytes + begin);
          ranges.emplace_back(begin, end);
        };
        open(Kind::tensor, message.data(), message.size(), reading);
        CHECK(in_place);
        std::sort(ranges.begin(), ranges.end());
        std::size_t at = 0;
        for (const auto& [begin, end] : ranges) {
          CHECK_EQ(begin, at);
          at = end;
        }
        CHECK_EQ(at, size);
        CHECK_EQ(copy.back(), 0x11);
        copy.pop_back();
        if (copied) CHECK(copy == message);
      }
    }
  }
}

TEST(threads_find_what_one_finds) {
  const Bytes alone = [] {
    const Threads one(1);
    return sealed(some_head(), (4u << 20) + 13u);
  }();
  CHECK_EQ(get<std::uint64_t>(alone, kChecksumAt), checksum(alone, alone.size()));
  const Threads five(5);
  CHECK(sealed(some_head(), (4u << 20) + 13u) == alone);
  read(alone);
  for (const std::size_t at : {kBodyAt, kBodyAt + 8, alone.size() / 2, alone.size() - 1}) {
    CHECK_THROWS(MessageError, read(with(alone, at, static_cast<std::uint8_t>(alone[at] ^ 1))), "checksum mismatch");
  }
}

PRIVTUNER_TEST_MAIN
