// The bodies of the linear scheme's messages, inside the envelope of `wire`. Everything is little-endian; every field
// is checked before it is used.
//
//   layer   : d_out u32 | d_in u32 | norm_forward f64 | norm_backward f64 | delta f64 [d_out]
//   request : seed [32] | flags u32 | 0 u32 | words [features][tokens]
//   reply   : flags u32 | row_begin u32 | row_count u32 | 0 u32 | data [row_count]
//             | mask words [row_count][N], if flagged
//
// The head names the layer (subject), the request and the preset (parameters); tokens and features are those of the
// request, and in a reply those of the product. A reply is one or more such blocks, in order of their rows.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "privtuner/linear/preset.hpp"
#include "privtuner/wire/envelope.hpp"

namespace privtuner::linear {

using wire::MessageError;

enum class Direction : std::uint8_t { forward = 0, backward = 1 };
const char* direction_name(Direction direction);

using LayerId = wire::Id;
using RequestId = wire::Id;

inline constexpr std::size_t kRequestPrefix = wire::kHeadBytes + 40;
inline constexpr std::size_t kBlockPrefix = wire::kHeadBytes + 16;
inline constexpr std::uint32_t kMaxTokens = 1u << 24;
inline constexpr double kMaxScale = std::numeric_limits<float>::max();  // of a row: no square leaves the doubles
inline constexpr std::uint32_t kMaskWanted = 1;  // request: answer the mask product; block: it is here

// What the owner must know of a layer.
struct LayerSpec {
  const Preset* preset = nullptr;
  LayerId id{};
  std::uint32_t d_out = 0, d_in = 0;
  double norm_forward = 0;    // max_k |W_int[k, :]|_2
  double norm_backward = 0;   // max_j |W_int[:, j]|_2
  std::vector<double> delta;  // W[k, :] ~ delta[k] W_int[k, :]

  std::uint32_t features_in(Direction d) const { return d == Direction::forward ? d_in : d_out; }
  std::uint32_t features_out(Direction d) const { return d == Direction::forward ? d_out : d_in; }
  double norm(Direction d) const { return d == Direction::forward ? norm_forward : norm_backward; }

  std::vector<std::uint8_t> to_bytes() const;
  // Throws MessageError.
  static LayerSpec from_bytes(const std::uint8_t* data, std::size_t size);
};

struct RequestHeader {
  Direction direction;
  LayerId layer;
  RequestId request;
  std::array<std::uint8_t, 32> seed;
  std::uint32_t tokens, features;
  bool mask_wanted;
};

struct BlockHeader {
  Direction direction;
  LayerId layer;
  RequestId request;
  std::uint32_t tokens, features, row_begin, row_count;
  bool mask_present;
};

std::size_t request_bytes(const Preset& preset, std::uint32_t features, std::uint32_t tokens);
std::size_t block_bytes(const Preset& preset, std::uint32_t rows, std::uint32_t tokens, bool mask);

// Writes what comes before the words of a message, which stand in it already, and the checksum.
void seal_request(const Preset& preset, const RequestHeader& header, std::uint8_t* message, std::size_t size);
void seal_block(const Preset& preset, const BlockHeader& header, std::uint8_t* message, std::size_t size);

// Checks everything that can be checked without the layer: the envelope, lengths, ranges, unused fields. The message is
// read once (`wire::open`), and where `copy` is not null copied there on the way: nothing but what was checked. Throws
// MessageError.
RequestHeader open_request(const Preset& preset, const std::uint8_t* message, std::size_t size,
                           std::uint8_t* copy = nullptr);
// The first block in `message`, which may be followed by others; its size is stored in block_size.
BlockHeader open_block(const Preset& preset, const std::uint8_t* message, std::size_t size, std::size_t& block_size,
                       std::uint8_t* copy = nullptr);

}  // namespace privtuner::linear
