// For the tests of the messages: fields by their place, the checksum once more, and random damage.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "privtuner/wire/envelope.hpp"

namespace tools {

using Bytes = std::vector<std::uint8_t>;

// Places in a head (envelope.hpp).
constexpr std::size_t kVersionAt = 4, kKindAt = 6, kDirectionAt = 7, kHashAt = 8, kSubjectAt = 16, kRequestAt = 32,
                      kTokensAt = 48, kFeaturesAt = 52, kLengthAt = 56, kChecksumAt = 64, kBodyAt = 72;

template <class T>
T get(const Bytes& message, std::size_t at) {
  T value;
  std::memcpy(&value, message.data() + at, sizeof(T));
  return value;
}

template <class T>
Bytes with(Bytes message, std::size_t at, T value) {
  std::memcpy(message.data() + at, &value, sizeof(T));
  return message;
}

// Eight lanes of words, combined: the head without its checksum and the body are two streams, each padded with zeros.
inline std::uint64_t checksum(const Bytes& message, std::size_t size) {
  std::uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  const auto add = [&](std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; at += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, message.data() + at, std::min<std::size_t>(8, end - at));
      std::uint64_t& lane = lanes[(at - begin) / 8 % 8];
      lane = (lane ^ word) * 0x9e3779b97f4a7c15u;
    }
  };
  add(0, kChecksumAt);
  add(kBodyAt, size);
  std::uint64_t hash = size - sizeof(hash);
  for (const std::uint64_t lane : lanes) {
    hash = (hash ^ lane ^ (lane >> 29)) * 0xbf58476d1ce4e5b9u;
    hash ^= hash >> 32;
  }
  return hash;
}

// The checksum made right again, over the length that the message announces, where it has that many bytes.
inline Bytes resealed(Bytes message) {
  if (message.size() < kBodyAt) return message;
  const auto length = get<std::uint64_t>(message, kLengthAt);
  if (length > message.size() - kBodyAt) return message;
  return with(message, kChecksumAt, checksum(message, kBodyAt + static_cast<std::size_t>(length)));
}

// The same after the announced length was made to fit the size.
inline Bytes resized(Bytes message) {
  if (message.size() < kBodyAt) return message;
  return resealed(with(message, kLengthAt, std::uint64_t{message.size() - kBodyAt}));
}

inline Bytes joined(const std::vector<Bytes>& parts) {
  Bytes whole;
  for (const Bytes& part : parts) whole.insert(whole.end(), part.begin(), part.end());
  return whole;
}

// Random damage to messages. Deterministic for a seed.
class Mutator {
 public:
  // `others`: messages to splice from.
  Mutator(std::uint64_t seed, std::vector<Bytes> others) : random_(seed), others_(std::move(others)) {}

  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  Bytes mutate(Bytes message) {
    for (std::uint64_t changes = 1 + below(2) * below(3); changes > 0; --changes) change(message);
    return message;
  }

 private:
  void change(Bytes& message) {
    const std::size_t size = message.size();
    if (size == 0) return;
    // Half of the places are in the head and the fields behind it.
    const std::size_t at = below(below(2) == 0 ? std::min<std::size_t>(size, 112) : size);
    switch (below(10)) {
      case 0:
        message[at] = static_cast<std::uint8_t>(message[at] ^ (1u << below(8)));
        break;
      case 1:
        message[at] = static_cast<std::uint8_t>(below(2) == 0 ? below(4) : random_());
        break;
      case 2:
      case 8:
        overwrite(message, at / 4 * 4, 4);
        break;
      case 9:  // a plausible number
        if (at / 4 * 4 + 4 <= size)
          message = with(std::move(message), at / 4 * 4, static_cast<std::uint32_t>(below(48)));
        break;
      case 3:
        overwrite(message, at / 8 * 8, 8);
        break;
      case 4:
        message.resize(at);
        break;
      case 5:
        message.insert(message.begin() + static_cast<std::ptrdiff_t>(at), below(40),
                       static_cast<std::uint8_t>(random_()));
        break;
      case 6: {
        const Bytes& other = others_[below(others_.size())];
        const std::size_t from = below(other.size()), count = 1 + below(other.size() - from);
        const std::size_t to = below(2) == 0 ? std::min(from, size) : at;  // often the same field of the other message
        message.resize(std::max(size, to + count));
        std::copy_n(other.begin() + static_cast<std::ptrdiff_t>(from), count,
                    message.begin() + static_cast<std::ptrdiff_t>(to));
        break;
      }
      default:
        message.erase(message.begin() + static_cast<std::ptrdiff_t>(at),
                      message.begin() + static_cast<std::ptrdiff_t>(std::min(size, at + 1 + below(40))));
    }
  }

  void overwrite(Bytes& message, std::size_t at, std::size_t width) {
    constexpr std::uint64_t kExtremes[] = {0,
                                           1,
                                           2,
                                           31,
                                           32,
                                           33,
                                           65535,
                                           65536,
                                           65537,
                                           1u << 24,
                                           (1u << 24) + 1,
                                           0x7fffffffu,
                                           0x80000000u,
                                           4293918720u,
                                           4293918721u,
                                           0xfffffffeu,
                                           0xffffffffu,
                                           0x100000000u,
                                           1125899903827968u,
                                           1125899903827969u,
                                           0x7ff0000000000000u,  // infinity
                                           0x7ff8000000000000u,  // not a number
                                           0x8000000000000001u,  // the smallest negative double
                                           0x7fefffffffffffffu,  // the largest
                                           0x7fffffffffffffffu,
                                           0xffffffffffffffb8u,  // wraps when the head is added
                                           0xffffffffffffffffu};
    const std::uint64_t value = kExtremes[below(sizeof(kExtremes) / sizeof(*kExtremes))];
    if (at + width <= message.size()) std::memcpy(message.data() + at, &value, width);
  }

  std::mt19937_64 random_;
  std::vector<Bytes> others_;
};

}  // namespace tools
