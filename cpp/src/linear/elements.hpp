// The element-wise loops between floats and residues. One source, compiled once for each path: only exact IEEE steps,
// so the results are the same on all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/linear/preset.hpp"
#include "privtuner/math/cpu.hpp"

namespace privtuner::linear {

inline constexpr std::size_t kFeatureBlock = 16;  // features handled together: a cache line of float32

// Floats between the columns of a feature block: whole lines, and one line off a power of two, so that the columns do
// not share the sets of the first-level cache.
inline std::size_t column_stride(std::size_t tokens) { return (tokens + 15) / 16 * 16 + 16; }

template <class Word>
struct Elements {
  // columns[i * column_stride + t] = x[t * stride + i] for i < width <= kFeatureBlock.
  void (*gather)(const float* x, std::size_t stride, std::size_t tokens, std::size_t width, float* columns,
                 std::size_t column_stride);
  // y[t * stride + i] = columns[i * column_stride + t].
  void (*scatter)(const float* columns, std::size_t column_stride, std::size_t tokens, std::size_t width, float* y,
                  std::size_t stride);
  // The sum over the row of (x[j] * weight[j])^2; weight may be null (ones).
  double (*row_norm2)(const float* x, const double* weight, std::size_t width);
  // out[t] = mask[t] + error[t] + round(x[t] * weight * scale[t]) mod q; |x * weight * scale| < q / 2.
  void (*embed)(const Preset& preset, const Word* mask, const std::int8_t* error, const float* x, double weight,
                const double* scale, std::size_t tokens, Word* out);
  // Server: a row of products to a row of a reply, low bits rounded away.
  void (*shorten)(const Preset& preset, const Word* products, std::size_t tokens, std::uint8_t* row);
  // Owner, for t < count: y[t] = centred(row[first + t] - mask[t]) * weight * inverse_scale[t]; the row has `tokens`.
  void (*reveal)(const Preset& preset, const std::uint8_t* row, std::size_t tokens, std::size_t first,
                 std::size_t count, const Word* mask, double weight, const double* inverse_scale, float* y);
};

// What one path has.
struct PathElements : Elements<std::uint32_t>, Elements<std::uint64_t> {};

const PathElements& elements_portable();
const PathElements& elements_avx2();
const PathElements& elements_avx512();
inline const PathElements& elements_avx512ifma() { return elements_avx512(); }
inline const PathElements& elements_amx() { return elements_avx512(); }

const PathElements& path_elements(math::Isa isa);

template <class Word>
const Elements<Word>& elements(math::Isa isa) {
  return path_elements(isa);
}

}  // namespace privtuner::linear
