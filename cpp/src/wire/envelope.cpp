#include "privtuner/wire/envelope.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "privtuner/math/parallel.hpp"

namespace privtuner::wire {
namespace {

using math::Checksum, math::Reader, math::Writer;

constexpr char kMagic[4] = {'P', 'V', 'T', 'N'};
constexpr std::size_t kChecksumAt = kHeadBytes - sizeof(std::uint64_t);
constexpr std::size_t kLong = std::size_t{4} << 20;  // bytes of a body that is worth threads

std::string text_of(Kind kind) {
  std::string text = name(kind);
  std::replace(text.begin(), text.end(), '_', ' ');
  return text;
}

// `expected` is null where any kind is.
[[noreturn]] void refuse(const Kind* expected, const std::string& text) {
  throw MessageError((expected != nullptr ? text_of(*expected) : "message") + text);
}

// Fewer threads than parts would read the body several times each.
bool shared_out(std::size_t size) {
  return size >= kLong && static_cast<std::size_t>(math::threads_here()) >= Checksum::kParts;
}

// Adds `size` bytes to the sum and shows them to `look`, by threads: each has a few of the checksum's lanes, for which
// it reads the whole body, and its share of the ranges.
template <class Look>
void read_shared_out(Checksum& sum, const std::uint8_t* body, std::size_t size, const Look& look) {
  const std::size_t share = size / Checksum::kParts;
  math::parallel_for(Checksum::kParts, 1, [&](std::size_t part, std::size_t) {
    sum.add_part(part, body, size);
    look(part * share, part + 1 == Checksum::kParts ? size : (part + 1) * share);
  });
  sum.add_length(size);
}

// The checksum of a message, whose body is copied and shown on the way.
std::uint64_t checksum(const std::uint8_t* message, std::size_t size, const Reading& reading = {}) {
  std::uint8_t* const copy = reading.copy;
  if (copy != nullptr) std::memcpy(copy, message, kHeadBytes);
  Checksum sum;
  sum.add(copy != nullptr ? copy : message, kChecksumAt);
  const std::uint8_t* const from = message + kHeadBytes;
  const std::uint8_t* const body = copy != nullptr ? copy + kHeadBytes : from;
  size -= kHeadBytes;
  const auto look = [&](std::size_t begin, std::size_t end) {
    if (reading.look) reading.look(body, size, begin, end);
  };
  const auto take = [&](std::size_t begin, std::size_t end) {
    if (copy != nullptr) std::memcpy(copy + kHeadBytes + begin, from + begin, end - begin);
  };
  if (shared_out(size)) {
    constexpr std::size_t kGrain = std::size_t{1} << 20;
    if (copy != nullptr) math::parallel_for(size, kGrain, take);
    read_shared_out(sum, body, size, look);
    return sum.value();
  }
  if (copy == nullptr && !reading.look) {
    sum.add(body, size);
    return sum.value();
  }
  // In steps of a multiple of the checksum's lanes, short enough for the copy, the sum and the look to be at work at
  // once.
  for (std::size_t begin = 0; begin < size; begin += kLookBytes) {
    const std::size_t end = begin + std::min(kLookBytes, size - begin);
    take(begin, end);
    sum.add(body + begin, end - begin);
    look(begin, end);
  }
  return sum.value();
}

Head read_head(const Kind* expected, const std::uint8_t* data, std::size_t size) {
  if (size < kHeadBytes) {
    refuse(expected, " of " + std::to_string(size) + " bytes is shorter than its head of " +
                         std::to_string(kHeadBytes) + " bytes: truncated?");
  }
  if (std::memcmp(data, kMagic, sizeof(kMagic)) != 0) refuse(expected, ": not a privtuner message");
  Reader in(data + sizeof(kMagic));
  const auto version = in.get<std::uint16_t>();
  if (version != kVersion) {
    refuse(expected, ": wire version " + std::to_string(version) + ", this build speaks version " +
                         std::to_string(kVersion) + ": install the same privtuner on both sides");
  }
  const auto kind = in.get<std::uint8_t>(), direction = in.get<std::uint8_t>();
  if (kind < 1 || kind > kKindNames.size()) refuse(expected, ": unknown kind " + std::to_string(kind));
  if (direction >= kDirectionNames.size()) refuse(expected, ": unknown direction " + std::to_string(direction));
  Head head{static_cast<Kind>(kind), static_cast<Direction>(direction)};
  head.parameters = in.get<std::uint64_t>();
  head.subject = in.get<Id>();
  head.request = in.get<Id>();
  head.tokens = in.get<std::uint32_t>();
  head.features = in.get<std::uint32_t>();
  head.length = in.get<std::uint64_t>();
  if (head.length > size - kHeadBytes) {
    refuse(expected, ": announces " + std::to_string(head.length) + " bytes after its head, only " +
                         std::to_string(size - kHeadBytes) + " are here: truncated?");
  }
  return head;
}

Head read(Kind kind, const std::uint8_t* data, std::size_t size, bool alone, const Reading& reading) {
  const Head head = read_head(&kind, data, size);
  if (head.kind != kind) {
    throw MessageError("expected a message of kind " + text_of(kind) + ", got " + text_of(head.kind));
  }
  if (alone && head.message_bytes() != size) {
    refuse(&kind, ": " + std::to_string(size - head.message_bytes()) + " bytes too many");
  }
  Reader sum(data + kChecksumAt);
  if (sum.get<std::uint64_t>() != checksum(data, head.message_bytes(), reading)) {
    refuse(&kind, ": checksum mismatch: the message was changed on its way");
  }
  return head;
}

}  // namespace

Head peek(const std::uint8_t* data, std::size_t size) { return read_head(nullptr, data, size); }

void seal(const Head& head, std::uint8_t* message, std::size_t size) {
  Writer out(message);
  out.put(kMagic);
  out.put(kVersion);
  out.put(head.kind);
  out.put(head.direction);
  out.put(head.parameters);
  out.put(head.subject);
  out.put(head.request);
  out.put(head.tokens);
  out.put(head.features);
  out.put(static_cast<std::uint64_t>(size - kHeadBytes));
  out.put(checksum(message, size));
}

Head open(Kind kind, const std::uint8_t* message, std::size_t size, const Reading& reading) {
  return read(kind, message, size, true, reading);
}

Head open_first(Kind kind, const std::uint8_t* data, std::size_t size, const Reading& reading) {
  return read(kind, data, size, false, reading);
}

}  // namespace privtuner::wire
