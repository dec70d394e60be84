// Element-wise arithmetic on rows of residues modulo one prime below 2^50: the inner loops of RNS-CKKS.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"
#include "privtuner/math/modular.hpp"

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
  // out = (a - b) w, w in [0, q); b any words below 2^50, not reduced modulo q.
  void subtract_multiply(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t w, std::uint64_t* out,
                         std::size_t n, math::Isa isa) const;
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

 private:
  math::Modulus modulus_;
  double inverse_;  // 1 / q rounded
};

// out[i] = floor(1/2 + sum over t of a[t][i] inverse[t]) with the sum taken in double, in order of t, without fused
// steps: the number of times the product of the moduli is to be taken off in a base conversion, when a[t] < q_t and
// inverse[t] = 1 / q_t. a[t] below 2^52. The result is at most terms.
void quotient_row(const std::uint64_t* const* a, const double* inverse, std::size_t terms, std::uint64_t* out,
                  std::size_t n, math::Isa isa);

// out[i] = a[index[i]], index public.
void permute_row(const std::uint64_t* a, const std::uint32_t* index, std::uint64_t* out, std::size_t n, math::Isa isa);

}  // namespace privtuner::ring
