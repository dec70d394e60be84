// Element-wise arithmetic on rows of residues modulo one prime below 2^50: the inner loops of RNS-CKKS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "privtuner/math/cpu.hpp"
#include "privtuner/math/modular.hpp"
#include "privtuner/ring/row.hpp"

namespace privtuner::ring {

inline constexpr std::size_t kMaxTerms = 2048;  // terms of one sum of products: they fit the accumulators

// Constants of one prime q, 2^16 < q < 2^50. Rows are arrays of n words in [0, q) unless a function says otherwise; n
// is a multiple of 16; out may be an input, but rows may not overlap otherwise. All results are in [0, q), the same
// words on every path; `isa` must be a usable one. No branch and no index depends on the words.
class ResidueRow {
 public:
  // Throws std::invalid_argument unless q is a prime in (2^16, 2^50).
  explicit ResidueRow(std::uint64_t q);
  const math::Modulus& modulus() const { return modulus_; }

  void add(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  void subtract(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  void negate(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out = a b.
  void multiply(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out = a w, w in [0, q).
  void multiply_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out = a + w, w in [0, q).
  void add_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out = a modulo q; a any words below 2^52.
  void reduce(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out[i] = sum over t < terms of a[t][i] b[t][i]. terms in [1, kMaxTerms].
  void inner_product(const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                     std::uint64_t* out, std::size_t n, math::Isa isa) const;
  // out[i] = sum over t < terms of a[t][i] w[t]; a[t] any words below 2^52, w[t] in [0, q). terms in [1, kMaxTerms].
  void linear_combination(const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms, std::uint64_t* out,
                          std::size_t n, math::Isa isa) const;
  // With weights and out, what convert_rows takes.
  kernels::ConversionTarget target(const std::uint64_t* weights, std::uint64_t* out) const {
    return {kernel_row(), weights, out};
  }

 private:
  kernels::Row kernel_row() const { return {modulus_.q, inverse_, &modulus_, &words52_}; }

  math::Modulus modulus_;
  double inverse_;  // 1 / q rounded
  kernels::Words52 words52_;
};

using kernels::kMaxConverted;

// Words [begin, end) of a base conversion: a target's out[i] is sum over t < terms of a[t][i] weights[t], plus
// u[i] weights[terms], modulo its prime. u[i] = floor(1/2 + sum over t of a[t][i] inverse[t]) with the sum taken in
// double, in order of t, without fused steps: the times that the product of the moduli is to be taken off, when
// a[t] < q_t and inverse[t] = 1 / q_t. a[t] below 2^50, weights in [0, q); terms in [1, kMaxConverted]; begin and end
// multiples of 16.
void convert_rows(const std::uint64_t* const* a, const double* inverse, std::size_t terms,
                  const kernels::ConversionTarget* targets, std::size_t count, std::size_t begin, std::size_t end,
                  math::Isa isa);

// The automorphism X -> X^element of Z_q[X]/(X^N + 1) on rows in the NTT's order. It takes blocks of 2^k words,
// aligned to as many, to such blocks: the high bits of a word's place are the low bits of a power of psi.
class Automorphism {
 public:
  // Throws std::invalid_argument unless n is a power of two, at least 16, and element odd and below 2n.
  Automorphism(std::size_t n, std::uint32_t element);

  // First word of the block that becomes words [begin, begin + words) of the result.
  std::size_t source(std::size_t begin, std::size_t words) const;
  // Words [begin, begin + words) of the result from that block, to out. words a power of two from 8 to n, begin a
  // multiple of it; block and out may not overlap.
  void permute(const std::uint64_t* block, std::size_t begin, std::size_t words, std::uint64_t* out,
               math::Isa isa) const;

 private:
  void check_block(std::size_t begin, std::size_t words) const;

  std::uint32_t element_;
  std::vector<std::uint32_t> sources_;  // of kernels::GroupOrder, relative to the whole row
};

}  // namespace privtuner::ring
