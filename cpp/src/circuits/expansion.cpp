#include "privtuner/circuits/expansion.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "privtuner/circuits/packing.hpp"

namespace privtuner::circuits {
namespace {

using ckks::Evaluator;
using ckks::TensorPtr;

// The remainders modulo `modulus` of what is wanted, rising.
std::vector<std::size_t> remainders(const std::vector<std::size_t>& wanted, std::size_t modulus) {
  std::vector<std::size_t> out;
  for (const std::size_t number : wanted) out.push_back(number % modulus);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

// The features of x that are to be kept: a view where they are neighbours, else a copy.
TensorPtr gather(const Evaluator& evaluator, const TensorPtr& x, const std::vector<bool>& keep) {
  std::vector<TensorPtr> runs;
  for (std::size_t begin = 0, end; begin < keep.size(); begin = end) {
    for (end = begin + 1; end < keep.size() && keep[end] == keep[begin];) ++end;
    if (keep[begin]) runs.push_back(evaluator.select(x, begin, end));
  }
  return runs.size() == 1 ? runs[0] : evaluator.concatenate(runs, true);
}

constexpr std::size_t kNodesAtOnce = 8;  // threads have work, and little more than the result is alive

// Ciphertexts on the way from all numbers to each alone. The one at `held[j]` holds, at their places, the numbers that
// leave the remainder held[j] modulo `parted`, times that.
struct Nodes {
  TensorPtr tensor;
  std::size_t parted = 1;
  std::vector<std::size_t> held = {0};
  // Standard deviation of the error that stands at the number's place, which doubles with it, and of one that stands
  // between the places, which is spread: sum and difference of two that have nothing to do with each other.
  std::vector<double> own, between;
};

// The nodes of `wanted` modulo twice as much. Of the `count` numbers at `places` places.
Nodes part(const Evaluator& evaluator, const Nodes& nodes, const std::vector<std::size_t>& wanted, std::size_t count,
           std::size_t places) {
  const std::size_t n = evaluator.parameters()->n(), parted = nodes.parted, width = nodes.held.size();
  const double slots = static_cast<double>(evaluator.parameters()->slots());
  const double switched =
      std::hypot(evaluator.switch_noise(nodes.tensor->limbs()), evaluator.rounding_noise()) / std::sqrt(slots);
  Nodes next{nullptr, 2 * parted, remainders(wanted, 2 * parted), {}, {}};
  const auto place = [&](std::size_t number) {  // of the first that is not below it
    return static_cast<std::size_t>(std::lower_bound(next.held.begin(), next.held.end(), number) - next.held.begin());
  };
  // The first `both` have numbers of either kind to part; in the others the odd ones would be beyond `count`.
  const auto both = static_cast<std::size_t>(
      std::lower_bound(nodes.held.begin(), nodes.held.end(), count > parted ? count - parted : 0) - nodes.held.begin());
  for (const std::size_t number : next.held) {
    const auto from = static_cast<std::size_t>(std::lower_bound(nodes.held.begin(), nodes.held.end(), number % parted) -
                                               nodes.held.begin());
    const double added = from < both ? switched : 0;
    next.own.push_back(std::hypot(2 * nodes.own[from], added));
    next.between.push_back(std::hypot((from < both ? std::sqrt(2.0) : 2.0) * nodes.between[from], added));
  }
  Evaluator::Assembly assembly(evaluator, *nodes.tensor, next.held.size(), nodes.tensor->level);
  const std::size_t step = std::max(evaluator.batch(*nodes.tensor), kNodesAtOnce);
  for (std::size_t begin = 0, end; begin < both; begin = end) {
    end = std::min(begin + step, both);
    const TensorPtr some = evaluator.select(nodes.tensor, begin, end);
    const TensorPtr turned = evaluator.automorphism(some, static_cast<std::uint32_t>(places / parted + 1));
    for (const std::size_t shift : {std::size_t{0}, parted}) {
      std::vector<bool> keep;
      for (std::size_t j = begin; j < end; ++j) {
        keep.push_back(std::binary_search(next.held.begin(), next.held.end(), nodes.held[j] + shift));
      }
      if (std::find(keep.begin(), keep.end(), true) == keep.end()) continue;
      const TensorPtr from = gather(evaluator, some, keep), to = gather(evaluator, turned, keep);
      // X^-k is -X^(N - k).
      const TensorPtr child = shift == 0
                                  ? evaluator.add(from, to)
                                  : evaluator.multiply_monomial(evaluator.subtract(to, from), n - n / places * parted);
      assembly.put(child, place(nodes.held[begin] + shift), true);
    }
  }
  if (both < width) {
    const TensorPtr rest = evaluator.select(nodes.tensor, both, width);
    assembly.put(evaluator.add(rest, rest), place(nodes.held[both]), true);
  }
  next.tensor = assembly.finish(nodes.tensor->bound);
  return next;
}

}  // namespace

TensorPtr expand(const Evaluator& evaluator, const TensorPtr& x, std::size_t count,
                 const std::vector<std::size_t>& wanted) {
  const std::size_t n = evaluator.parameters()->n();
  if (x->features != 1 || count < 1 || count > n) {
    throw ckks::Error(std::to_string(count) + " packed numbers in " + std::to_string(x->features) +
                      " ciphertexts cannot be expanded: pass one ciphertext (select) of 1 to " + std::to_string(n));
  }
  if (wanted.empty() || wanted.back() >= count || !std::is_sorted(wanted.begin(), wanted.end())) {
    throw ckks::Error("the numbers to expand are not among the " + std::to_string(count) + " that are packed");
  }
  const std::size_t places = n / packed_place(n, count, 1).coefficient;
  Nodes nodes{x, 1, {0}, {x->noise[0]}, {x->noise[0]}};
  while (nodes.parted < places) nodes = part(evaluator, nodes, wanted, count, places);
  // In the real part of a slot: the number's own as it is, of each of the others the square root of a half.
  std::vector<double> noise;
  for (std::size_t f = 0; f < nodes.held.size(); ++f) {
    noise.push_back(std::hypot(nodes.own[f], nodes.between[f] * std::sqrt(static_cast<double>(n) / 2)));
  }
  return evaluator.reinterpret(evaluator.with_noise(nodes.tensor, noise, noise), 1 / static_cast<double>(places),
                               x->bound);
}

}  // namespace privtuner::circuits
