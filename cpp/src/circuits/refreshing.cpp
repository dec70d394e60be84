#include "privtuner/circuits/refreshing.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "privtuner/ckks/refresh.hpp"

namespace privtuner::circuits {

using ckks::Evaluator;
using ckks::TensorPtr;

namespace {

constexpr std::size_t kPairsAtOnce = 8;  // threads have work, and little more than the result is alive

}  // namespace

TensorPtr lower_for_refresh(const Evaluator& evaluator, const TensorPtr& x, int level, bool packed) {
  const ckks::Parameters& parameters = *evaluator.parameters();
  ckks::check_refresh_levels(parameters, x->level, level);
  if (x->level == ckks::kRefreshLevel) return x;
  const std::size_t pairs = packed ? 0 : x->features / 2;
  std::vector<double> scale(x->features, parameters.scale(level));
  for (std::size_t f = 0; f < 2 * pairs; ++f) scale[f] /= 2;
  TensorPtr low = evaluator.bring(x, ckks::kRefreshLevel, scale);
  if (packed) {  // the error of the rounding is a coefficient's, and `bring` knows slots
    const double rounding = evaluator.rounding_noise(), slots = static_cast<double>(parameters.slots());
    std::vector<double> noise = low->noise;
    for (double& value : noise) value = std::sqrt(value * value - rounding * rounding * (1 - 1 / slots));
    low = evaluator.with_noise(low, noise, low->shared);
  }
  if (pairs == 0) return low;
  // X^(N/2) is i in every slot.
  const TensorPtr imaginary = evaluator.multiply_monomial(evaluator.select(low, pairs, 2 * pairs), parameters.slots());
  TensorPtr z = evaluator.add(evaluator.select(low, 0, pairs), imaginary);
  z = evaluator.assume(z, std::sqrt(2.0) * x->bound);
  if (x->features == 2 * pairs) return z;
  return evaluator.concatenate({z, evaluator.select(low, 2 * pairs, x->features)}, true);
}

TensorPtr split_pairs(const Evaluator& evaluator, const TensorPtr& z, std::size_t features, double bound) {
  if (z->features > features || 2 * z->features < features) {
    throw ckks::Error(std::to_string(z->features) + " ciphertexts do not hold " + std::to_string(features) +
                      " features in pairs");
  }
  const std::size_t pairs = features - z->features;
  if (pairs == 0) return evaluator.assume(z, bound);
  Evaluator::Assembly assembly(evaluator, *z, features, z->level);
  // Real and imaginary part of one error are as independent as those of two features.
  const auto put = [&](const TensorPtr& part, std::size_t at) {
    assembly.put(evaluator.reinterpret(part, 0.5, bound), at, true);
  };
  const std::size_t step = std::max(evaluator.batch(*z), kPairsAtOnce);
  for (std::size_t begin = 0, end; begin < pairs; begin = end) {
    end = std::min(begin + step, pairs);
    const TensorPtr both = evaluator.select(z, begin, end), conjugate = evaluator.conjugate(both);
    put(evaluator.add(both, conjugate), begin);
    // -i is X^(N/2), the sign of the difference turned.
    const TensorPtr difference = evaluator.subtract(conjugate, both);
    put(evaluator.multiply_monomial(difference, evaluator.parameters()->slots()), pairs + begin);
  }
  if (z->features > pairs) assembly.put(evaluator.select(z, pairs, z->features), 2 * pairs, true);
  return assembly.finish(bound);
}

}  // namespace privtuner::circuits
