#include "privtuner/circuits/packing.hpp"

#include <algorithm>
#include <cmath>

#include "privtuner/math/parallel.hpp"

namespace privtuner::circuits {
namespace {

using ckks::Evaluator;
using ckks::TensorPtr;

std::size_t round_up_to_power(std::size_t count) {
  std::size_t power = 1;
  while (power < count) power *= 2;
  return power;
}

// The features of one group, padded with nothing to a power of two.
class Packing {
 public:
  Packing(const Evaluator& evaluator, TensorPtr x) : evaluator_(evaluator), x_(std::move(x)) {}

  TensorPtr run() const {
    const std::size_t count = round_up_to_power(x_->features), n = evaluator_.parameters()->n();
    TensorPtr packed = evaluator_.batch(*x_) > 1 ? by_levels(count) : by_subtrees(count);
    for (std::size_t power = 2 * count; power <= n; power *= 2) packed = merge(packed, nullptr, power);
    return packed;
  }

 private:
  // Subtrees side by side, each on one thread; then their merges.
  TensorPtr by_subtrees(std::size_t count) const {
    const std::size_t parts = std::min<std::size_t>(count, 16);
    std::vector<TensorPtr> trees(parts);
    math::parallel_for(parts, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) trees[i] = subtree(i, parts, count / parts);
    });
    for (std::size_t half = parts / 2; half >= 1; half /= 2) {
      for (std::size_t i = 0; i < half; ++i) trees[i] = merge(trees[i], trees[i + half], count / half);
    }
    return trees[0];
  }

  // The same merges with the whole of a level before the next one, a batch of its pairs at a time: feature f of a level
  // meets feature f + half, or nothing where there is none.
  TensorPtr by_levels(std::size_t count) const {
    TensorPtr level = x_;
    for (std::size_t half = count / 2; half >= 1; half /= 2) {
      const std::size_t pairs = level->features - half;
      std::vector<TensorPtr> merged;
      for (std::size_t begin = 0, end; begin < half; begin = end) {
        end = std::min(begin + evaluator_.batch(*x_), begin < pairs ? pairs : half);
        const TensorPtr odd = begin < pairs ? evaluator_.select(level, half + begin, half + end) : nullptr;
        merged.push_back(merge(evaluator_.select(level, begin, end), odd, count / half));
      }
      level = merged.size() == 1 ? merged[0] : evaluator_.concatenate(merged);
    }
    return level;
  }

  // Features start, start + stride, ..., `count` of them; null if none of them exists.
  TensorPtr subtree(std::size_t start, std::size_t stride, std::size_t count) const {
    if (start >= x_->features) return nullptr;
    if (count == 1) return evaluator_.select(x_, start, start + 1);
    return merge(subtree(start, 2 * stride, count / 2), subtree(start + stride, 2 * stride, count / 2), count);
  }

  // even + X^(N/count) odd, where every other coefficient of either, in steps of N/count, cancels.
  TensorPtr merge(const TensorPtr& even, const TensorPtr& odd, std::size_t count) const {
    if (!even) return nullptr;
    const auto element = static_cast<std::uint32_t>(count + 1);
    if (!odd) return evaluator_.add(even, evaluator_.automorphism(even, element));
    const TensorPtr shifted = evaluator_.multiply_monomial(odd, evaluator_.parameters()->n() / count);
    return evaluator_.add(evaluator_.add(even, shifted),
                          evaluator_.automorphism(evaluator_.subtract(even, shifted), element));
  }

  const Evaluator& evaluator_;
  TensorPtr x_;
};

}  // namespace

std::vector<std::uint32_t> packing_elements(const ckks::Parameters& parameters) {
  std::vector<std::uint32_t> elements;
  for (std::size_t power = 2; power <= parameters.n(); power *= 2) {
    elements.push_back(static_cast<std::uint32_t>(power + 1));
  }
  return elements;
}

PackedPlace packed_place(std::size_t n, std::size_t features, std::size_t f) {
  const std::size_t group = f / n, count = round_up_to_power(std::min(n, features - group * n));
  return {group, (f - group * n) * (n / count)};
}

TensorPtr pack_slot_sums(const Evaluator& evaluator, const TensorPtr& x) {
  const std::size_t n = evaluator.parameters()->n();
  const double slots = static_cast<double>(evaluator.parameters()->slots());
  for (std::size_t f = 1; f < x->features; ++f) {
    if (std::fabs(x->scale[f] / x->scale[0] - 1) > 1e-9) {
      throw ckks::Error("the features to sum have different scales; multiply by 1.0 first (takes a level)");
    }
  }
  std::vector<TensorPtr> groups;
  for (std::size_t first = 0; first < x->features; first += n) {
    const TensorPtr group = evaluator.select(x, first, std::min(x->features, first + n));
    TensorPtr packed = Packing(evaluator, group).run();
    // Each of the log2 N merges doubles what stays of its input's error and its own: N times the input's and one
    // switch's in all. A coefficient's error is a slot's over sqrt(N/2).
    const double worst = *std::max_element(group->noise.begin(), group->noise.end());
    const double own = std::hypot(evaluator.switch_noise(x->limbs()), evaluator.rounding_noise());
    const double noise = static_cast<double>(n) * std::hypot(worst, own) / std::sqrt(slots);
    packed = evaluator.with_noise(packed, {noise}, {0.0});
    groups.push_back(evaluator.reinterpret(packed, 0.5, x->bound * slots));  // N times the constant is twice the sum
  }
  return groups.size() == 1 ? groups[0] : evaluator.concatenate(groups);
}

}  // namespace privtuner::circuits
