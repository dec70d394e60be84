// Reading and writing messages: little-endian fields, a checksum against accidents.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace privtuner::math {

static_assert(
#if defined(__BYTE_ORDER__)
    __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
#else
    true,
#endif
    "messages are little-endian");

// A message that is malformed, truncated, corrupted, or meant for another layer, request, key, direction or version.
class MessageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Eight 64-bit FNV-1a-like lanes: every step is a bijection of the lane, so no change of one word goes unnoticed.
// Guards against accidents, not against attackers.
class Checksum {
 public:
  // All but the last call take a multiple of 8 bytes.
  void add(const std::uint8_t* data, std::size_t size);

  // The same in parts, a few lanes each, that threads add at once: `add_part` of every part, and `add_length`.
  static constexpr std::size_t kParts = 4;
  void add_part(std::size_t part, const std::uint8_t* data, std::size_t size);
  void add_length(std::size_t size) { length_ += size; }

  std::uint64_t value() const;

 private:
  std::uint64_t lanes_[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::uint64_t length_ = 0;
};

// Writes fields one after the other; the caller has made room for them.
class Writer {
 public:
  explicit Writer(std::uint8_t* at) : at_(at) {}
  template <class T>
  void put(const T& value) {
    std::memcpy(at_, &value, sizeof(T));
    at_ += sizeof(T);
  }
  std::uint8_t* at() const { return at_; }
  void skip(std::size_t bytes) { at_ += bytes; }

 private:
  std::uint8_t* at_;
};

// Reads fields one after the other; the caller has checked that they are there.
class Reader {
 public:
  explicit Reader(const std::uint8_t* at) : at_(at) {}
  template <class T>
  T get() {
    T value;
    std::memcpy(&value, at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  const std::uint8_t* at() const { return at_; }
  void skip(std::size_t bytes) { at_ += bytes; }

 private:
  const std::uint8_t* at_;
};

}  // namespace privtuner::math
