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

// The features of x at these places, rising: x itself, a view where they are neighbours, else a copy.
TensorPtr gather(const Evaluator& evaluator, const TensorPtr& x, const std::vector<std::size_t>& places) {
  std::vector<TensorPtr> runs;
  for (std::size_t begin = 0, end; begin < places.size(); begin = end) {
    for (end = begin + 1; end < places.size() && places[end] == places[end - 1] + 1;) ++end;
    runs.push_back(evaluator.select(x, places[begin], places[end - 1] + 1));
  }
  return runs.size() == 1 ? runs[0] : evaluator.concatenate(runs, true);
}

// Error of a slot of a number, in units of the scale before it is taken out. Of an input error of `coefficient` in each
// of N coefficients, the sum of `count` automorphisms leaves the number's own, `count` times, in the constant; what
// stands between the places is spread, not doubled: sqrt(count) times it in each coefficient, and a slot's real part
// has sqrt(N / 2) times that. A key switch after which `rest` numbers are still to be parted is an input to those.
double expanded_noise(double n, double count, double coefficient, double switched) {
  const auto square = [&](double rest, double error) {
    return error * error * (rest * rest + rest * (n - rest) / 2);
  };
  double sum = square(count, coefficient);
  for (double rest = count / 2; rest >= 1; rest /= 2) sum += square(rest, switched / std::sqrt(n / 2));
  return std::sqrt(sum);
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
  TensorPtr nodes = x;
  std::vector<std::size_t> held = {0};
  // `held` are remainders modulo `parted`; they part into themselves and themselves + parted, modulo twice that.
  for (std::size_t parted = 1; parted < places; parted *= 2) {
    const std::vector<std::size_t> next = remainders(wanted, 2 * parted);
    std::vector<std::size_t> even, odd;
    for (const std::size_t number : next) {
      const auto at = std::lower_bound(held.begin(), held.end(), number % parted) - held.begin();
      (number < parted ? even : odd).push_back(static_cast<std::size_t>(at));
    }
    const TensorPtr turned = evaluator.automorphism(nodes, static_cast<std::uint32_t>(places / parted + 1));
    std::vector<TensorPtr> parts;
    if (!even.empty()) {
      parts.push_back(evaluator.add(gather(evaluator, nodes, even), gather(evaluator, turned, even)));
    }
    if (!odd.empty()) {  // X^-k is -X^(N - k)
      const TensorPtr difference = evaluator.subtract(gather(evaluator, turned, odd), gather(evaluator, nodes, odd));
      parts.push_back(evaluator.multiply_monomial(difference, n - n / places * parted));
    }
    nodes = parts.size() == 1 ? parts[0] : evaluator.concatenate(parts, true);
    held = next;
  }
  const double switched = std::hypot(evaluator.switch_noise(x->limbs()), evaluator.rounding_noise());
  const double noise = expanded_noise(static_cast<double>(n), static_cast<double>(places), x->noise[0], switched);
  const std::vector<double> all(nodes->features, noise);
  return evaluator.reinterpret(evaluator.with_noise(nodes, all, all), 1 / static_cast<double>(places), x->bound);
}

}  // namespace privtuner::circuits
