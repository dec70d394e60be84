// What one instruction-set path gives the driver in gemm.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/gemm/gemm.hpp"

namespace privtuner::gemm {

inline constexpr std::size_t kTileColumns = 16;  // columns of one packed block, on every path

// Weight bytes of op(W) rows [row, row + count), for the packing functions.
struct PanelSource {
  const Weights* weights;
  Operand operand;
  std::size_t depth;  // inner dimension of op(W)
  std::size_t rows;   // rows of op(W)
};

// Copies the 4 x 4 block of op(W) at rows 4 i.., depth 4 j.. into out: out[4 r + k]. Zero outside the matrix.
void load_block(const PanelSource& source, int byte, std::size_t i, std::size_t j, std::int8_t out[16]);

// What the recombination of int32 digit sums modulo q needs.
struct Reducer {
  std::uint64_t q;
  double inverse;  // 1 / q
};

template <class Word>
struct Kernel {
  std::size_t rows;                  // rows of op(W) in one panel
  std::size_t depth_unit;            // the depth is padded to a multiple of it
  std::size_t max_depth;             // longest depth whose int32 sums cannot overflow; a multiple of depth_unit
  std::size_t panel_bytes_per_unit;  // packed weights for one depth unit
  std::size_t block_bytes_per_unit;  // packed residues for one depth unit
  void (*pack_panel)(const PanelSource& source, std::size_t row, std::uint8_t* panel);
  // ceil(columns / 16) blocks, block_bytes apart.
  void (*pack_blocks)(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* blocks,
                      std::size_t block_bytes);
  // out[r * stride + 16 b + c] for all rows of the panel and `blocks` consecutive packed residue blocks, block_bytes
  // apart.
  void (*multiply)(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                   std::size_t units, const Reducer& reducer, Word* out, std::size_t stride);
};

// bytes_per_weight 1 or 2; residues below 2^bits, at most 32 or 60 by Word. The layout of residues follows bits alone.
template <class Word>
const Kernel<Word>& kernel_portable(int bytes_per_weight, int bits);
template <class Word>
const Kernel<Word>& kernel_avx2(int bytes_per_weight, int bits);
template <class Word>
const Kernel<Word>& kernel_avx512(int bytes_per_weight, int bits);
template <class Word>
const Kernel<Word>& kernel_avx512ifma(int bytes_per_weight, int bits) {
  return kernel_avx512<Word>(bytes_per_weight, bits);
}
template <class Word>
const Kernel<Word>& kernel_amx(int bytes_per_weight, int bits);

}  // namespace privtuner::gemm
