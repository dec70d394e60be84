// Polynomials of encrypted values.
#pragma once

#include <vector>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::circuits {

inline constexpr int kMaxDegree = 255;

enum class Basis { power, chebyshev };

struct Polynomial {
  Basis basis = Basis::power;
  std::vector<double> coefficients;  // of x^i, or of T_i of x mapped from [low, high] to [-1, 1]
  double low = -1, high = 1;         // where it may be evaluated
  // Throws std::invalid_argument for no coefficients, a degree above kMaxDegree, NaN, or low >= high.
  void check() const;
  int degree() const;  // of the last coefficient that is not zero
  // Multiplications in a row: ceil(log2(degree + 1)).
  int depth() const;
};

// Levels evaluate() takes from x: the polynomial's depth, and one more if x's scale is too large for the domain's
// width. What decides it: scale * max(1, half width of a Chebyshev domain) <= 2^min(1, 2^(2 - depth)) * the
// chain's scale.
int levels_needed(const ckks::Tensor& x, const Polynomial& polynomial);

// Every slot's value p(x), at the chain's scale. Paterson-Stockmeyer with baby steps T_1 .. T_(k-1) and giant steps
// T_k, T_2k, .. (Bossuat, Mouchet, Troncoso-Pastoriza, Hubaux, "Efficient Bootstrapping for Approximate Homomorphic
// Encryption with Non-Sparse Keys", 2021, section 4: optimal depth, scales exact because every coefficient is encoded
// at the scale that makes its term agree with the others). The domain is mapped by reading the words at another scale:
// that takes no level. Features may differ in scale. Throws ckks::Error when x's bound passes the domain, when levels
// run out, and as the evaluator does.
ckks::TensorPtr evaluate(const ckks::Evaluator& evaluator, const ckks::TensorPtr& x, const Polynomial& polynomial);

// Several polynomials of one basis and domain, whose powers of x are computed once. If one of them takes a level for
// the domain, all do.
std::vector<ckks::TensorPtr> evaluate_all(const ckks::Evaluator& evaluator, const ckks::TensorPtr& x,
                                          const std::vector<Polynomial>& polynomials);

}  // namespace privtuner::circuits
