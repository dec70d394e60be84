// From residues modulo the first primes to those modulo any other, of the representative nearest to zero: exactly.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "privtuner/ckks/parameters.hpp"

namespace privtuner::ckks {

// For x modulo q = q_0 .. q_(k-1), odd, the integer in [-(q - 1) / 2, (q - 1) / 2]: (x + (q - 1) / 2 mod q) less
// (q - 1) / 2, where the first term has mixed-radix digits u_0 + q_0 (u_1 + q_1 (u_2 + ..)), 0 <= u_i < q_i. Whole
// numbers throughout: a quotient in floating point, as BaseConversion takes it, is off by one near the ends. No branch
// and no index depends on x.
class CentredLift {
 public:
  // limbs: k, at least 1 and at most the chain's. The parameters must outlive the lift.
  CentredLift(const Parameters& parameters, std::size_t limbs);

  // rows [k][N], coefficients: residues of x in, digits out.
  void to_digits(std::uint64_t* rows) const;
  // The residues modulo prime `i` of the integer with these digits, N coefficients.
  void residues(const std::uint64_t* digits, std::size_t i, std::uint64_t* out) const;

 private:
  const Parameters& parameters_;
  std::size_t limbs_;
  std::vector<std::uint64_t> inverse_;                // [i][j < i]: q_j^-1 mod q_i
  std::vector<std::vector<std::uint64_t>> products_;  // [prime][i]: q_0 .. q_(i-1) mod that prime
  std::vector<std::uint64_t> minus_half_;             // [prime]: -(q - 1) / 2 mod that prime
};

}  // namespace privtuner::ckks
