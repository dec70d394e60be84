#include "privtuner/circuits/polynomial.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "privtuner/math/parallel.hpp"

namespace privtuner::circuits {
namespace {

using ckks::Combination;
using ckks::Error;
using ckks::Evaluator;
using ckks::TensorPtr;
using Coefficients = std::vector<double>;

int log2_ceil(int n) {
  int bits = 0;
  while ((1 << bits) < n) ++bits;
  return bits;
}

int degree_of(const Coefficients& c) {
  int degree = static_cast<int>(c.size()) - 1;
  while (degree > 0 && c[static_cast<std::size_t>(degree)] == 0) --degree;
  return degree;
}

// Depth of the power T_i or x^i.
int power_depth(int i) { return log2_ceil(i); }

// p = quotient * B_giant + rest, B the basis.
void divide(Basis basis, const Coefficients& p, int giant, Coefficients& quotient, Coefficients& rest) {
  const int degree = degree_of(p);
  const auto at = [](int i) { return static_cast<std::size_t>(i); };
  rest.assign(p.begin(), p.begin() + giant);
  quotient.assign(at(degree - giant + 1), 0);
  quotient[0] = p[at(giant)];
  for (int j = 1; j <= degree - giant; ++j) {
    if (basis == Basis::power) {
      quotient[at(j)] = p[at(giant + j)];
    } else {  // T_(g + j) = 2 T_g T_j - T_(g - j)
      quotient[at(j)] = 2 * p[at(giant + j)];
      rest[at(giant - j)] -= p[at(giant + j)];
    }
  }
}

// How a polynomial is taken apart: the giant step to divide by, or 0 to sum its terms. `budget` is the depth allowed,
// `babies` the number of powers at hand (a power of two).
int split_at(const Coefficients& p, int babies, int budget) {
  const int degree = degree_of(p);
  bool summable = true;
  for (int i = 1; i <= degree; ++i) {
    if (p[static_cast<std::size_t>(i)] == 0) continue;
    const bool at_hand = i < babies || (i & (i - 1)) == 0;
    summable = summable && at_hand && power_depth(i) + 1 <= budget;
  }
  if (summable) return 0;
  int giant = 1;
  while (2 * giant <= degree) giant *= 2;
  return giant;
}

void add_power(std::set<int>& powers, Basis basis, int i) {
  if (i < 1 || !powers.insert(i).second || i == 1) return;
  const int high = (i + 1) / 2, low = i / 2;
  add_power(powers, basis, high);
  add_power(powers, basis, low);
  if (basis == Basis::chebyshev) add_power(powers, basis, high - low);
}

// Counts the products of an evaluation: those of the powers it needs and those of its divisions.
int count_products(Basis basis, const Coefficients& p, int babies, int budget, std::set<int>& powers) {
  const int giant = split_at(p, babies, budget);
  if (giant == 0) {
    for (int i = 1; i <= degree_of(p); ++i) {
      if (p[static_cast<std::size_t>(i)] != 0) add_power(powers, basis, i);
    }
    return 0;
  }
  add_power(powers, basis, giant);
  Coefficients quotient, rest;
  divide(basis, p, giant, quotient, rest);
  return 1 + count_products(basis, quotient, babies, budget - 1, powers) +
         count_products(basis, rest, babies, budget, powers);
}

// The depth a polynomial may take.
int budget_of(const Coefficients& p) { return std::max(1, log2_ceil(degree_of(p) + 1)); }

int best_babies(Basis basis, const std::vector<Coefficients>& all) {
  int best = 2, least = 1 << 30;
  for (int babies = 2; babies <= 32; babies *= 2) {
    std::set<int> powers;
    int products = 0;
    for (const Coefficients& p : all) products += count_products(basis, p, babies, budget_of(p), powers);
    products += static_cast<int>(powers.size()) - static_cast<int>(powers.count(1));
    if (products < least) {
      least = products;
      best = babies;
    }
  }
  return best;
}

// Evaluations at one tensor, which share its powers.
class Evaluation {
 public:
  Evaluation(const Evaluator& evaluator, Basis basis, TensorPtr x)
      : evaluator_(evaluator), basis_(basis), features_(x->features) {
    powers_[1] = std::move(x);
  }

  std::vector<TensorPtr> run(const std::vector<Coefficients>& all) {
    babies_ = best_babies(basis_, all);
    std::vector<TensorPtr> values;
    for (const Coefficients& p : all) {
      const int level = powers_[1]->level - budget_of(p);
      const std::vector<double> scale(features_, evaluator_.parameters()->scale(level));
      values.push_back(rescaled(p, budget_of(p), level, scale));
    }
    return values;
  }

 private:
  double prime(int level) const {
    const auto& parameters = *evaluator_.parameters();
    return static_cast<double>(parameters.prime(parameters.limbs(level) - 1).q);
  }

  // B_i: T_(a+b) = 2 T_a T_b - T_(a-b), x^(a+b) = x^a x^b.
  const TensorPtr& power(int i) {
    const auto found = powers_.find(i);
    if (found != powers_.end()) return found->second;
    const TensorPtr a = power((i + 1) / 2), b = power(i / 2);
    const int level = std::min(a->level, b->level), difference = i % 2;
    const double factor = basis_ == Basis::chebyshev ? 2 : 1;
    const double wanted = evaluator_.parameters()->scale(level - 1) * prime(level);
    // Whole multiples bring a product that is too small up to the chain's scale.
    std::vector<double> multipliers(features_), subtrahend(features_);
    for (std::size_t f = 0; f < features_; ++f) {
      const double scale = a->scale[f] * b->scale[f];
      multipliers[f] = factor * std::max(1.0, std::nearbyint(wanted / scale));
      const double lower = difference == 0 ? 1 : power(difference)->scale[f];
      subtrahend[f] = -std::nearbyint(multipliers[f] / factor * scale / lower);
    }
    Combination addend;
    if (basis_ == Basis::chebyshev && difference == 0) addend.constants = subtrahend;
    if (basis_ == Basis::chebyshev && difference != 0) addend = {{power(difference)}, {subtrahend}, {}};
    const double bound = basis_ == Basis::chebyshev ? 1 : a->bound * b->bound;
    TensorPtr product = evaluator_.multiply_add(a, b, multipliers, addend, level, bound);
    return powers_[i] = evaluator_.reinterpret(product, factor, bound);  // 2 T_a T_b is the value, not T_a T_b
  }

  double bound_of(const Coefficients& p) {
    double sum = 0;
    for (int i = 0; i <= degree_of(p); ++i) {
      const double power = basis_ == Basis::chebyshev ? 1 : std::pow(powers_[1]->bound, i);
      sum += std::fabs(p[static_cast<std::size_t>(i)]) * power;
    }
    return std::max(sum, 1e-30);
  }

  // sum of p's terms, as raw integers of value scale `scale`.
  Combination terms(const Coefficients& p, const std::vector<double>& scale) {
    Combination sum;
    for (int i = 1; i <= degree_of(p); ++i) {
      const double c = p[static_cast<std::size_t>(i)];
      if (c == 0) continue;
      const TensorPtr& b = power(i);
      std::vector<double> weights(features_);
      for (std::size_t f = 0; f < features_; ++f) weights[f] = std::nearbyint(c * scale[f] / b->scale[f]);
      sum.tensors.push_back(b);
      sum.weights.push_back(std::move(weights));
    }
    for (std::size_t f = 0; f < features_; ++f) sum.constants.push_back(std::nearbyint(p[0] * scale[f]));
    if (sum.tensors.empty()) {  // a constant still has to be a ciphertext
      sum.tensors.push_back(powers_[1]);
      sum.weights.emplace_back(features_, 0.0);
    }
    return sum;
  }

  // p at `level` with value scale `scale`; budget: the depth it may take.
  TensorPtr rescaled(const Coefficients& p, int budget, int level, const std::vector<double>& scale) {
    std::vector<double> raw(scale);
    for (double& value : raw) value *= prime(level + 1);
    const int giant = split_at(p, babies_, budget);
    if (giant == 0) return evaluator_.combine(terms(p, raw), level + 1, raw, bound_of(p), true);
    // quotient * B_giant + rest, all at the raw scale, one relinearisation and one rescale. The rest is divided in turn
    // until what is left can be summed; all its products are rescaled on their own.
    Coefficients quotient, rest;
    divide(basis_, p, giant, quotient, rest);
    const TensorPtr b = power(giant);
    std::vector<double> quotient_scale(features_);
    for (std::size_t f = 0; f < features_; ++f) quotient_scale[f] = raw[f] / b->scale[f];
    const TensorPtr q = rescaled(quotient, budget - 1, level + 1, quotient_scale);
    const bool summable = split_at(rest, babies_, budget) == 0;
    const Combination addend = summable ? terms(rest, raw) : Combination{};
    const TensorPtr product =
        evaluator_.multiply_add(q, b, {}, addend, level + 1, summable ? bound_of(p) : bound_of(quotient));
    if (summable) return product;
    return evaluator_.assume(evaluator_.add(product, rescaled(rest, budget, level, scale)), bound_of(p));
  }

  const Evaluator& evaluator_;
  Basis basis_;
  std::size_t features_;
  int babies_ = 2;
  std::map<int, TensorPtr> powers_;
};

// max |p'| over the domain, by its values on a grid: what the input's error is multiplied by.
double steepest(const Polynomial& p) {
  constexpr int kPoints = 1025;
  const auto value = [&](double x) {
    double result = 0;
    const double u = (2 * x - p.low - p.high) / (p.high - p.low);
    double previous = 0, before = 0;  // Clenshaw
    for (std::size_t i = p.coefficients.size(); i-- > 0;) {
      if (p.basis == Basis::power) {
        result = result * x + p.coefficients[i];
      } else {
        result = i == 0 ? p.coefficients[0] + u * previous - before : p.coefficients[i] + 2 * u * previous - before;
        before = previous;
        previous = result;
      }
    }
    return result;
  };
  double steepness = 0;
  const double step = (p.high - p.low) / (kPoints - 1);
  for (int i = 0; i + 1 < kPoints; ++i) {
    const double x = p.low + i * step;
    steepness = std::max(steepness, std::fabs(value(x + step) - value(x)) / step);
  }
  return steepness * 1.05;  // the steepest point may lie between the grid's
}

double half_width(const Polynomial& p) { return p.basis == Basis::chebyshev ? (p.high - p.low) / 2 : 1; }

std::vector<TensorPtr> evaluate_part(const Evaluator& evaluator, TensorPtr x, const std::vector<Polynomial>& all,
                                     const std::vector<double>& slopes, bool normalise) {
  const std::size_t features = x->features;
  const Polynomial& p = all[0];  // for basis and domain
  if (normalise) {
    // Near the wanted scale is enough: the factor is whole, so the scale it gives is known exactly.
    const auto& parameters = *evaluator.parameters();
    const double wanted = parameters.scale(x->level - 1) / std::max(1.0, half_width(p));
    const double prime = static_cast<double>(parameters.prime(parameters.limbs(x->level) - 1).q);
    Combination factors{{x}, {std::vector<double>(features)}, {}, true};
    std::vector<double> raw(features);
    for (std::size_t f = 0; f < features; ++f) {
      factors.weights[0][f] = std::max(1.0, std::nearbyint(wanted * prime / x->scale[f]));
      raw[f] = factors.weights[0][f] * x->scale[f];
    }
    x = evaluator.combine(factors, x->level, raw, x->bound, true);
  }
  // The input's error is carried by the derivative, the others' by the evaluation from an exact input.
  const TensorPtr input = x;
  x = evaluator.with_noise(x, std::vector<double>(features, 0), std::vector<double>(features, 0));
  if (p.basis == Basis::chebyshev) {
    const double centre = (p.low + p.high) / 2;
    if (centre != 0) x = evaluator.add_constant(x, {-centre});
    x = evaluator.reinterpret(x, 1 / half_width(p), 1);
  }
  std::vector<Coefficients> coefficients;
  for (const Polynomial& each : all) coefficients.push_back(each.coefficients);
  std::vector<TensorPtr> values = Evaluation(evaluator, p.basis, x).run(coefficients);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::vector<double> noise(features), shared(features);
    for (std::size_t f = 0; f < features; ++f) {
      const double carried = slopes[i] * values[i]->scale[f] / input->scale[f];
      noise[f] = std::hypot(values[i]->noise[f], carried * input->noise[f]);
      shared[f] = carried * input->shared[f];
    }
    values[i] = evaluator.with_noise(values[i], noise, shared);
  }
  return values;
}

}  // namespace

void Polynomial::check() const {
  if (coefficients.empty()) throw std::invalid_argument("a polynomial needs at least one coefficient");
  for (const double c : coefficients) {
    if (!std::isfinite(c)) throw std::invalid_argument("a coefficient is NaN or infinity");
  }
  if (degree() > kMaxDegree) {
    throw std::invalid_argument("degree " + std::to_string(degree()) + " is above " + std::to_string(kMaxDegree));
  }
  if (!(low < high) || !std::isfinite(low) || !std::isfinite(high)) {
    throw std::invalid_argument("domain [" + std::to_string(low) + ", " + std::to_string(high) + "] is empty");
  }
}

int Polynomial::degree() const { return degree_of(coefficients); }
int Polynomial::depth() const { return log2_ceil(degree() + 1); }

int levels_needed(const ckks::Tensor& x, const Polynomial& p) {
  const double widest = *std::max_element(x.scale.begin(), x.scale.end());
  // Every squaring squares what the scale has beyond the chain's: the highest power shall have two bits at the most.
  const double slack = std::exp2(std::min(1.0, std::exp2(2 - p.depth())));
  const bool too_large = widest * std::max(1.0, half_width(p)) > slack * x.parameters->scale(x.level);
  return std::max(1, p.depth()) + (too_large ? 1 : 0);
}

TensorPtr evaluate(const Evaluator& evaluator, const TensorPtr& x, const Polynomial& polynomial) {
  return evaluate_all(evaluator, x, {polynomial})[0];
}

std::vector<TensorPtr> evaluate_all(const Evaluator& evaluator, const TensorPtr& x,
                                    const std::vector<Polynomial>& polynomials) {
  if (polynomials.empty()) throw Error("no polynomials to evaluate; pass at least one");
  const Polynomial& first = polynomials[0];
  first.check();
  const double reach = std::max(std::fabs(first.low), std::fabs(first.high));
  if (x->bound > reach * (1 + 1e-9)) {
    throw Error(
        "values up to " + std::to_string(x->bound) + " may leave the domain [" + std::to_string(first.low) + ", " +
        std::to_string(first.high) +
        "] of the approximation; declare a smaller bound (assume) if you know it holds, or fit on a wider domain");
  }
  bool normalise = false;
  std::vector<double> slopes;
  for (const Polynomial& polynomial : polynomials) {
    polynomial.check();
    if (polynomial.basis != first.basis || polynomial.low != first.low || polynomial.high != first.high) {
      throw Error("polynomials of different bases or domains share no powers; evaluate them one by one");
    }
    normalise = normalise || levels_needed(*x, polynomial) > std::max(1, polynomial.depth());
    slopes.push_back(steepest(polynomial));
  }
  for (const Polynomial& polynomial : polynomials) {
    const int levels = std::max(1, polynomial.depth()) + (normalise ? 1 : 0);
    if (levels <= x->level) continue;
    throw Error("a polynomial of degree " + std::to_string(polynomial.degree()) + " takes " + std::to_string(levels) +
                " levels here and the tensor has " + std::to_string(x->level) +
                "; choose parameters of larger depth or a smaller degree");
  }
  // Feature by feature: the powers of one fit the caches, those of all would not fit the memory.
  const std::size_t batch = evaluator.batch(*x), count = (x->features + batch - 1) / batch;
  if (count == 1) return evaluate_part(evaluator, x, polynomials, slopes, normalise);
  std::vector<std::vector<TensorPtr>> parts(polynomials.size(), std::vector<TensorPtr>(count));
  // A planned tensor is one chunk: nothing to share out, and the same memory at every run.
  math::parallel_for(count, x->planned ? count : 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const TensorPtr part = evaluator.select(x, i * batch, std::min((i + 1) * batch, x->features));
      const std::vector<TensorPtr> values = evaluate_part(evaluator, part, polynomials, slopes, normalise);
      for (std::size_t p = 0; p < values.size(); ++p) parts[p][i] = values[p];
    }
  });
  std::vector<TensorPtr> whole;
  for (const std::vector<TensorPtr>& each : parts) whole.push_back(evaluator.concatenate(each, true));
  return whole;
}

}  // namespace privtuner::circuits
