#include "privtuner/ckks/refresh.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "evaluator_work.hpp"
#include "privtuner/ckks/centred_lift.hpp"
#include "privtuner/ckks/secret.hpp"

namespace privtuner::ckks {

namespace {

// Standard deviation of what counts as the error where every coefficient's has deviation 1.
double error_unit(const Parameters& parameters, bool packed) {
  return packed ? 1 : std::sqrt(static_cast<double>(parameters.slots()));  // the real part of a slot
}

}  // namespace

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
  // An encryption of zero under the public key at the server, a fresh one at the owner.
  const double added = norm(fresh_noise(*parameters_, true), fresh_noise(*parameters_, false)) *
                       error_unit(*parameters_, packed) / error_unit(*parameters_, false);
  for (std::size_t f = 0; f < x->features; ++f) out->noise[f] = norm(x->noise[f], added);
  const auto count = static_cast<double>(x->features);
  trace_.count(Work::mask, x->limbs(), count);
  trace_.count(Work::unmask, out->limbs(), count);
  trace_.count(Work::refresh, out->limbs(), count);
  trace_.count_refresh(x->features, level);
  return out;
}

double flood_of(const Tensor& x, std::size_t f, int flood_bits, bool packed) {
  const double places = static_cast<double>(x.features) * static_cast<double>(x.parameters->n());
  const double worst = x.noise[f] / error_unit(*x.parameters, packed) * worst_of(places);
  return std::ceil(std::ldexp(worst, flood_bits));
}

std::shared_ptr<Tensor> Evaluator::revealed(const TensorPtr& x, int flood_bits, double error, bool packed) const {
  check(*x);
  if (flood_bits < 1 || flood_bits > kMaxFloodBits) {
    throw Error("flood_bits " + std::to_string(flood_bits) + " is outside [1, " + std::to_string(kMaxFloodBits) + "]");
  }
  if (!(error > 0) || !std::isfinite(error)) throw Error("error " + std::to_string(error) + " is no positive number");
  auto out = result(x->tokens, x->features, x->level, x->planned);
  out->scale = x->scale;
  const double unit = error_unit(*parameters_, packed);
  const double zero = fresh_noise(*parameters_, true) * unit / error_unit(*parameters_, false);
  double log_modulus = 0, largest = 0;
  for (std::size_t i = 0; i < x->limbs(); ++i) log_modulus += std::log2(static_cast<double>(parameters_->prime(i).q));
  for (std::size_t f = 0; f < x->features; ++f) {
    const double flood = flood_of(*x, f, flood_bits, packed);
    out->noise[f] = norm(x->noise[f], norm(zero, flood / std::sqrt(3.0) * unit));
    out->shared[f] = x->shared[f];
    largest = std::max(largest, x->bound * x->scale[f] + flood);
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

namespace {

using Words = math::SecretBuffer<std::uint64_t>;

// Feature f of x plus an encryption of zero under the public key, as feature g of `out`; `noise(limb, row)` adds what
// else there is to add to coefficients of component 0. Everything random is of `seed`, which nothing else is drawn
// from.
template <class Noise>
void rerandomise(const PublicKey& key, const ring::Seed& seed, const Tensor& x, std::size_t f, Tensor& out,
                 std::size_t g, Noise noise) {
  const Parameters& parameters = *x.parameters;
  const std::size_t n = parameters.n();
  const math::Isa isa = math::active_isa();
  const auto index = static_cast<std::uint32_t>(g);
  math::SecretBuffer<std::int8_t> v(n), error(2 * n);
  ring::sample_ternary(seed, {ring::Domain::secret, index, 0}, v.data(), n, isa);
  for (std::uint32_t c = 0; c < 2; ++c) {
    ring::sample_binomial(seed, {ring::Domain::error, index, c}, error.data() + c * n, n, isa);
  }
  math::parallel_for(x.limbs(), 1, [&](std::size_t begin, std::size_t end) {
    Words v_row(n), row(n);
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = parameters.prime(i);
      small_to_row(parameters, i, v.data(), v_row.data());
      for (int c = 0; c < 2; ++c) {
        small_residues(parameters, i, error.data() + static_cast<std::size_t>(c) * n, row.data());
        if (c == 0) noise(i, row.data());
        prime.ntt.forward(row.data(), isa);
        prime.row.add(row.data(), x.row(f, c, i), row.data(), n, isa);
        prime.row.multiply(key.row(c, i), v_row.data(), out.row(g, c, i), n, isa);
        prime.row.add(out.row(g, c, i), row.data(), out.row(g, c, i), n, isa);
      }
    }
  });
}

// Limb `limb` of the mask of ciphertext `index` of a message.
void draw_mask(const Parameters& parameters, const ring::Seed& seed, std::size_t index, std::size_t limb,
               std::uint64_t* out) {
  ring::sample_uniform(seed, {ring::Domain::mask, static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(limb)},
                       parameters.prime(limb).q, out, parameters.n(), math::active_isa());
}

void check_key(const PublicKey& key, const Parameters& parameters) {
  if (key.parameters->hash() != parameters.hash()) {
    throw Error("a public key of " + key.parameters->name() + " does not fit tensors of " + parameters.name());
  }
}

}  // namespace

void reveal(const PublicKey& key, const Tensor& x, int flood_bits, bool packed, Tensor& revealed) {
  const Parameters& parameters = *x.parameters;
  check_key(key, parameters);
  if (x.planned || revealed.planned || revealed.features != x.features || revealed.level != x.level ||
      revealed.parameters->hash() != parameters.hash()) {
    throw std::invalid_argument("what is revealed takes a tensor with words, and the room for the result");
  }
  const std::size_t n = parameters.n();
  const math::Isa isa = math::active_isa();
  const ring::Seed seed = ring::Seed::from_os();
  for_features(x.features, [&](std::size_t f) {
    const auto flood = static_cast<std::uint64_t>(flood_of(x, f, flood_bits, packed));
    Words uniform(n);
    ring::sample_uniform(seed, {ring::Domain::mask, static_cast<std::uint32_t>(f), 0}, 2 * flood + 1, uniform.data(), n,
                         isa);
    rerandomise(key, seed, x, f, revealed, f, [&](std::size_t i, std::uint64_t* row) {
      const math::Modulus& q = parameters.prime(i).row.modulus();
      const std::uint64_t middle = q.reduce(flood);
      for (std::size_t k = 0; k < n; ++k) row[k] = q.add(row[k], q.sub(q.reduce(uniform[k]), middle));
    });
  });
}

void mask_opening(const PublicKey& key, const Tensor& x, Tensor& masked, std::uint64_t* mask) {
  const Parameters& parameters = *x.parameters;
  check_key(key, parameters);
  if (x.planned || masked.planned || masked.features != x.features || x.level != 0 || masked.level != 0 ||
      masked.parameters->hash() != parameters.hash()) {
    throw std::invalid_argument("an opening takes a tensor with words at level 0, and the room for the masked one");
  }
  const std::size_t n = parameters.n();
  const ring::Seed seed = ring::Seed::from_os();
  for_features(x.features, [&](std::size_t f) {
    draw_mask(parameters, seed, f, 0, mask + f * n);
    rerandomise(key, seed, x, f, masked, f, [&](std::size_t limb, std::uint64_t* row) {
      parameters.prime(limb).row.add(row, mask + f * n, row, n, math::active_isa());
    });
  });
}

MaskedRefresh::MaskedRefresh(std::shared_ptr<const PublicKey> key, TensorPtr x, std::shared_ptr<Tensor> fresh,
                             const wire::Id& session, std::uint64_t first)
    : key_(std::move(key)),
      x_(std::move(x)),
      fresh_(std::move(fresh)),
      session_(session),
      first_(first),
      batch_(refresh_batch(*x_->parameters, fresh_->level)),
      masks_((x_->features + batch_ - 1) / batch_) {
  check_key(*key_, *x_->parameters);
  if (x_->planned || fresh_->planned || x_->level != kRefreshLevel || fresh_->features != x_->features ||
      fresh_->parameters->hash() != x_->parameters->hash()) {
    throw std::invalid_argument("a refresh takes a tensor at its level, and the room for the result");
  }
}

void MaskedRefresh::mask(std::size_t i, std::uint8_t* out) {
  Mask& mask = masks_.at(i);
  if (mask.state != State::waiting) throw std::logic_error("a mask hides one message, once");
  mask.state = State::sent;
  mask.seed = ring::Seed::from_os();
  const Parameters& parameters = *x_->parameters;
  const std::size_t n = parameters.n();
  Tensor masked(x_->parameters, x_->tokens, count(i), kRefreshLevel, false, nullptr);
  for_features(masked.features, [&](std::size_t f) {
    rerandomise(*key_, mask.seed, *x_, i * batch_ + f, masked, f, [&](std::size_t limb, std::uint64_t* row) {
      Words r(n);
      draw_mask(parameters, mask.seed, f, limb, r.data());
      parameters.prime(limb).row.add(row, r.data(), row, n, math::active_isa());
    });
  });
  write_refresh(masked, id(i), out);
}

void MaskedRefresh::unmask(std::size_t i, const std::uint8_t* answer, std::size_t size) {
  Mask& mask = masks_.at(i);
  if (mask.state != State::sent) throw std::logic_error("no mask is waiting for this answer");
  const Parameters& parameters = *x_->parameters;
  const std::size_t n = parameters.n(), first = i * batch_, masked = x_->limbs();
  read_refreshed(id(i), answer, size, first, count(i), *fresh_);
  const CentredLift lift(parameters, masked);
  for_features(count(i), [&](std::size_t f) {
    Words digits(masked * n);
    const auto subtract = [&](std::size_t limb, std::uint64_t* row) {
      const Prime& prime = parameters.prime(limb);
      std::uint64_t* const c0 = fresh_->row(first + f, 0, limb);
      prime.ntt.forward(row, math::active_isa());
      prime.row.subtract(c0, row, c0, n, math::active_isa());
    };
    math::parallel_for(masked, 1, [&](std::size_t begin, std::size_t end) {
      Words r(n);
      for (std::size_t limb = begin; limb < end; ++limb) {
        draw_mask(parameters, mask.seed, f, limb, digits.data() + limb * n);
        std::copy_n(digits.data() + limb * n, n, r.data());
        subtract(limb, r.data());  // modulo the masked primes the lift is the mask itself
      }
    });
    lift.to_digits(digits.data());
    math::parallel_for(fresh_->limbs() - masked, 1, [&](std::size_t begin, std::size_t end) {
      Words r(n);
      for (std::size_t limb = masked + begin; limb < masked + end; ++limb) {
        lift.residues(digits.data(), limb, r.data());
        subtract(limb, r.data());
      }
    });
  });
  mask.seed = ring::Seed();
  mask.state = State::answered;
}

TensorPtr MaskedRefresh::result() const {
  for (const Mask& mask : masks_) {
    if (mask.state != State::answered) throw std::logic_error("not all answers of the refresh have been read");
  }
  return fresh_;
}

void SecretKey::open(const Tensor& masked, std::uint64_t* out) const {
  if (masked.parameters->hash() != parameters_->hash() || masked.planned || masked.level != 0) {
    throw std::invalid_argument("an opening takes a tensor with words at level 0, of this key's parameters");
  }
  const Prime& prime = parameters_->prime(0);
  const std::size_t n = parameters_->n();
  const math::Isa isa = math::active_isa();
  for_features(masked.features, [&](std::size_t f) {
    std::uint64_t* const coefficients = out + f * n;
    prime.row.multiply(masked.row(f, 1, 0), row(0), coefficients, n, isa);
    prime.row.add(coefficients, masked.row(f, 0, 0), coefficients, n, isa);
    prime.ntt.inverse(coefficients, isa);
  });
}

void SecretKey::refresh(const std::uint8_t* message, std::size_t size, std::size_t count, int level,
                        std::uint8_t* out) const {
  const Parameters& parameters = *parameters_;
  check_refresh_levels(parameters, kRefreshLevel, level);
  RefreshId id;
  const auto masked = read_refresh(parameters_, count, message, size, id);
  Tensor fresh(parameters_, parameters.slots(), count, level, false, nullptr);
  fresh.seed.emplace();
  ring::os_random(fresh.seed->data(), fresh.seed->size());
  const ring::Seed error_seed = ring::Seed::from_os();
  const std::size_t n = parameters.n(), known = masked->limbs();
  const math::Isa isa = math::active_isa();
  const CentredLift lift(parameters, known);
  for_features(count, [&](std::size_t f) {
    Words digits(known * n);
    math::SecretBuffer<std::int8_t> error(n);
    ring::sample_binomial(error_seed, {ring::Domain::error, static_cast<std::uint32_t>(f), 0}, error.data(), n, isa);
    // c0 of the answer is w + e - c1 s, where `row` holds the coefficients of w.
    const auto encrypt = [&](std::size_t limb, std::uint64_t* row, std::uint64_t* work) {
      const Prime& prime = parameters.prime(limb);
      std::uint64_t *c0 = fresh.row(f, 0, limb), *c1 = fresh.row(f, 1, limb);
      small_residues(parameters, limb, error.data(), work);
      prime.row.add(row, work, row, n, isa);
      prime.ntt.forward(row, isa);
      expand_mask(parameters, *fresh.seed, static_cast<std::uint32_t>(f), limb, c1);
      prime.row.multiply(c1, this->row(limb), work, n, isa);
      prime.row.subtract(row, work, c0, n, isa);
    };
    math::parallel_for(known, 1, [&](std::size_t begin, std::size_t end) {
      Words w(n), work(n);
      for (std::size_t limb = begin; limb < end; ++limb) {
        const Prime& prime = parameters.prime(limb);
        std::uint64_t* const kept = digits.data() + limb * n;
        prime.row.multiply(masked->row(f, 1, limb), row(limb), kept, n, isa);
        prime.row.add(kept, masked->row(f, 0, limb), kept, n, isa);
        prime.ntt.inverse(kept, isa);
        std::copy_n(kept, n, w.data());
        encrypt(limb, w.data(), work.data());
      }
    });
    lift.to_digits(digits.data());
    math::parallel_for(fresh.limbs() - known, 1, [&](std::size_t begin, std::size_t end) {
      Words w(n), work(n);
      for (std::size_t limb = known + begin; limb < known + end; ++limb) {
        lift.residues(digits.data(), limb, w.data());
        encrypt(limb, w.data(), work.data());
      }
    });
  });
  write_refreshed(fresh, id, out);
}

}  // namespace privtuner::ckks
