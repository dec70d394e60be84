// What one instruction-set path gives the driver in gemm.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/gemm/gemm.hpp"

namespace privtuner::gemm {

inline constexpr std::size_t kTileColumns = 16;  // columns of one packed block, on every path
inline constexpr std::size_t kMaxTileRows = 32;

// Weight bytes of op(W) rows [row, row + count), for the packing functions.
struct PanelSource {
  const Weights* weights;
  Operand operand;
  std::size_t depth;  // inner dimension of op(W)
  std::size_t rows;   // rows of op(W)
};

// Copies the 4 x 4 block of op(W) at rows 4 i.., depth 4 j.. into out: out[4 r + k]. Zero outside the matrix.
void load_block(const PanelSource& source, int byte, std::size_t i, std::size_t j, std::int8_t out[16]);

// Recombination of int32 digit sums modulo q.
struct Reducer {
  math::Modulus modulus;
  double inverse;  // 1 / q
  std::uint64_t two32, two32_shoup;
  explicit Reducer(const math::Modulus& q);
};

// out[c] = sum_d 2^(8 d) * (low[d][c] + 2^8 high[d][c]) mod q over 7 digits of 8 bits and 16 columns; rows of `low` and
// `high` are `step` ints apart; high may be null. Here, not in a path's file: it must not be compiled for one
// processor.
void recombine_bytes(const std::int32_t* low, const std::int32_t* high, std::size_t step, const Reducer& reducer,
                     std::uint64_t* out);
// The same for digits of 11 bits, `digits` of them (3 or 5).
void recombine_11(const std::int32_t* low, const std::int32_t* high, std::size_t step, int digits,
                  const Reducer& reducer, std::uint64_t* out);

template <class Word>
struct Kernel {
  std::size_t rows;                  // rows of op(W) in one panel
  std::size_t depth_unit;            // the depth is padded to a multiple of it
  std::size_t max_depth;             // longest depth whose int32 sums cannot overflow; a multiple of depth_unit
  std::size_t panel_bytes_per_unit;  // packed weights for one depth unit
  std::size_t block_bytes_per_unit;  // packed residues for one depth unit
  void (*pack_panel)(const PanelSource& source, std::size_t row, std::uint8_t* panel);
  void (*pack_block)(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* block);
  // tiles[b][r][c] for `blocks` consecutive packed residue blocks, block_bytes apart.
  void (*multiply)(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                   std::size_t units, const Reducer& reducer, Word* tiles);
};

// bytes_per_weight 1 or 2.
template <class Word>
const Kernel<Word>& portable_kernel(int bytes_per_weight);
template <class Word>
const Kernel<Word>& avx2_kernel(int bytes_per_weight);
template <class Word>
const Kernel<Word>& avx512_kernel(int bytes_per_weight);
template <class Word>
const Kernel<Word>& amx_kernel(int bytes_per_weight);

}  // namespace privtuner::gemm
