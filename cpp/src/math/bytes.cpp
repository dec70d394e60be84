#include "privtuner/math/bytes.hpp"

namespace privtuner::math {

void Checksum::add(const std::uint8_t* data, std::size_t size) {
  constexpr std::uint64_t kPrime = 0x9e3779b97f4a7c15u;
  std::uint64_t lanes[8];  // a copy: bytes may alias members, and the lanes would go through memory at every step
  std::memcpy(lanes, lanes_, sizeof(lanes));
  std::size_t at = 0;
  for (; at + 64 <= size; at += 64) {
    std::uint64_t words[8];
    std::memcpy(words, data + at, 64);
    for (int i = 0; i < 8; ++i) lanes[i] = (lanes[i] ^ words[i]) * kPrime;
  }
  for (int lane = 0; at < size; at += 8, ++lane) {
    std::uint64_t word = 0;
    std::memcpy(&word, data + at, size - at < 8 ? size - at : 8);
    lanes[lane] = (lanes[lane] ^ word) * kPrime;
  }
  std::memcpy(lanes_, lanes, sizeof(lanes));
  length_ += size;
}

std::uint64_t Checksum::value() const {
  std::uint64_t hash = length_;
  for (const std::uint64_t lane : lanes_) {
    hash = (hash ^ lane ^ (lane >> 29)) * 0xbf58476d1ce4e5b9u;
    hash ^= hash >> 32;
  }
  return hash;
}

}  // namespace privtuner::math
