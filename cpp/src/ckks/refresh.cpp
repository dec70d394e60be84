#include "privtuner/ckks/refresh.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "evaluator_work.hpp"
#include "privtuner/ckks/secret.hpp"

namespace privtuner::ckks {

void check_refresh_levels(const Parameters& parameters, int from, int level) {
  if (parameters.depth() < kRefreshLevel) {
    throw Error(parameters.name() + " has no three primes for the masks of a refresh; take a depth from " +
                std::to_string(kRefreshLevel) + " on");
  }
  if (from < kRefreshLevel) {
    throw Error("a tensor at level " + std::to_string(from) + " cannot be refreshed: the masks need level " +
                std::to_string(kRefreshLevel) + "; refresh it earlier (at level " + std::to_string(kRefreshLevel + 1) +
                " two features share a ciphertext)");
  }
  if (level < kRefreshLevel || level > parameters.depth()) {
    throw Error("a refresh to level " + std::to_string(level) + ": choose one from " + std::to_string(kRefreshLevel) +
                " to the depth, " + std::to_string(parameters.depth()));
  }
}

void check_wrap(const Tensor& x) {
  double log_modulus = 0;
  for (std::size_t i = 0; i < x.limbs(); ++i) log_modulus += std::log2(static_cast<double>(x.parameters->prime(i).q));
  const double places = static_cast<double>(x.features) * static_cast<double>(x.parameters->n());
  double largest = 0;  // no coefficient is above the largest slot
  for (std::size_t f = 0; f < x.features; ++f) {
    largest = std::max(largest, x.bound * x.scale[f] + x.noise[f] * worst_of(places));
  }
  const double needed = 1 + x.parameters->log_n() + std::log2(largest) + kLogRefreshes + kWrapBits;
  if (needed <= log_modulus) return;
  throw Error("values up to " + std::to_string(x.bound) + " at scale " + bits(x.scale[0]) +
              " cannot be masked: that takes a modulus of 2^" + std::to_string(needed) + " where level " +
              std::to_string(x.level) + " has 2^" + std::to_string(log_modulus) +
              "; declare a smaller bound (assume) if you know it holds, or take a smaller scale or larger first_bits");
}

std::shared_ptr<Tensor> Evaluator::refreshed(const TensorPtr& x, int level, bool packed) const {
  check(*x);
  check_refresh_levels(*parameters_, x->level, level);
  if (x->level != kRefreshLevel) throw Error("a refresh starts at level " + std::to_string(kRefreshLevel));
  check_wrap(*x);
  auto out = result(x->tokens, x->features, level, x->planned);
  out->bound = x->bound;
  out->scale = x->scale;
  out->shared = x->shared;
  // An encryption of zero under the public key at the server, a fresh one at the owner. An error is a coefficient's, or
  // a slot's: sqrt(N / 2) times that.
  const double unit = packed ? 1 / std::sqrt(static_cast<double>(parameters_->slots())) : 1;
  const double added = unit * norm(fresh_noise(*parameters_, true), fresh_noise(*parameters_, false));
  for (std::size_t f = 0; f < x->features; ++f) out->noise[f] = norm(x->noise[f], added);
  const auto count = static_cast<double>(x->features);
  trace_.count(Work::mask, x->limbs(), count);
  trace_.count(Work::unmask, out->limbs(), count);
  trace_.count(Work::refresh, out->limbs(), count);
  trace_.count_refresh(x->features, level);
  return out;
}

double flood_of(const Tensor& x, std::size_t f, int flood_bits) {
  const double places = static_cast<double>(x.features) * static_cast<double>(x.parameters->n());
  // A coefficient's error is a slot's over sqrt(N / 2).
  const double worst = x.noise[f] / std::sqrt(static_cast<double>(x.parameters->slots())) * worst_of(places);
  return std::ceil(std::ldexp(worst, flood_bits));
}

std::shared_ptr<Tensor> Evaluator::revealed(const TensorPtr& x, int flood_bits, double error) const {
  check(*x);
  if (flood_bits < 1 || flood_bits > kMaxFloodBits) {
    throw Error("flood_bits " + std::to_string(flood_bits) + " is outside [1, " + std::to_string(kMaxFloodBits) + "]");
  }
  if (!(error > 0) || !std::isfinite(error)) throw Error("error " + std::to_string(error) + " is no positive number");
  auto out = result(x->tokens, x->features, x->level, x->planned);
  out->scale = x->scale;
  const double root = std::sqrt(static_cast<double>(parameters_->slots()));
  double log_modulus = 0, largest = 0;
  for (std::size_t i = 0; i < x->limbs(); ++i) log_modulus += std::log2(static_cast<double>(parameters_->prime(i).q));
  for (std::size_t f = 0; f < x->features; ++f) {
    const double flood = flood_of(*x, f, flood_bits);
    const double fresh = norm(fresh_noise(*parameters_, true), flood / std::sqrt(3.0) * root);
    out->noise[f] = norm(x->noise[f], fresh);
    out->shared[f] = x->shared[f];
    largest = std::max({largest, x->bound * x->scale[f] + flood, flood});
    if (flood >= 0x1p60) throw Error("a flood of 2^60; choose fewer flood_bits");
  }
  out->bound = x->bound;
  if (std::log2(2 * largest) >= log_modulus) {
    throw Error("values up to " + std::to_string(x->bound) + " and a flood of " + std::to_string(flood_bits) +
                " bits do not fit the modulus of level " + std::to_string(x->level) + "; reveal at a higher level");
  }
  if (out->worst_error() > error) {
    throw Error("a flood of " + std::to_string(flood_bits) + " bits leaves errors up to " +
                std::to_string(out->worst_error()) + " where " + std::to_string(error) +
                " are allowed; take fewer flood_bits, a larger scale, or a less noisy circuit");
  }
  trace_.count(Work::mask, x->limbs(), static_cast<double>(x->features));
  return out;
}

}  // namespace privtuner::ckks
