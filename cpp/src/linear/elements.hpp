// The element-wise loops between floats and residues. One source, compiled once for each path: only exact IEEE steps,
// so the results are the same on all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"

namespace privtuner::linear {

inline constexpr std::size_t kFeatureBlock = 16;  // features handled together: a cache line of float32

// Floats between the columns of a feature block: whole lines, and one line off a power of two, so that the columns do
// not share the sets of the first-level cache.
inline std::size_t column_stride(std::size_t tokens) { return (tokens + 15) / 16 * 16 + 16; }

struct Elements {
  // columns[i * column_stride + t] = x[t * stride + i] for i < width <= kFeatureBlock.
  void (*gather)(const float* x, std::size_t stride, std::size_t tokens, std::size_t width, float* columns,
                 std::size_t column_stride);
  // y[t * stride + i] = columns[i * column_stride + t].
  void (*scatter)(const float* columns, std::size_t column_stride, std::size_t tokens, std::size_t width, float* y,
                  std::size_t stride);
  // norms[t] += sum over the row of (x[t][j] * weight[j])^2; weight may be null (ones).
  double (*row_norm2)(const float* x, const double* weight, std::size_t width);
  // out[t] = mask[t] + error[t] + round(x[t] * weight * scale[t]) mod q; |x * weight * scale| < q / 2.
  void (*embed32)(const std::uint32_t* mask, const std::int8_t* error, const float* x, double weight,
                  const double* scale, std::uint64_t q, std::size_t tokens, std::uint32_t* out);
  void (*embed64)(const std::uint64_t* mask, const std::int8_t* error, const float* x, double weight,
                  const double* scale, std::uint64_t q, std::size_t tokens, std::uint64_t* out);
  // Server: a row of products to reply bytes, low bits rounded away. 32-bit words: [tokens] u16 (high), [tokens] u8.
  void (*shorten32)(const std::uint32_t* row, std::size_t tokens, int dropped_bits, std::uint8_t* out);
  void (*shorten64)(const std::uint64_t* row, std::size_t tokens, int dropped_bits, std::uint8_t* out);
  // Owner: y[t] = centred(reply[t] - mask[t]) * weight * inverse_scale[t].
  // 32-bit words: high[t] u16 and low[t] u8; 64-bit words: high[t] u32, low is not used.
  void (*reveal32)(const std::uint8_t* high, const std::uint8_t* low, const std::uint32_t* mask, int dropped_bits,
                   double weight, const double* inverse_scale, std::uint64_t q, std::size_t tokens, float* y);
  void (*reveal64)(const std::uint8_t* high, const std::uint8_t* low, const std::uint64_t* mask, int dropped_bits,
                   double weight, const double* inverse_scale, std::uint64_t q, std::size_t tokens, float* y);
};

const Elements& elements(math::Isa isa);
const Elements& elements_portable();
const Elements& elements_avx2();
const Elements& elements_avx512();
inline const Elements& elements_avx512ifma() { return elements_avx512(); }
inline const Elements& elements_amx() { return elements_avx512(); }

}  // namespace privtuner::linear
