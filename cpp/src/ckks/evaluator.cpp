#include "privtuner/ckks/evaluator.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>

#include "evaluator_work.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::ckks {
namespace {

constexpr double kSameScale = 1e-9;   // relative; scales that agree differ by roundings of doubles
constexpr double kLeastFactor = 4096;  // smallest scale of an encoded constant: 12 bits of it survive

// One feature uses all threads inside, many features one thread each.
void for_features(std::size_t count, const std::function<void(std::size_t)>& body) {
  if (count == 1) return body(0);
  math::parallel_for(count, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t f = begin; f < end; ++f) body(f);
  });
}

std::string bits(double scale) { return "2^" + std::to_string(std::log2(scale)); }

std::string describe(const Tensor& x) {
  return "(" + std::to_string(x.tokens) + ", " + std::to_string(x.features) + ") at level " + std::to_string(x.level);
}

bool same(double a, double b) { return std::fabs(a - b) <= kSameScale * b; }

double norm(double a, double b) { return std::sqrt(a * a + b * b); }

std::vector<double> per_feature(const std::vector<double>& values, std::size_t features, const char* what) {
  if (values.size() == features) return values;
  if (values.size() == 1) return std::vector<double>(features, values[0]);
  throw Error(std::to_string(values.size()) + " " + what + " for " + std::to_string(features) +
              " features; pass one, or one a feature");
}

std::string missing_key(const Parameters& parameters, std::uint32_t element) {
  if (element == conjugation_element(parameters)) return "conjugation needs its key; make evaluation keys with conjugation";
  for (std::size_t step = 1; step < parameters.slots(); ++step) {
    if (galois_element(parameters, static_cast<long long>(step)) != element) continue;
    return "a rotation by " + std::to_string(step) + " needs its key; make evaluation keys with " +
           std::to_string(step) + " among the rotations (a plan lists what a circuit needs)";
  }
  return "the automorphism X -> X^" + std::to_string(element) + " needs its key; make evaluation keys with packing";
}

void require_finite(const std::vector<double>& values, const char* what) {
  for (const double value : values) {
    if (!std::isfinite(value)) throw Error(std::string(what) + " hold NaN or infinity");
  }
}

}  // namespace

const char* work_name(Work work) {
  constexpr const char* kNames[] = {"product", "relinearise", "decompose", "rotate",
                                    "rescale", "term",        "plain",     "matrix"};
  return kNames[static_cast<int>(work)];
}

void Trace::count(Work work, std::size_t limbs, double amount) {
  const std::lock_guard<std::mutex> lock(mutex_);
  work_[{work, limbs}] += amount;
}
void Trace::need_relinearisation() {
  const std::lock_guard<std::mutex> lock(mutex_);
  relinearisation_ = true;
}
void Trace::need_galois(std::uint32_t element) {
  const std::lock_guard<std::mutex> lock(mutex_);
  galois_.insert(element);
}
std::map<std::pair<Work, std::size_t>, double> Trace::work() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return work_;
}
bool Trace::relinearisation() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return relinearisation_;
}
std::set<std::uint32_t> Trace::galois() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return galois_;
}
void Trace::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  work_.clear();
  galois_.clear();
  relinearisation_ = false;
}

Matrix::Matrix(gemm::Weights weights, std::vector<double> delta)
    : weights_(std::move(weights)), delta_(std::move(delta)) {
  if (delta_.size() != weights_.rows()) {
    throw std::invalid_argument(std::to_string(delta_.size()) + " row scales for " + std::to_string(weights_.rows()) +
                                " rows");
  }
  for (const double value : delta_) {
    if (!(value > 0) || !std::isfinite(value)) {
      throw std::invalid_argument("row scale " + std::to_string(value) + " is not a positive number");
    }
  }
}

Evaluator::Evaluator(ParametersPtr parameters, std::shared_ptr<const EvaluationKeys> keys)
    : parameters_(std::move(parameters)), keys_(std::move(keys)), ledger_(std::make_shared<Ledger>()) {
  if (!keys_) return;
  if (keys_->parameters->hash() != parameters_->hash()) {
    throw Error("evaluation keys of " + keys_->parameters->name() + " do not fit " + parameters_->name());
  }
  for (const auto& entry : keys_->galois) {
    permutations_.emplace(entry.first, galois_permutation(*parameters_, entry.first));
  }
}

std::shared_ptr<Tensor> Evaluator::result(std::size_t tokens, std::size_t features, int level, bool planned) const {
  return std::make_shared<Tensor>(parameters_, tokens, features, level, planned, ledger_);
}

void Evaluator::check(const Tensor& x) const {
  if (x.parameters != parameters_ && x.parameters->hash() != parameters_->hash()) {
    throw Error("a tensor of " + x.parameters->name() + " does not fit an evaluator of " + parameters_->name());
  }
}

void Evaluator::check_pair(const Tensor& x, const Tensor& y) const {
  check(x);
  check(y);
  if (x.planned != y.planned) throw Error("a planned tensor cannot be combined with an encrypted one");
  if (x.tokens != y.tokens || (x.features != y.features && x.features != 1 && y.features != 1)) {
    throw Error("tensors of shapes (" + std::to_string(x.tokens) + ", " + std::to_string(x.features) + ") and (" +
                std::to_string(y.tokens) + ", " + std::to_string(y.features) +
                ") cannot be combined: tokens must agree, features too unless one has a single one");
  }
}

double Evaluator::rounding_noise() const {
  const double n = static_cast<double>(parameters_->n());
  return std::sqrt(n / 2 * (1 + n * kSecretVariance) / 12);
}

double Evaluator::switch_noise(std::size_t limbs) const {
  const double n = static_cast<double>(parameters_->n());
  double sum = 0;
  for (std::size_t d = 0; d < parameters_->digits(limbs); ++d) {
    double log_digit = 0;
    for (const std::size_t i : parameters_->digit_conversion(d, limbs).from) {
      log_digit += std::log2(static_cast<double>(parameters_->prime(i).q));
    }
    sum += std::exp2(2 * (log_digit - parameters_->log_special()));
  }
  return std::sqrt(n / 2 * n * kErrorVariance / 12 * sum);
}

TensorPtr Evaluator::reinterpret(const TensorPtr& x, double factor, double bound) const {
  check(*x);
  if (!(factor > 0) || !std::isfinite(factor)) throw Error("values cannot be read times " + std::to_string(factor));
  auto out = std::make_shared<Tensor>(*x);
  for (double& scale : out->scale) scale /= factor;
  out->bound = bound;
  return out;
}

TensorPtr Evaluator::assume(const TensorPtr& x, double bound) const {
  if (!(bound > 0) || !std::isfinite(bound)) throw Error("bound " + std::to_string(bound) + " is not a positive number");
  auto out = std::make_shared<Tensor>(*x);
  out->bound = bound;
  return out;
}

TensorPtr Evaluator::with_noise(const TensorPtr& x, const std::vector<double>& noise) const {
  auto out = std::make_shared<Tensor>(*x);
  out->noise = noise;
  return out;
}

TensorPtr Evaluator::select(const TensorPtr& x, std::size_t begin, std::size_t end) const {
  check(*x);
  if (begin >= end || end > x->features) {
    throw Error("features [" + std::to_string(begin) + ", " + std::to_string(end) + ") of " +
                std::to_string(x->features) + ": choose a range inside");
  }
  return std::make_shared<Tensor>(x->view(begin, end));
}

TensorPtr Evaluator::concatenate(const std::vector<TensorPtr>& tensors) const {
  if (tensors.empty()) throw Error("no tensors to concatenate; pass at least one");
  std::size_t features = 0;
  int level = parameters_->depth();
  double bound = 0;
  for (const TensorPtr& x : tensors) {
    check(*x);
    if (x->tokens != tensors[0]->tokens || x->planned != tensors[0]->planned) {
      throw Error("tensors of " + std::to_string(tensors[0]->tokens) + " and " + std::to_string(x->tokens) +
                  " tokens cannot be concatenated");
    }
    features += x->features;
    level = std::min(level, x->level);
    bound = std::max(bound, x->bound);
  }
  auto out = result(tensors[0]->tokens, features, level, tensors[0]->planned);
  out->bound = bound;
  std::size_t at = 0;
  for (const TensorPtr& x : tensors) {
    for (std::size_t f = 0; f < x->features; ++f, ++at) {
      out->scale[at] = x->scale[f];
      out->noise[at] = x->noise[f];
      for (int c = 0; c < 2 && !out->planned; ++c) {
        std::memcpy(out->row(at, c, 0), x->row(f, c, 0), out->limbs() * parameters_->n() * sizeof(std::uint64_t));
      }
    }
  }
  return out;
}

TensorPtr Evaluator::drop(const TensorPtr& x, int level) const {
  check(*x);
  if (level < 0 || level > x->level) {
    throw Error("a tensor at level " + std::to_string(x->level) + " cannot be brought to level " +
                std::to_string(level) + "; levels only go down to 0");
  }
  if (level == x->level) return x;
  auto out = result(x->tokens, x->features, level, x->planned);
  out->bound = x->bound;
  out->scale = x->scale;
  out->noise = x->noise;
  for (std::size_t f = 0; f < x->features && !x->planned; ++f) {
    for (int c = 0; c < 2; ++c) {
      std::memcpy(out->row(f, c, 0), x->row(f, c, 0), out->limbs() * parameters_->n() * sizeof(std::uint64_t));
    }
  }
  return out;
}

TensorPtr Evaluator::bring(const TensorPtr& x, int level, const std::vector<double>& scale) const {
  check(*x);
  if (level >= x->level) {
    throw Error("a tensor at level " + std::to_string(x->level) + " cannot change its scale at level " +
                std::to_string(level) + ": that takes a level; keep one more (a larger depth)");
  }
  const std::vector<double> wanted = per_feature(scale, x->features, "scales");
  const double q = static_cast<double>(parameters_->prime(parameters_->limbs(level)).q);
  Combination c{{x}, {std::vector<double>(x->features)}, {}};
  std::vector<double> raw(x->features);
  for (std::size_t f = 0; f < x->features; ++f) {
    const double factor = wanted[f] * q / x->scale[f];
    if (factor < kLeastFactor) {
      throw Error("scale " + bits(x->scale[f]) + " is too large to become " + bits(wanted[f]) +
                  " in one level; rescale first");
    }
    c.weights[0][f] = std::nearbyint(factor);
    raw[f] = wanted[f] * q;
  }
  return combine(c, level + 1, raw, x->bound, true);
}

std::pair<TensorPtr, TensorPtr> Evaluator::meet(TensorPtr x, TensorPtr y) const {
  const auto scales_of = [](const Tensor& from, std::size_t features) {
    return from.features == features ? from.scale : std::vector<double>(features, from.scale[0]);
  };
  const auto agree = [&] {
    const std::size_t features = std::max(x->features, y->features);
    const std::vector<double> a = scales_of(*x, features), b = scales_of(*y, features);
    for (std::size_t f = 0; f < features; ++f) {
      if (!same(a[f], b[f])) return false;
    }
    return true;
  };
  if (agree()) {
    const int level = std::min(x->level, y->level);
    return {drop(x, level), drop(y, level)};
  }
  TensorPtr& high = x->level > y->level ? x : y;
  const TensorPtr& low = x->level > y->level ? y : x;
  if (x->level != y->level && (low->features == 1 || low->features == high->features)) {
    high = bring(high, low->level, scales_of(*low, high->features));
    return {x, y};
  }
  throw Error("scales " + bits(x->scale[0]) + " and " + bits(y->scale[0]) + " do not agree at level " +
              std::to_string(std::min(x->level, y->level)) +
              "; multiply one of them by 1.0 first (that brings it to the chain's scale and takes a level)");
}

std::pair<TensorPtr, TensorPtr> Evaluator::meet_for_product(TensorPtr x, TensorPtr y) const {
  // A product of canonical scales shall have the canonical scale of its level.
  if (x->level == y->level) return {x, y};
  TensorPtr& high = x->level > y->level ? x : y;
  const int level = std::min(x->level, y->level);
  std::vector<double> scale = high->scale;
  for (double& value : scale) value *= parameters_->scale(level) / parameters_->scale(high->level);
  high = bring(high, level, scale);
  return {x, y};
}

TensorPtr Evaluator::add_rows(const TensorPtr& left, const TensorPtr& right, bool minus) const {
  check_pair(*left, *right);
  const auto [x, y] = meet(left, right);
  const std::size_t features = std::max(x->features, y->features), n = parameters_->n();
  auto out = result(x->tokens, features, x->level, x->planned);
  out->bound = x->bound + y->bound;
  const auto of = [](const Tensor& t, std::size_t f) { return t.features == 1 ? 0 : f; };
  for (std::size_t f = 0; f < features; ++f) {
    out->scale[f] = x->features >= y->features ? x->scale[f] : y->scale[f];
    out->noise[f] = x->noise[of(*x, f)] + y->noise[of(*y, f)];  // the two may come from one source
  }
  trace_.count(Work::term, x->limbs(), static_cast<double>(features));
  if (out->planned) return out;
  const math::Isa isa = math::active_isa();
  math::parallel_for(features * 2 * x->limbs(), 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t limb = i % x->limbs(), f = i / x->limbs() / 2;
      const int c = static_cast<int>(i / x->limbs() % 2);
      const ring::ResidueRow& row = parameters_->prime(limb).row;
      const std::uint64_t *a = x->row(of(*x, f), c, limb), *b = y->row(of(*y, f), c, limb);
      if (minus) {
        row.subtract(a, b, out->row(f, c, limb), n, isa);
      } else {
        row.add(a, b, out->row(f, c, limb), n, isa);
      }
    }
  });
  return out;
}

TensorPtr Evaluator::add(const TensorPtr& x, const TensorPtr& y) const { return add_rows(x, y, false); }
TensorPtr Evaluator::subtract(const TensorPtr& x, const TensorPtr& y) const { return add_rows(x, y, true); }

TensorPtr Evaluator::negate(const TensorPtr& x) const {
  check(*x);
  const Combination c{{x}, {std::vector<double>(x->features, -1)}, {}};
  return combine(c, x->level, x->scale, x->bound, false);
}

TensorPtr Evaluator::add_constant(const TensorPtr& x, const std::vector<double>& constants) const {
  check(*x);
  require_finite(constants, "constants");
  Combination c{{x}, {std::vector<double>(x->features, 1)}, per_feature(constants, x->features, "constants")};
  double largest = 0;
  for (std::size_t f = 0; f < x->features; ++f) {
    largest = std::max(largest, std::fabs(c.constants[f]));
    c.constants[f] = std::nearbyint(c.constants[f] * x->scale[f]);
  }
  return combine(c, x->level, x->scale, x->bound + largest, false);
}

TensorPtr Evaluator::multiply_constant(const TensorPtr& x, const std::vector<double>& constants) const {
  return linear_combination({x}, {constants}, {});
}

TensorPtr Evaluator::linear_combination(const std::vector<TensorPtr>& tensors,
                                        const std::vector<std::vector<double>>& weights,
                                        const std::vector<double>& constants) const {
  if (tensors.empty() || weights.size() != tensors.size()) {
    throw Error(std::to_string(weights.size()) + " rows of weights for " + std::to_string(tensors.size()) + " tensors");
  }
  std::size_t features = 1;
  int level = parameters_->depth();
  for (const TensorPtr& x : tensors) {
    check_pair(*x, *tensors[0]);
    features = std::max(features, x->features);
    level = std::min(level, x->level);
  }
  if (level < 1) {
    throw Error("a product with a constant needs a level and " + describe(*tensors[0]) +
                " has none left; choose parameters of larger depth");
  }
  const double q = static_cast<double>(parameters_->prime(parameters_->limbs(level) - 1).q);
  const double target = parameters_->scale(level - 1) * q;
  Combination c{tensors, {}, {}};
  double bound = 0;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    require_finite(weights[t], "weights");
    std::vector<double> row = per_feature(weights[t], features, "weights");
    double largest = 0;
    for (std::size_t f = 0; f < features; ++f) {
      const double factor = target / tensors[t]->scale[tensors[t]->features == 1 ? 0 : f];
      if (factor < kLeastFactor) {
        throw Error("scale " + bits(target / factor) + " leaves no room to encode a constant at level " +
                    std::to_string(level) + "; rescale first");
      }
      largest = std::max(largest, std::fabs(row[f]));
      row[f] = std::nearbyint(row[f] * factor);
    }
    c.weights.push_back(std::move(row));
    bound += largest * tensors[t]->bound;
  }
  if (!constants.empty()) {
    require_finite(constants, "constants");
    c.constants = per_feature(constants, features, "constants");
    double largest = 0;
    for (double& value : c.constants) {
      largest = std::max(largest, std::fabs(value));
      value = std::nearbyint(value * target);
    }
    bound += largest;
  }
  return combine(c, level, std::vector<double>(features, target), bound, true);
}

void Evaluator::combine_row(const Combination& c, std::size_t feature, int component, std::size_t limb,
                            std::uint64_t* accumulator) const {
  const ring::ResidueRow& row = parameters_->prime(limb).row;
  const std::size_t n = parameters_->n();
  const math::Isa isa = math::active_isa();
  std::vector<const std::uint64_t*> rows{accumulator};
  std::vector<std::uint64_t> weights{1};
  for (std::size_t t = 0; t < c.tensors.size(); ++t) {
    const Tensor& x = *c.tensors[t];
    const double weight = c.weights[t][feature];
    if (weight == 0) continue;
    rows.push_back(x.row(x.features == 1 ? 0 : feature, component, limb));
    weights.push_back(residue_of(weight, row.modulus()));
  }
  if (rows.size() > 1) row.linear_combination(rows.data(), weights.data(), rows.size(), accumulator, n, isa);
  if (component == 0 && !c.constants.empty() && c.constants[feature] != 0) {
    row.add_scalar(accumulator, residue_of(c.constants[feature], row.modulus()), accumulator, n, isa);
  }
}

TensorPtr Evaluator::combine(const Combination& c, int level, const std::vector<double>& scale, double bound,
                             bool rescaled) const {
  const std::size_t features = scale.size(), n = parameters_->n(), limbs = parameters_->limbs(level);
  if (rescaled && level < 1) throw Error("no level left to rescale; choose parameters of larger depth");
  const Tensor& first = *c.tensors.at(0);
  auto out = result(first.tokens, features, rescaled ? level - 1 : level, first.planned);
  out->bound = bound;
  const double q = rescaled ? static_cast<double>(parameters_->prime(limbs - 1).q) : 1;
  for (std::size_t f = 0; f < features; ++f) {
    double noise = 0;
    for (std::size_t t = 0; t < c.tensors.size(); ++t) {
      const Tensor& x = *c.tensors[t];
      const std::size_t g = x.features == 1 ? 0 : f;
      noise += std::fabs(c.weights[t][f]) * x.noise[g];
      if (rescaled) noise += 0.3 * x.bound * x.scale[g];  // the weight is rounded: 1 / sqrt(12) of the raw value
    }
    out->scale[f] = scale[f] / q;
    out->noise[f] = rescaled ? norm(noise / q, rounding_noise()) : noise;
  }
  trace_.count(Work::term, limbs, static_cast<double>(features * std::max<std::size_t>(1, c.tensors.size())));
  if (rescaled) trace_.count(Work::rescale, limbs, static_cast<double>(features));
  if (out->planned) return out;
  for_features(features, [&](std::size_t f) {
    Scratch sums(*this, rescaled ? limbs * n : 0);
    for (int component = 0; component < 2; ++component) {
      std::uint64_t* rows = rescaled ? sums.data() : out->row(f, component, 0);
      math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
          std::memset(rows + i * n, 0, n * sizeof(std::uint64_t));
          combine_row(c, f, component, i, rows + i * n);
        }
      });
      if (rescaled) divide(rows, parameters_->last_conversion(limbs), limbs, limbs - 1, out->row(f, component, 0));
    }
  });
  return out;
}

TensorPtr Evaluator::rescale(const TensorPtr& x) const {
  check(*x);
  if (x->level < 1) throw Error("a tensor at level 0 cannot be rescaled; choose parameters of larger depth");
  const Combination c{{x}, {std::vector<double>(x->features, 1)}, {}};
  return combine(c, x->level, x->scale, x->bound, true);
}

TensorPtr Evaluator::multiply_plain(const TensorPtr& x, const Values& values) const {
  check(*x);
  if (x->level < 1) throw Error("a product with clear values needs a level and " + describe(*x) + " has none left");
  if (values.tokens != x->tokens || (values.features != x->features && values.features != 1)) {
    throw Error("clear values of shape (" + std::to_string(values.tokens) + ", " + std::to_string(values.features) +
                ") do not fit a tensor of shape (" + std::to_string(x->tokens) + ", " + std::to_string(x->features) +
                ")");
  }
  const std::size_t n = parameters_->n(), limbs = x->limbs();
  const double q = static_cast<double>(parameters_->prime(limbs - 1).q), target = parameters_->scale(x->level - 1) * q;
  double largest = 0;
  for (std::size_t t = 0; t < values.tokens; ++t) {
    for (std::size_t f = 0; f < values.features; ++f) {
      const auto at = static_cast<std::ptrdiff_t>(t) * values.token_stride +
                      static_cast<std::ptrdiff_t>(f) * values.feature_stride;
      const double value = values.im == nullptr ? std::fabs(values.re[at]) : std::hypot(values.re[at], values.im[at]);
      if (!std::isfinite(value)) throw Error("clear values hold NaN or infinity");
      largest = std::max(largest, value);
    }
  }
  auto out = result(x->tokens, x->features, x->level - 1, x->planned);
  out->bound = x->bound * largest;
  const double encoding = std::sqrt(static_cast<double>(n) / 24);  // rounding of N coefficients, in a slot's real part
  for (std::size_t f = 0; f < x->features; ++f) {
    const double factor = target / x->scale[f];
    out->scale[f] = target / q;
    out->noise[f] = norm((largest * factor * x->noise[f] + x->bound * x->scale[f] * encoding) / q, rounding_noise());
  }
  trace_.count(Work::plain, limbs, static_cast<double>(x->features));
  trace_.count(Work::rescale, limbs, static_cast<double>(x->features));
  if (out->planned) return out;
  for_features(x->features, [&](std::size_t f) {
    math::SecretBuffer<std::int64_t> coefficients(n);
    Scratch plain(*this, limbs * n), product(*this, limbs * n);
    encode(*parameters_, values, values.features == 1 ? 0 : f, target / x->scale[f], coefficients.data());
    math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) to_row(*parameters_, i, coefficients.data(), plain.data() + i * n);
    });
    for (int component = 0; component < 2; ++component) {
      for (std::size_t i = 0; i < limbs; ++i) {
        parameters_->prime(i).row.multiply(x->row(f, component, i), plain.data() + i * n, product.data() + i * n, n,
                                           math::active_isa());
      }
      divide(product.data(), parameters_->last_conversion(limbs), limbs, limbs - 1, out->row(f, component, 0));
    }
  });
  return out;
}

TensorPtr Evaluator::multiply(const TensorPtr& left, const TensorPtr& right) const {
  check_pair(*left, *right);
  const auto [x, y] = meet_for_product(left, right);
  return products(x, y, false, {}, {}, x->level, x->bound * y->bound);
}

TensorPtr Evaluator::dot(const TensorPtr& left, const TensorPtr& right) const {
  check_pair(*left, *right);
  if (left->features != right->features) {
    throw Error("a dot product of " + std::to_string(left->features) + " and " + std::to_string(right->features) +
                " features; both must have as many");
  }
  const auto [x, y] = meet_for_product(left, right);
  for (std::size_t f = 1; f < x->features; ++f) {
    if (!same(x->scale[f] * y->scale[f], x->scale[0] * y->scale[0])) {
      throw Error("the features of a dot product have different scales; multiply by 1.0 first (takes a level)");
    }
  }
  return products(x, y, true, {}, {}, x->level, x->bound * y->bound * static_cast<double>(x->features));
}

TensorPtr Evaluator::multiply_add(const TensorPtr& x, const TensorPtr& y, const std::vector<double>& multipliers,
                                  const Combination& addend, int level, double bound) const {
  check_pair(*x, *y);
  return products(x, y, false, multipliers, addend, level, bound);
}

TensorPtr Evaluator::products(const TensorPtr& x, const TensorPtr& y, bool summed,
                              const std::vector<double>& multipliers, const Combination& addend, int level,
                              double bound) const {
  if (level < 1) {
    throw Error("a product needs a level and tensors " + describe(*x) + " and " + describe(*y) +
                " leave none; choose parameters of larger depth");
  }
  const std::size_t features = summed ? 1 : std::max(x->features, y->features), n = parameters_->n();
  const std::size_t limbs = parameters_->limbs(level), targets = limbs + parameters_->special_count();
  const double q = static_cast<double>(parameters_->prime(limbs - 1).q);
  const auto of = [](const Tensor& t, std::size_t f) { return t.features == 1 ? 0 : f; };
  const auto multiplier = [&](std::size_t f) { return multipliers.empty() ? 1.0 : multipliers[f]; };

  auto out = result(x->tokens, features, level - 1, x->planned);
  out->bound = bound;
  const std::size_t terms = summed ? x->features : 1;
  for (std::size_t f = 0; f < features; ++f) {
    double square = 0;  // errors of different features are independent
    for (std::size_t t = 0; t < terms; ++t) {
      const std::size_t i = of(*x, summed ? t : f), j = of(*y, summed ? t : f);
      const double error = x->bound * x->scale[i] * y->noise[j] + y->bound * y->scale[j] * x->noise[i] +
                           x->noise[i] * y->noise[j];
      square += error * error;
    }
    double noise = multiplier(f) * std::sqrt(square);
    for (std::size_t t = 0; t < addend.tensors.size(); ++t) {
      const Tensor& a = *addend.tensors[t];
      noise += std::fabs(addend.weights[t][f]) * a.noise[of(a, f)] + 0.3 * a.bound * a.scale[of(a, f)];
    }
    out->scale[f] = x->scale[of(*x, f)] * y->scale[of(*y, f)] * multiplier(f) / q;
    out->noise[f] = norm(norm(noise, switch_noise(limbs)) / q, rounding_noise());
  }
  trace_.count(Work::product, limbs, static_cast<double>(features * terms));
  trace_.count(Work::relinearise, limbs, static_cast<double>(features));
  if (!addend.tensors.empty()) {
    trace_.count(Work::term, limbs, static_cast<double>(features * addend.tensors.size()));
  }
  trace_.need_relinearisation();
  if (out->planned) return out;
  if (!keys_ || !keys_->relinearisation) {
    throw Error("a product of ciphertexts needs the relinearisation key; make evaluation keys with it");
  }

  for_features(features, [&](std::size_t f) {
    Scratch degree(*this, 3 * limbs * n), scaled(*this, limbs * n), quotients(*this, parameters_->digits(limbs) * n);
    Scratch sums(*this, 2 * targets * n);
    std::uint64_t *d0 = degree.data(), *d1 = d0 + limbs * n, *d2 = d1 + limbs * n;
    const math::Isa isa = math::active_isa();
    math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
      std::vector<const std::uint64_t*> a(2 * terms), b(2 * terms);
      const auto fill = [&](std::size_t offset, int ca, int cb, std::size_t limb) {
        for (std::size_t t = 0; t < terms; ++t) {
          a[offset + t] = x->row(of(*x, summed ? t : f), ca, limb);
          b[offset + t] = y->row(of(*y, summed ? t : f), cb, limb);
        }
      };
      for (std::size_t i = begin; i < end; ++i) {
        const ring::ResidueRow& row = parameters_->prime(i).row;
        fill(0, 0, 0, i);
        row.inner_product(a.data(), b.data(), terms, d0 + i * n, n, isa);
        fill(0, 1, 1, i);
        row.inner_product(a.data(), b.data(), terms, d2 + i * n, n, isa);
        fill(0, 0, 1, i);
        fill(terms, 1, 0, i);
        row.inner_product(a.data(), b.data(), 2 * terms, d1 + i * n, n, isa);
        if (multiplier(f) != 1) {
          const std::uint64_t w = residue_of(multiplier(f), row.modulus());
          for (std::uint64_t* d : {d0, d1, d2}) row.multiply_scalar(d + i * n, w, d + i * n, n, isa);
        }
        combine_row(addend, f, 0, i, d0 + i * n);
        combine_row(addend, f, 1, i, d1 + i * n);
      }
    });
    Decomposition decomposition{nullptr, 0, scaled.data(), quotients.data()};
    decompose(d2, limbs, decomposition);
    std::uint64_t *sum0 = sums.data(), *sum1 = sum0 + targets * n;
    switch_key(decomposition, nullptr, *keys_->relinearisation, sum0, sum1);
    // P d + switched, divided by P and the last prime at once.
    math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        const std::uint64_t weights[2] = {1, parameters_->special_product(i)};
        for (int c = 0; c < 2; ++c) {
          std::uint64_t* sum = (c == 0 ? sum0 : sum1) + i * n;
          const std::uint64_t* rows[2] = {sum, (c == 0 ? d0 : d1) + i * n};
          parameters_->prime(i).row.linear_combination(rows, weights, 2, sum, n, isa);
        }
      }
    });
    const BaseConversion& conversion = parameters_->special_conversion(limbs, true);
    divide(sum0, conversion, limbs, limbs - 1, out->row(f, 0, 0));
    divide(sum1, conversion, limbs, limbs - 1, out->row(f, 1, 0));
  });
  return out;
}

TensorPtr Evaluator::sum_features(const TensorPtr& x) const {
  check(*x);
  auto out = result(x->tokens, 1, x->level, x->planned);
  double square = 0;
  for (std::size_t f = 0; f < x->features; ++f) {
    if (!same(x->scale[f], x->scale[0])) {
      throw Error("the features to sum have different scales; multiply by 1.0 first (takes a level)");
    }
    square += x->noise[f] * x->noise[f];
  }
  out->scale[0] = x->scale[0];
  out->noise[0] = std::sqrt(square);
  out->bound = x->bound * static_cast<double>(x->features);
  trace_.count(Work::term, x->limbs(), static_cast<double>(x->features));
  if (x->planned) return out;
  const std::size_t n = parameters_->n();
  math::parallel_for(2 * x->limbs(), 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t limb = i % x->limbs();
      const int c = static_cast<int>(i / x->limbs());
      std::uint64_t* sum = out->row(0, c, limb);
      std::memset(sum, 0, n * sizeof(std::uint64_t));
      for (std::size_t f = 0; f < x->features;) {
        std::vector<const std::uint64_t*> rows{sum};
        for (; f < x->features && rows.size() < ring::kMaxTerms; ++f) rows.push_back(x->row(f, c, limb));
        const std::vector<std::uint64_t> ones(rows.size(), 1);
        parameters_->prime(limb).row.linear_combination(rows.data(), ones.data(), rows.size(), sum, n,
                                                        math::active_isa());
      }
    }
  });
  return out;
}

TensorPtr Evaluator::linear(const TensorPtr& x, const Matrix& matrix, gemm::Operand operand) const {
  check(*x);
  const bool plain = operand == gemm::Operand::plain;
  const std::size_t depth = plain ? matrix.cols() : matrix.rows(), rows = plain ? matrix.rows() : matrix.cols();
  if (x->features != depth) {
    throw Error("a matrix of shape (" + std::to_string(rows) + ", " + std::to_string(depth) +
                ") cannot be applied to a tensor of " + std::to_string(x->features) + " features");
  }
  const gemm::Weights& weights = matrix.weights();
  // values_out[r] = sum_j integers * raw[j] / scale: raw scales must agree once delta is taken out.
  const auto unit = [&](std::size_t j) { return plain ? x->scale[j] : x->scale[j] / matrix.delta()[j]; };
  for (std::size_t j = 1; j < depth; ++j) {
    if (!same(unit(j), unit(0))) {
      throw Error("the input's scales do not agree" + std::string(plain ? "" : " with the transposed matrix's row scales") +
                  "; encrypt with one scale, quantise the matrix with one delta, or multiply by 1.0 first");
    }
  }
  auto out = result(x->tokens, rows, x->level, x->planned);
  double widest = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    double square = 0, sum = 0;
    for (std::size_t j = 0; j < depth; ++j) {
      const double w = plain ? weights.at(r, j) : weights.at(j, r);
      square += w * w * x->noise[j] * x->noise[j];  // errors of different features are independent
      sum += std::fabs(w) * (plain ? matrix.delta()[r] : matrix.delta()[j]);
    }
    out->scale[r] = plain ? unit(0) / matrix.delta()[r] : unit(0);
    out->noise[r] = std::sqrt(square);
    widest = std::max(widest, sum);
  }
  out->bound = x->bound * widest;
  const std::size_t n = parameters_->n(), limbs = x->limbs(), stride = 2 * limbs * n;
  trace_.count(Work::matrix, limbs,
               static_cast<double>(rows) * static_cast<double>(depth) * static_cast<double>(2 * limbs * n) / 1e6);
  if (x->planned) return out;
  // Columns at a time: the packed copy stays small whatever the depth.
  constexpr std::size_t kPackedWords = std::size_t{1} << 23;
  const std::size_t columns = std::clamp<std::size_t>(kPackedWords / depth / 256 * 256, 256, n);
  gemm::PackedResidues<std::uint64_t> packed;
  for (std::size_t limb = 0; limb < limbs; ++limb) {
    const math::Modulus& q = parameters_->prime(limb).row.modulus();
    int bits = 0;
    while ((q.q >> bits) != 0) ++bits;
    for (int component = 0; component < 2; ++component) {
      for (std::size_t column = 0; column < n; column += columns) {
        const std::size_t count = std::min(columns, n - column);
        packed.assign(x->row(0, component, limb) + column, depth, count, stride, math::active_isa(), bits);
        gemm::multiply(weights, operand, packed, q, 0, rows, out->row(0, component, limb) + column, stride);
      }
    }
  }
  return out;
}

std::vector<TensorPtr> Evaluator::rotate(const TensorPtr& x, const std::vector<long long>& steps) const {
  check(*x);
  std::vector<std::uint32_t> elements;
  for (const long long step : steps) elements.push_back(galois_element(*parameters_, step));
  return galois(x, elements);
}

TensorPtr Evaluator::automorphism(const TensorPtr& x, std::uint32_t element) const {
  check(*x);
  return galois(x, {element})[0];
}

TensorPtr Evaluator::conjugate(const TensorPtr& x) const {
  return automorphism(x, conjugation_element(*parameters_));
}

TensorPtr Evaluator::multiply_monomial(const TensorPtr& x, std::size_t power) const {
  check(*x);
  const std::size_t n = parameters_->n(), limbs = x->limbs();
  if (power >= n) throw Error("X^" + std::to_string(power) + " is beyond the ring; pass a power below " + std::to_string(n));
  auto out = result(x->tokens, x->features, x->level, x->planned);
  out->bound = x->bound;
  out->scale = x->scale;
  out->noise = x->noise;
  trace_.count(Work::term, limbs, static_cast<double>(x->features));
  if (x->planned) return out;
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    Scratch monomial(*this, n);
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = parameters_->prime(i);
      std::memset(monomial.data(), 0, n * sizeof(std::uint64_t));
      monomial.data()[power] = 1;
      prime.ntt.forward(monomial.data(), math::active_isa());
      for (std::size_t f = 0; f < x->features; ++f) {
        for (int c = 0; c < 2; ++c) {
          prime.row.multiply(x->row(f, c, i), monomial.data(), out->row(f, c, i), n, math::active_isa());
        }
      }
    }
  });
  return out;
}

TensorPtr Evaluator::sum_slots(const TensorPtr& x) const {
  check(*x);
  TensorPtr sum = x;
  for (std::size_t step = 1; step < parameters_->slots(); step *= 2) {
    sum = add(sum, rotate(sum, {static_cast<long long>(step)})[0]);
  }
  return sum;
}

std::vector<TensorPtr> Evaluator::galois(const TensorPtr& x, const std::vector<std::uint32_t>& elements) const {
  const std::size_t n = parameters_->n(), limbs = x->limbs(), digits = parameters_->digits(limbs);
  const std::size_t targets = limbs + parameters_->special_count();
  std::vector<std::shared_ptr<Tensor>> outs;
  std::size_t switched = 0;
  for (const std::uint32_t element : elements) {
    auto out = result(x->tokens, x->features, x->level, x->planned);
    out->bound = x->bound;
    out->scale = x->scale;
    out->noise = x->noise;
    if (element != 1) {
      ++switched;
      for (double& noise : out->noise) noise = norm(noise, norm(switch_noise(limbs), rounding_noise()));
      trace_.need_galois(element);
      if (!x->planned && (!keys_ || keys_->galois.count(element) == 0)) {
        throw Error(missing_key(*parameters_, element));
      }
    }
    outs.push_back(std::move(out));
  }
  trace_.count(Work::decompose, limbs, static_cast<double>(switched == 0 ? 0 : x->features));
  trace_.count(Work::rotate, limbs, static_cast<double>(switched * x->features));
  std::vector<TensorPtr> results(outs.begin(), outs.end());
  if (x->planned) return results;

  for_features(x->features, [&](std::size_t f) {
    const math::Isa isa = math::active_isa();
    Scratch scaled(*this, limbs * n), quotients(*this, digits * n), sums(*this, 2 * targets * n);
    Scratch extended(*this, switched > 1 ? digits * targets * n : 0), rows(*this, limbs * n);
    Decomposition decomposition{nullptr, 0, scaled.data(), quotients.data()};
    if (switched != 0) decompose(x->row(f, 1, 0), limbs, decomposition);
    if (switched > 1) {
      math::parallel_for(digits * targets, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
          const std::size_t d = i / targets, t = i % targets;
          if (t < limbs && t / parameters_->digit_limbs() == d) continue;
          extend_digit(decomposition, d, t, extended.data() + i * n);
        }
      });
    }
    std::uint64_t *sum0 = sums.data(), *sum1 = sum0 + targets * n;
    for (std::size_t e = 0; e < elements.size(); ++e) {
      Tensor& out = *outs[e];
      if (elements[e] == 1) {
        std::memcpy(out.row(f, 0, 0), x->row(f, 0, 0), 2 * limbs * n * sizeof(std::uint64_t));
        continue;
      }
      switch_key(decomposition, switched > 1 ? extended.data() : nullptr, *keys_->galois.at(elements[e]).key, sum0, sum1);
      math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i) {
          const std::uint64_t weights[2] = {1, parameters_->special_product(i)};
          const std::uint64_t* terms[2] = {sum0 + i * n, x->row(f, 0, i)};
          parameters_->prime(i).row.linear_combination(terms, weights, 2, sum0 + i * n, n, isa);
        }
      });
      const BaseConversion& conversion = parameters_->special_conversion(limbs, false);
      const std::uint32_t* index = permutations_.at(elements[e]).data();
      for (int c = 0; c < 2; ++c) {
        divide(c == 0 ? sum0 : sum1, conversion, limbs, limbs, rows.data());
        math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
          for (std::size_t i = begin; i < end; ++i) {
            ring::permute_row(rows.data() + i * n, index, out.row(f, c, i), n, isa);
          }
        });
      }
    }
  });
  return results;
}

}  // namespace privtuner::ckks
