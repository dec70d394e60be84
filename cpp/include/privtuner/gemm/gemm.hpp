// Exact integer matrix products modulo q: small signed weights times residues, by digit planes.
//
// A residue is split into short unsigned digits, a weight into signed bytes; every digit plane is one small-integer
// product with exact int32 sums, which is what AMX, VNNI and vpmaddwd do fastest; the sums are recombined modulo q
// while they are still in registers or in the first-level cache. After Bae, Cheon, Hanrot, Park, Stehle,
// "Plaintext-Ciphertext Matrix Multiplication and FHE Bootstrapping: Fast and Fused", CRYPTO 2024, with byte digits
// instead of floating point.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/math/modular.hpp"

namespace privtuner::gemm {

inline constexpr std::size_t kMaxDepth = 65536;       // longest inner dimension: 128 * 255 * 65536 < 2^31
inline constexpr int kMaxWeight16 = 127 * 256 + 127;  // |w| of 16-bit weights: high and low byte both signed
inline constexpr std::size_t kRowStep = 32;           // every row range starts at a multiple of it

// A weight matrix [rows][cols], one or two bytes a weight, stored once in 4 x 4 blocks that serve W and its transpose.
class Weights {
 public:
  // w: row-major. Throws std::invalid_argument unless 1 <= rows, cols <= kMaxDepth, and |w| <= kMaxWeight16 for
  // 16-bit weights.
  Weights(const std::int8_t* w, std::size_t rows, std::size_t cols);
  Weights(const std::int16_t* w, std::size_t rows, std::size_t cols);

  std::size_t rows() const { return rows_; }
  std::size_t cols() const { return cols_; }
  int bytes_per_weight() const { return bytes_; }
  int at(std::size_t row, std::size_t col) const;

  // The 16 bytes of 4 x 4 block (i, j) of one byte plane, row-major inside; zero outside the matrix.
  const std::int8_t* block(int byte, std::size_t i, std::size_t j) const {
    return data_.data() + ((static_cast<std::size_t>(byte) * row_blocks_ + i) * col_blocks_ + j) * 16;
  }
  std::size_t row_blocks() const { return row_blocks_; }
  std::size_t col_blocks() const { return col_blocks_; }

 private:
  template <class T>
  void fill(const T* w);
  std::size_t rows_, cols_, row_blocks_, col_blocks_;
  int bytes_;
  math::AlignedVector<std::int8_t> data_;
};

enum class Operand {
  plain,      // W: depth = cols, result rows = rows
  transpose,  // W^T: depth = rows, result rows = cols
};

template <class Word>
inline constexpr int kMaxBits = sizeof(Word) == 4 ? 32 : 60;  // longest modulus

// Residues [depth][columns] laid out for one path's kernel. Word is uint32_t (q < 2^32) or uint64_t (q < 2^60).
template <class Word>
class PackedResidues {
 public:
  PackedResidues() = default;
  PackedResidues(const Word* c, std::size_t depth, std::size_t columns, std::size_t stride, math::Isa isa,
                 int bits = kMaxBits<Word>) {
    assign(c, depth, columns, stride, isa, bits);
  }

  // Packs other residues in the same memory, which is most of the cost when it is new.
  //
  // c: row-major with `stride` words between rows; every word in [0, q). bits: at least the bit length of q, at most
  // kMaxBits; products of 64-bit words take time in proportion to ceil(bits / 8), from 4 on, or on AVX2 to 3 up to 45
  // bits and 4 beyond. Throws std::invalid_argument for an unusable shape or bits. Runs on the process's threads.
  void assign(const Word* c, std::size_t depth, std::size_t columns, std::size_t stride, math::Isa isa,
              int bits = kMaxBits<Word>);

  std::size_t depth() const { return depth_; }
  std::size_t columns() const { return columns_; }
  int bits() const { return bits_; }
  math::Isa isa() const { return isa_; }
  const std::uint8_t* block(std::size_t i) const { return data_.data() + i * block_bytes_; }
  std::size_t block_bytes() const { return block_bytes_; }

 private:
  std::size_t depth_ = 0, columns_ = 0, block_bytes_ = 0;
  int bits_ = 0;
  math::Isa isa_ = math::Isa::portable;
  math::AlignedVector<std::uint8_t> data_;
};

// out[r][c] = sum_k op(W)[row_begin + r][k] * C[k][c] mod q for r < row_count, row-major with `stride` words between
// rows. Exact, the same words on every path. Throws std::invalid_argument when depths differ, the row range is not
// inside op(W), row_begin is no multiple of kRowStep, stride is below the columns, or q has more bits than the residues
// were packed for.
template <class Word>
void multiply(const Weights& weights, Operand operand, const PackedResidues<Word>& residues, const math::Modulus& q,
              std::size_t row_begin, std::size_t row_count, Word* out, std::size_t stride);

extern template class PackedResidues<std::uint32_t>;
extern template class PackedResidues<std::uint64_t>;

}  // namespace privtuner::gemm
