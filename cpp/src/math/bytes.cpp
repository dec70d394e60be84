#include "privtuner/math/bytes.hpp"

namespace privtuner::math {

namespace {

constexpr std::size_t kLanes = 8, kLine = 8 * kLanes;

std::uint64_t word_at(const std::uint8_t* data, std::size_t size) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, size);
  return word;
}

// kCount lanes from `first` on. Copies of them: bytes may alias members, and would send them through memory.
template <std::size_t kCount>
void add_lanes(std::uint64_t* lanes, std::size_t first, const std::uint8_t* data, std::size_t size) {
  constexpr std::uint64_t kPrime = 0x9e3779b97f4a7c15u;
  std::uint64_t kept[kCount];
  for (std::size_t i = 0; i < kCount; ++i) kept[i] = lanes[first + i];
  const std::size_t whole = size / kLine * kLine;
  for (std::size_t at = 8 * first; at < whole; at += kLine) {
    for (std::size_t i = 0; i < kCount; ++i) kept[i] = (kept[i] ^ word_at(data + at + 8 * i, 8)) * kPrime;
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    const std::size_t at = whole + 8 * (first + i);
    if (at < size) kept[i] = (kept[i] ^ word_at(data + at, size - at < 8 ? size - at : 8)) * kPrime;
    lanes[first + i] = kept[i];
  }
}

}  // namespace

void Checksum::add(const std::uint8_t* data, std::size_t size) {
  add_lanes<kLanes>(lanes_, 0, data, size);
  length_ += size;
}

void Checksum::add_part(std::size_t part, const std::uint8_t* data, std::size_t size) {
  add_lanes<kLanes / kParts>(lanes_, part * (kLanes / kParts), data, size);
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
