#include "privtuner/ckks/evaluator.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "evaluator_work.hpp"

namespace privtuner::ckks {

Evaluator::Evaluator(ParametersPtr parameters, std::shared_ptr<const EvaluationKeys> keys,
                     std::shared_ptr<Recording> recording)
    : parameters_(std::move(parameters)),
      keys_(std::move(keys)),
      recording_(std::move(recording)),
      ledger_(std::make_shared<Ledger>()) {
  if (!keys_) return;
  if (keys_->parameters->hash() != parameters_->hash()) {
    throw Error("evaluation keys of " + keys_->parameters->name() + " do not fit " + parameters_->name());
  }
  for (const auto& entry : keys_->galois) {
    automorphisms_.emplace(entry.first, ring::Automorphism(parameters_->n(), entry.first));
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

TensorPtr Evaluator::assume(const TensorPtr& x, double bound, double error) const {
  if (!(bound > 0) || !std::isfinite(bound))
    throw Error("bound " + std::to_string(bound) + " is not a positive number");
  if (!(error > 0)) throw Error("error " + std::to_string(error) + " is not a positive number");
  auto out = std::make_shared<Tensor>(*x);
  out->bound = bound;
  const double deviation = error / worst_of(static_cast<double>(x->features * parameters_->slots()));
  for (std::size_t f = 0; f < x->features && std::isfinite(error); ++f) {
    out->noise[f] = std::min(x->noise[f], deviation * x->scale[f]);
    out->shared[f] = std::min(x->shared[f], out->noise[f]);
  }
  return out;
}

TensorPtr Evaluator::with_noise(const TensorPtr& x, const std::vector<double>& noise,
                                const std::vector<double>& shared) const {
  auto out = std::make_shared<Tensor>(*x);
  out->noise = noise;
  out->shared = shared;
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

TensorPtr Evaluator::concatenate(const std::vector<TensorPtr>& tensors, bool independent) const {
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
  Assembly assembly(*this, *tensors[0], features, level);
  std::size_t at = 0;
  for (const TensorPtr& x : tensors) {
    assembly.put(x, at, independent);
    at += x->features;
  }
  return assembly.finish(bound);
}

Evaluator::Assembly::Assembly(const Evaluator& evaluator, const Tensor& like, std::size_t features, int level)
    : evaluator_(evaluator), out_(evaluator.result(like.tokens, features, level, like.planned)) {}

void Evaluator::Assembly::put(const TensorPtr& part, std::size_t at, bool independent) {
  const std::size_t bytes = out_->limbs() * evaluator_.parameters_->n() * sizeof(std::uint64_t);
  for (std::size_t f = 0; f < part->features; ++f) {
    out_->scale[at + f] = part->scale[f];
    out_->noise[at + f] = part->noise[f];
    out_->shared[at + f] = independent ? part->shared[f] : part->noise[f];
    for (int c = 0; c < 2 && !out_->planned; ++c) std::memcpy(out_->row(at + f, c, 0), part->row(f, c, 0), bytes);
  }
  if (out_->planned && evaluator_.recording_) parts_.emplace(at, part);
}

TensorPtr Evaluator::Assembly::finish(double bound) {
  out_->bound = bound;
  if (!parts_.empty()) {
    std::vector<TensorRef> refs;
    for (const auto& entry : parts_) refs.push_back(entry.second->ref());
    evaluator_.recording_->add(step::Copy{out_->ref(), std::move(refs)});
  }
  return out_;
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
  out->shared = x->shared;
  if (x->planned && recording_) recording_->add(step::Copy{out->ref(), {x->ref()}});
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
  const bool uniform =
      std::all_of(low->scale.begin(), low->scale.end(), [&](double v) { return same(v, low->scale[0]); });
  if (x->level != y->level && (uniform || low->features == high->features)) {
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
    out->shared[f] = shared_noise(*x, f, features, x->overlaps(*y)) + shared_noise(*y, f, features, x->overlaps(*y));
    const double apart =
        std::fabs(x->scale[of(*x, f)] - y->scale[of(*y, f)]);  // scales that agree need not be the same
    out->noise[f] += apart * (x->features >= y->features ? y->bound : x->bound);
  }
  trace_.count(Work::term, x->limbs(), static_cast<double>(features));
  if (out->planned) {
    if (recording_) recording_->add(step::Add{out->ref(), x->ref(), y->ref(), minus});
    return out;
  }
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
  if (tensors.size() >= ring::kMaxTerms) {
    throw Error("a combination of " + std::to_string(tensors.size()) + " tensors; take fewer than " +
                std::to_string(ring::kMaxTerms) + " at once and add the results");
  }
  const TensorPtr& widest = *std::max_element(
      tensors.begin(), tensors.end(), [](const TensorPtr& a, const TensorPtr& b) { return a->features < b->features; });
  const std::size_t features = widest->features;
  int level = parameters_->depth();
  for (const TensorPtr& x : tensors) {
    check_pair(*x, *widest);
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

// The combination as combine_row adds it up.
step::Terms Evaluator::terms_of(const Combination& c, std::size_t features, std::size_t limbs) const {
  step::Terms out;
  for (const TensorPtr& x : c.tensors) out.terms.push_back(x->ref());
  for (std::size_t limb = 0; limb < limbs; ++limb) {
    const math::Modulus& q = parameters_->prime(limb).row.modulus();
    for (const std::vector<double>& weights : c.weights) {
      for (std::size_t f = 0; f < features; ++f) out.weights.push_back(residue_of(weights[f], q));
    }
    for (const double constant : c.constants) out.constants.push_back(residue_of(constant, q));
  }
  return out;
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
  for (const auto& row : c.weights) require_room(row, "weights");
  require_room(c.constants, "constants");
  const Tensor& first = *c.tensors.at(0);
  auto out = result(first.tokens, features, rescaled ? level - 1 : level, first.planned);
  out->bound = bound;
  const double q = rescaled ? static_cast<double>(parameters_->prime(limbs - 1).q) : 1;
  for (std::size_t f = 0; f < features; ++f) {
    double noise = 0, shared = 0;
    for (std::size_t t = 0; t < c.tensors.size(); ++t) {
      const Tensor& x = *c.tensors[t];
      const std::size_t g = x.features == 1 ? 0 : f;
      noise += std::fabs(c.weights[t][f]) * x.noise[g];
      shared += std::fabs(c.weights[t][f]) * shared_noise(x, f, features, c.tensors.size() > 1 && x.overlaps(first));
      if (rescaled && !c.exact)
        noise += 0.3 * x.bound * x.scale[g];  // the weight is rounded: 1 / sqrt(12) of the raw value
    }
    out->scale[f] = scale[f] / q;
    out->noise[f] = rescaled ? norm(noise / q, rounding_noise()) : noise;
    out->shared[f] = shared / q;
  }
  trace_.count(Work::term, limbs, static_cast<double>(features * std::max<std::size_t>(1, c.tensors.size())));
  if (rescaled) trace_.count(Work::rescale, limbs, static_cast<double>(features));
  if (out->planned) {
    if (recording_) recording_->add(step::Combine{out->ref(), terms_of(c, features, limbs), rescaled, limbs});
    return out;
  }
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
  const double least = *std::min_element(x->scale.begin(), x->scale.end());
  if (least < kLeastScale * static_cast<double>(parameters_->prime(x->limbs() - 1).q)) {
    throw Error("scale " + bits(least) + " is below the prime that a rescale divides by: nothing of the values would " +
                "be left; products are rescaled already");
  }
  const Combination c{{x}, {std::vector<double>(x->features, 1)}, {}, true};
  return combine(c, x->level, x->scale, x->bound, true);
}

TensorPtr Evaluator::sum_features(const TensorPtr& x) const {
  check(*x);
  auto out = result(x->tokens, 1, x->level, x->planned);
  double square = 0, common = 0;
  for (std::size_t f = 0; f < x->features; ++f) {
    if (!same(x->scale[f], x->scale[0])) {
      throw Error("the features to sum have different scales; multiply by 1.0 first (takes a level)");
    }
    square += x->own_noise(f) * x->own_noise(f);
    common += x->shared[f];
  }
  out->scale[0] = x->scale[0];
  out->noise[0] = std::sqrt(square) + common;
  out->bound = x->bound * static_cast<double>(x->features);
  trace_.count(Work::term, x->limbs(), static_cast<double>(x->features));
  if (x->planned) {
    if (recording_) recording_->add(step::Sum{out->ref(), x->ref()});
    return out;
  }
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

}  // namespace privtuner::ckks
