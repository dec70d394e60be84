// The envelope of every message: one head, one checksum. A format adds a body and nothing else. Little-endian.
//
//    0  "PVTN"
//    4  version     u16   of the wire: head and all bodies
//    6  kind        u8    what the body is
//    7  direction   u8    what a request asks for; 0 where it asks for nothing
//    8  parameters  u64   hash of the parameter set
//   16  subject     [16]  the layer that is meant
//   32  request     [16]  the request that this is or answers
//   48  tokens      u32   shape of what is encrypted, or of the product that it asks for
//   52  features    u32
//   56  length      u64   bytes that follow the head
//   64  checksum    u64   of the head up to here and of the body
//   72  body
//
// What a format does not use is 0. The checksum guards against accidents, not against attackers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "privtuner/math/bytes.hpp"

namespace privtuner::wire {

using math::MessageError;

inline constexpr std::uint16_t kVersion = 3;
inline constexpr std::size_t kHeadBytes = 72;

enum class Kind : std::uint8_t {
  layer = 1,
  request,
  reply,
  parameters,
  tensor,
  public_key,
  evaluation_keys,
  refresh,
  refreshed,
  openfhe_request,
  openfhe_reply,
  openfhe_tensor,
  sealed_public,
  job,
};
inline constexpr std::array<const char*, 14> kKindNames = {
    "layer",   "request",   "reply",           "parameters",    "tensor",         "public_key",    "evaluation_keys",
    "refresh", "refreshed", "openfhe_request", "openfhe_reply", "openfhe_tensor", "sealed_public", "job"};

enum class Direction : std::uint8_t { forward, backward };
inline constexpr std::array<const char*, 2> kDirectionNames = {"forward", "backward"};

inline const char* name(Kind kind) { return kKindNames[static_cast<std::size_t>(kind) - 1]; }
inline const char* name(Direction direction) { return kDirectionNames[static_cast<std::size_t>(direction)]; }

using Id = std::array<std::uint8_t, 16>;

struct Head {
  Kind kind;
  Direction direction = Direction::forward;
  std::uint64_t parameters = 0;
  Id subject{}, request{};
  std::uint32_t tokens = 0, features = 0;
  std::uint64_t length = 0;  // bytes of the body; `seal` takes it from the message

  std::size_t message_bytes() const { return kHeadBytes + static_cast<std::size_t>(length); }
};

// Reads the head of the message at the front of [data, data + size): its length is that of bytes that are there. The
// checksum is not looked at. Throws MessageError.
Head peek(const std::uint8_t* data, std::size_t size);

// Writes the head of a message of `size` bytes, whose body already stands behind it, and the checksum of both.
void seal(const Head& head, std::uint8_t* message, std::size_t size);

// What `open` does with a message while it reads it.
struct Reading {
  // Where it is copied to, if not null: what was copied is what was checked.
  std::uint8_t* copy = nullptr;
  // Sees the body, `size` bytes, in ranges [begin, end) that cover it. Its first kLookBytes bytes and all before `end`
  // are in place. Threads that share a long message call it at once.
  std::function<void(const std::uint8_t* body, std::size_t size, std::size_t begin, std::size_t end)> look = {};
};
inline constexpr std::size_t kLookBytes = 1024;

// Checks head and checksum of a message of this kind, reading it once (a long one by several threads, each for its
// lanes of the checksum). It must fill the `size` bytes. Throws MessageError.
Head open(Kind kind, const std::uint8_t* message, std::size_t size, const Reading& reading = {});

// The same for the first message in `data`, which others may follow.
Head open_first(Kind kind, const std::uint8_t* data, std::size_t size, const Reading& reading = {});

}  // namespace privtuner::wire
