// What the tests of the matrix products share: the schoolbook product in 128-bit integers, and the cases.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "check.hpp"
#include "privtuner/gemm/gemm.hpp"
#include "privtuner/math/parallel.hpp"

namespace oracle {

using privtuner::gemm::Operand;
using privtuner::gemm::PackedResidues;
using privtuner::gemm::Weights;
using privtuner::math::AlignedVector;
using privtuner::math::Isa;
using privtuner::math::Modulus;

__extension__ typedef __int128 Int128;

constexpr std::uint64_t kPreset32 = 4293918721;            // 2^32 - 2^20 + 1
constexpr std::uint64_t kPreset50 = 1125899903827969;      // 2^50 - 23 * 2^17 + 1
constexpr std::uint64_t kLargest32 = 4294967291;           // the largest prime below 2^32
constexpr std::uint64_t kLargest60 = 1152921504606846883;  // the largest prime below 2^60

inline int bit_length(std::uint64_t q) {
  int bits = 0;
  while (q >> bits != 0) ++bits;
  return bits;
}

// The largest prime of that many bits.
inline std::uint64_t largest_prime(int bits) {
  std::uint64_t q = (std::uint64_t{1} << bits) - 1;
  while (!privtuner::math::is_prime(q)) q -= 2;
  return q;
}

template <class Word>
std::vector<std::uint64_t> moduli() {
  if constexpr (sizeof(Word) == 4) {
    return {kPreset32, kLargest32, 97, 3};
  } else {
    return {kPreset50, kLargest60, kPreset32, 3};
  }
}

// The shape of one product: op(W) has `rows` rows, the residues are [depth][columns] with `gap` words between rows.
struct Shape {
  std::size_t rows, depth, columns, gap;
};

enum class Fill { random, lowest, highest, zero, mixed };
constexpr Fill kFills[] = {Fill::random, Fill::lowest, Fill::highest, Fill::zero, Fill::mixed};

// Bytes reach both ends of int8; two-byte weights reach +-32639, whose bytes are both +-127.
template <class Weight>
Weight extreme(bool high) {
  if constexpr (sizeof(Weight) == 1) {
    return static_cast<Weight>(high ? 127 : -128);
  } else {
    return static_cast<Weight>(high ? privtuner::gemm::kMaxWeight16 : -privtuner::gemm::kMaxWeight16);
  }
}

template <class Weight>
std::vector<Weight> weights(std::size_t count, Fill fill, std::mt19937_64& random) {
  const int low = extreme<Weight>(false), high = extreme<Weight>(true);
  std::vector<Weight> result(count, static_cast<Weight>(fill == Fill::zero ? 0 : fill == Fill::highest ? high : low));
  if (fill == Fill::random) {
    for (Weight& w : result)
      w = static_cast<Weight>(low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1)));
  } else if (fill == Fill::mixed) {  // values where the low byte changes sign or carries
    const int choices[] = {
        low, high, 0, -1, 1, 127, -128, sizeof(Weight) == 1 ? 64 : 128, sizeof(Weight) == 1 ? -127 : -129};
    for (Weight& w : result) w = static_cast<Weight>(choices[random() % 9]);
  }
  return result;
}

template <class Word>
void fill_residues(Word* row, std::size_t count, Fill fill, std::uint64_t q, std::mt19937_64& random) {
  const std::uint64_t choices[] = {0,
                                   1,
                                   q - 1,
                                   q / 2,
                                   std::min<std::uint64_t>(255, q - 1),
                                   std::min<std::uint64_t>(2047, q - 1),
                                   std::min<std::uint64_t>(2048, q - 1)};
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t value = fill == Fill::random    ? random() % q
                                : fill == Fill::mixed   ? choices[random() % 7]
                                : fill == Fill::highest ? q - 1
                                : fill == Fill::lowest  ? 1
                                                        : 0;
    row[i] = static_cast<Word>(value);
  }
}

// op(W) C mod q, exact: |sum| < 2^16 * 2^15 * 2^60.
template <class Weight, class Word>
std::vector<Word> schoolbook(const std::vector<Weight>& w, std::size_t w_cols, Operand operand, const Shape& shape,
                             const AlignedVector<Word>& c, std::uint64_t q) {
  // |w| C summed over 2^15 depths stays below 2^63 for 32-bit words: a native sum, reduced now and then.
  using Sum = std::conditional_t<sizeof(Word) == 4, std::int64_t, Int128>;
  const std::size_t stride = shape.columns + shape.gap;
  std::vector<Word> out(shape.rows * shape.columns);
  std::vector<Sum> sums(shape.columns);
  for (std::size_t r = 0; r < shape.rows; ++r) {
    std::fill(sums.begin(), sums.end(), Sum{0});
    for (std::size_t k = 0; k < shape.depth; ++k) {
      const Sum weight = operand == Operand::plain ? w[r * w_cols + k] : w[k * w_cols + r];
      for (std::size_t j = 0; j < shape.columns; ++j) sums[j] += weight * static_cast<Sum>(c[k * stride + j]);
      if (sizeof(Word) == 4 && k % 32768 == 32767) {
        for (Sum& sum : sums) sum %= static_cast<Sum>(q);
      }
    }
    for (std::size_t j = 0; j < shape.columns; ++j) {
      const Sum rest = sums[j] % static_cast<Sum>(q);
      out[r * shape.columns + j] = static_cast<Word>(rest < 0 ? rest + static_cast<Sum>(q) : rest);
    }
  }
  return out;
}

// Every word of the result, and no other, is written: rows [row_begin, row_begin + row_count) are compared with the
// oracle, the gaps and one row behind with the value that stood there.
template <class Word>
void expect_product(const std::vector<Word>& want, const Weights& weights, Operand operand, const Shape& shape,
                    const PackedResidues<Word>& residues, const Modulus& q, std::size_t row_begin,
                    std::size_t row_count) {
  constexpr auto kUntouched = static_cast<Word>(0xa5a5a5a5a5a5a5a5u);
  const std::size_t stride = shape.columns + shape.gap;
  std::vector<Word> got((row_count + 1) * stride, kUntouched);
  privtuner::gemm::multiply(weights, operand, residues, q, row_begin, row_count, got.data(), stride);
  for (std::size_t r = 0; r <= row_count; ++r) {
    for (std::size_t j = 0; j < stride; ++j) {
      const bool inside = r < row_count && j < shape.columns;
      const Word expected = inside ? want[(row_begin + r) * shape.columns + j] : kUntouched;
      if (got[r * stride + j] != expected) {
        check::fail(__FILE__, __LINE__,
                    std::string(privtuner::math::isa_name(residues.isa())) + ", " +
                        (operand == Operand::plain ? "plain" : "transpose") + ", " +
                        std::to_string(weights.bytes_per_weight()) + "-byte weights, q = " + std::to_string(q.q) +
                        ", rows " + std::to_string(shape.rows) + ", depth " + std::to_string(shape.depth) +
                        ", columns " + std::to_string(shape.columns) + ": word (" + std::to_string(row_begin + r) +
                        ", " + std::to_string(j) + ") is " + std::to_string(got[r * stride + j]) + ", expected " +
                        std::to_string(expected));
      }
    }
  }
}

// One product on every path of `isas` against the schoolbook. bits: what the residues are packed for, 0 for those of
// the modulus.
template <class Weight, class Word>
void check_product(const std::vector<Isa>& isas, const Shape& shape, Operand operand, Fill weight_fill,
                   Fill residue_fill, std::uint64_t modulus, std::uint64_t seed, int bits = 0) {
  std::mt19937_64 random(seed);
  const std::vector<Weight> w = weights<Weight>(shape.rows * shape.depth, weight_fill, random);
  const bool plain = operand == Operand::plain;
  const std::size_t w_rows = plain ? shape.rows : shape.depth, w_cols = plain ? shape.depth : shape.rows;
  const Weights packed(w.data(), w_rows, w_cols);
  const std::size_t stride = shape.columns + shape.gap;
  // Nothing outside the residues is read: the gaps hold a word above every modulus, and the last row has none.
  AlignedVector<Word> c(shape.depth * stride - shape.gap, static_cast<Word>(~std::uint64_t{0}));
  for (std::size_t k = 0; k < shape.depth; ++k) {
    fill_residues(c.data() + k * stride, shape.columns, residue_fill, modulus, random);
  }
  const std::vector<Word> want = schoolbook(w, w_cols, operand, shape, c, modulus);
  for (const Isa isa : isas) {
    const PackedResidues<Word> residues(c.data(), shape.depth, shape.columns, stride, isa,
                                        bits == 0 ? bit_length(modulus) : bits);
    expect_product(want, packed, operand, shape, residues, Modulus(modulus), 0, shape.rows);
  }
}

// Both widths of weights and of words, plain and transposed.
inline void check_all_types(const std::vector<Isa>& isas, const Shape& shape, Fill weight_fill, Fill residue_fill,
                            std::size_t modulus, std::uint64_t seed) {
  const std::uint64_t q32 = moduli<std::uint32_t>()[modulus], q64 = moduli<std::uint64_t>()[modulus];
  for (const Operand operand : {Operand::plain, Operand::transpose}) {
    check_product<std::int8_t, std::uint32_t>(isas, shape, operand, weight_fill, residue_fill, q32, seed);
    check_product<std::int16_t, std::uint32_t>(isas, shape, operand, weight_fill, residue_fill, q32, seed + 1);
    check_product<std::int8_t, std::uint64_t>(isas, shape, operand, weight_fill, residue_fill, q64, seed + 2);
    check_product<std::int16_t, std::uint64_t>(isas, shape, operand, weight_fill, residue_fill, q64, seed + 3);
  }
}

// Sizes around every tile, register and block: 4 and 32 rows, 4 and 64 depths, 16 columns.
inline void check_sizes(const std::vector<Isa>& isas, const std::vector<std::size_t>& sizes) {
  std::uint64_t seed = 1000;
  for (const std::size_t rows : sizes) {
    for (const std::size_t depth : sizes) {
      for (const std::size_t columns : sizes) {
        seed += 4;
        check_all_types(isas, {rows, depth, columns, seed / 4 % 3}, Fill::random, Fill::random, 0, seed);
      }
    }
  }
}

// A last block of every width, and a last depth unit of every length.
inline void check_remainders(const std::vector<Isa>& isas) {
  for (std::size_t size = 1; size <= 65; ++size) {
    check_all_types(isas, {5, 9, size, 0}, Fill::random, Fill::random, 0, 1500 + 4 * size);
    check_all_types(isas, {5, size, 9, 0}, Fill::random, Fill::random, 0, 1501 + 4 * size);
    check_all_types(isas, {size, 5, 9, 0}, Fill::random, Fill::random, 0, 1502 + 4 * size);
  }
}

inline void check_fills_and_moduli(const std::vector<Isa>& isas) {
  std::uint64_t seed = 2000;
  for (std::size_t modulus = 0; modulus < moduli<std::uint32_t>().size(); ++modulus) {
    for (const Fill weight_fill : kFills) {
      for (const Fill residue_fill : kFills) {
        seed += 4;
        check_all_types(isas, {37, 131, 35, 2}, weight_fill, residue_fill, modulus, seed);
      }
    }
  }
}

// Depths beyond one int32 accumulation of the AVX2 path (8,192) and at the limit of all of them (65,536), where every
// product has the same sign and the largest size.
inline void check_depths(const std::vector<Isa>& isas, const std::vector<std::size_t>& depths, std::size_t rows,
                         std::size_t columns) {
  std::uint64_t seed = 3000;
  for (const std::size_t depth : depths) {
    for (const Fill weight_fill : {Fill::lowest, Fill::highest, Fill::mixed}) {
      for (const std::size_t modulus : {0, 1}) {
        seed += 4;
        check_all_types(isas, {rows, depth, columns, 0}, weight_fill,
                        weight_fill == Fill::mixed ? Fill::random : Fill::highest, modulus, seed);
      }
    }
  }
}

// Moduli on both sides of every number of digits, packed for their own bits and for the most; and sums of the largest
// size and of one sign, on which the recombination's bounds rest.
inline void check_digit_counts(const std::vector<Isa>& isas, std::size_t longest, std::size_t columns) {
  std::uint64_t seed = 3500;
  for (const int bits : {2, 20, 30, 32, 33, 36, 40, 41, 44, 45, 48, 49, 50, 52, 53, 54, 55, 56, 57, 59, 60}) {
    const std::uint64_t q = largest_prime(bits);
    const Shape shape = {19, 130, 35, 1}, extreme = {2, longest, columns, 0};
    for (const Operand operand : {Operand::plain, Operand::transpose}) {
      for (const int packed : {bits, privtuner::gemm::kMaxBits<std::uint64_t>}) {
        for (const Fill fill : {Fill::random, Fill::mixed}) {
          check_product<std::int8_t, std::uint64_t>(isas, shape, operand, fill, fill, q, ++seed, packed);
          check_product<std::int16_t, std::uint64_t>(isas, shape, operand, fill, fill, q, ++seed, packed);
        }
      }
      for (const Fill fill : {Fill::lowest, Fill::highest}) {
        check_product<std::int8_t, std::uint64_t>(isas, extreme, operand, fill, Fill::highest, q, ++seed);
        check_product<std::int16_t, std::uint64_t>(isas, extreme, operand, fill, Fill::highest, q, ++seed);
      }
    }
  }
}

// Every start that is allowed, and counts that end inside a tile.
template <class Weight, class Word>
void check_row_ranges(const std::vector<Isa>& isas, std::uint64_t modulus) {
  std::mt19937_64 random(4000);
  const Modulus q(modulus);
  const Shape shape = {131, 70, 33, 3};
  for (const Operand operand : {Operand::plain, Operand::transpose}) {
    const bool plain = operand == Operand::plain;
    const std::size_t w_cols = plain ? shape.depth : shape.rows;
    const auto w = weights<Weight>(shape.rows * shape.depth, Fill::random, random);
    const Weights packed(w.data(), plain ? shape.rows : shape.depth, w_cols);
    AlignedVector<Word> c(shape.depth * (shape.columns + shape.gap));
    fill_residues(c.data(), c.size(), Fill::random, modulus, random);
    const auto want = schoolbook(w, w_cols, operand, shape, c, modulus);
    for (const Isa isa : isas) {
      const PackedResidues<Word> residues(c.data(), shape.depth, shape.columns, shape.columns + shape.gap, isa,
                                          bit_length(modulus));
      for (std::size_t begin = 0; begin <= shape.rows; begin += privtuner::gemm::kRowStep) {
        for (const std::size_t count : {0, 1, 3, 4, 17, 32, 35, 64, 131}) {
          if (begin + count <= shape.rows) {
            expect_product(want, packed, operand, shape, residues, q, begin, count);
          }
        }
      }
    }
  }
}

inline void check_row_ranges(const std::vector<Isa>& isas) {
  check_row_ranges<std::int8_t, std::uint32_t>(isas, kPreset32);
  check_row_ranges<std::int16_t, std::uint64_t>(isas, kPreset50);
}

// The words do not depend on the number of threads, nor on how columns and rows are shared among tasks.
inline void check_threads(const std::vector<Isa>& isas) {
  const int before = privtuner::math::num_threads();
  for (const int threads : {1, 2, 5}) {
    privtuner::math::set_num_threads(threads);
    check_product<std::int8_t, std::uint32_t>(isas, {97, 200, 300, 0}, Operand::plain, Fill::random, Fill::random,
                                              kPreset32, 5000);
    check_product<std::int16_t, std::uint64_t>(isas, {97, 200, 300, 0}, Operand::transpose, Fill::random, Fill::random,
                                               kPreset50, 5001);
  }
  privtuner::math::set_num_threads(before);
}

}  // namespace oracle
