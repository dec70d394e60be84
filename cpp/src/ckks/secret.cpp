#include "privtuner/ckks/secret.hpp"
#include "privtuner/ckks/centred_lift.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "features.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ckks {
namespace {

using Words = math::SecretBuffer<std::uint64_t>;

}  // namespace

void check_values(const Parameters& parameters, const Values& values, double bound) {
  if (values.tokens < 1 || values.tokens > parameters.slots()) {
    throw Error(std::to_string(values.tokens) + " tokens do not fit the " + std::to_string(parameters.slots()) +
                " slots of " + parameters.name() + "; encrypt at most that many at a time");
  }
  double largest = 0;
  bool finite = true;
  for (std::size_t t = 0; t < values.tokens; ++t) {
    for (std::size_t f = 0; f < values.features; ++f) {
      const auto at =
          static_cast<std::ptrdiff_t>(t) * values.token_stride + static_cast<std::ptrdiff_t>(f) * values.feature_stride;
      const double re = values.re[at], im = values.im == nullptr ? 0 : values.im[at];
      finite = finite && std::isfinite(re) && std::isfinite(im);
      largest = std::fmax(largest, im == 0 ? std::fabs(re) : std::hypot(re, im));
    }
  }
  if (!finite) throw Error("values to encrypt hold NaN or infinity; clean the data first");
  if (largest > bound) {
    throw Error("a value to encrypt is above the declared bound " + std::to_string(bound) +
                "; pass a larger bound (it is public) or clip the data");
  }
}

void check_numbers(const double* numbers, std::size_t count, double bound) {
  double largest = 0;
  bool finite = true;
  for (std::size_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(numbers[i]);
    largest = std::fmax(largest, std::fabs(numbers[i]));
  }
  if (!finite) throw Error("numbers to encrypt hold NaN or infinity; clean the data first");
  if (largest > bound) {
    throw Error("a number to encrypt is above the declared bound " + std::to_string(bound) +
                "; pass a larger bound (it is public) or clip the data");
  }
}

// Values of any sign have to fit the modulus, or they come out as others.
void check_room(const Tensor& tensor) {
  const double bound = tensor.bound, scale = *std::max_element(tensor.scale.begin(), tensor.scale.end());
  double log_modulus = 0;
  for (std::size_t i = 0; i < tensor.limbs(); ++i) {
    log_modulus += std::log2(static_cast<double>(tensor.parameters->prime(i).q));
  }
  if (bound == 0 || std::log2(2 * bound) + std::log2(scale) < log_modulus) return;
  throw Error("values up to " + std::to_string(bound) + " at scale 2^" + std::to_string(std::log2(scale)) +
              " do not fit the modulus of level " + std::to_string(tensor.level) + " (2^" +
              std::to_string(log_modulus) +
              "); keep a level more, declare a smaller bound (assume) if you know it holds, or take larger first_bits");
}

namespace {

std::shared_ptr<Tensor> fresh_tensor(const ParametersPtr& parameters, std::size_t tokens, std::size_t features,
                                     const Fresh& fresh, bool with_public_key, bool planned,
                                     const std::shared_ptr<Ledger>& ledger) {
  if (fresh.level < 0 || fresh.level > parameters->depth()) {
    throw Error("level " + std::to_string(fresh.level) + " is outside [0, " + std::to_string(parameters->depth()) +
                "] of " + parameters->name());
  }
  auto tensor = std::make_shared<Tensor>(parameters, tokens, features, fresh.level, planned, ledger);
  tensor->bound = fresh.bound;
  tensor->scale = fresh.scale;
  check_room(*tensor);
  std::fill(tensor->noise.begin(), tensor->noise.end(), fresh_noise(*parameters, with_public_key));
  return tensor;
}

std::shared_ptr<Tensor> packed_tensor(const ParametersPtr& parameters, std::size_t features, const Fresh& fresh,
                                      bool planned, const std::shared_ptr<Ledger>& ledger) {
  const auto tensor = fresh_tensor(parameters, parameters->slots(), features, fresh, false, planned, ledger);
  // A coefficient's error is a slot's over sqrt(N / 2).
  for (double& noise : tensor->noise) noise /= std::sqrt(static_cast<double>(parameters->slots()));
  return tensor;
}

}  // namespace

double fresh_noise(const Parameters& parameters, bool with_public_key) {
  // Variance of a coefficient: error and rounding; with the public key e v + e0 + e1 s, v and s ternary.
  const double n = static_cast<double>(parameters.n());
  const double variance = kErrorVariance * (with_public_key ? 1 + 2 * n * kSecretVariance : 1) + 1.0 / 12;
  return std::sqrt(n / 2 * variance);  // real part of a slot: N/2 times a coefficient's
}

TensorPtr planned_tensor(const ParametersPtr& parameters, std::size_t tokens, std::size_t features, const Fresh& fresh,
                         bool with_public_key, const std::shared_ptr<Ledger>& ledger) {
  return fresh_tensor(parameters, tokens, features, fresh, with_public_key, true, ledger);
}

TensorPtr planned_coefficients(const ParametersPtr& parameters, std::size_t features, const Fresh& fresh,
                               const std::shared_ptr<Ledger>& ledger) {
  return packed_tensor(parameters, features, fresh, true, ledger);
}

SecretKey::SecretKey(ParametersPtr parameters, const ring::Seed& seed) : parameters_(std::move(parameters)), words_(0) {
  const std::size_t n = parameters_->n();
  math::SecretBuffer<std::int8_t> coefficients(n);
  ring::sample_ternary(seed, {ring::Domain::secret, 0, 0}, coefficients.data(), n, math::active_isa());
  words_ = Words(parameters_->prime_count() * n);
  for (std::size_t i = 0; i < parameters_->prime_count(); ++i) {
    small_to_row(*parameters_, i, coefficients.data(), words_.data() + i * n);
  }
}

template <class Fill>
void SecretKey::encrypt_into(Tensor& tensor, Fill fill) const {
  const std::size_t n = parameters_->n();
  tensor.seed.emplace();
  ring::os_random(tensor.seed->data(), tensor.seed->size());
  const ring::Seed error_seed = ring::Seed::from_os();
  const math::Isa isa = math::active_isa();
  for_features(tensor.features, [&](std::size_t f) {
    math::SecretBuffer<std::int64_t> message(n);
    math::SecretBuffer<std::int8_t> error(n);
    fill(f, message.data());
    ring::sample_binomial(error_seed, {ring::Domain::error, static_cast<std::uint32_t>(f), 0}, error.data(), n, isa);
    for (std::size_t k = 0; k < n; ++k) message[k] += error[k];
    math::parallel_for(tensor.limbs(), 1, [&](std::size_t begin, std::size_t end) {
      Words product(n);
      for (std::size_t i = begin; i < end; ++i) {
        const ring::ResidueRow& ring_row = parameters_->prime(i).row;
        std::uint64_t *c0 = tensor.row(f, 0, i), *c1 = tensor.row(f, 1, i);
        expand_mask(*parameters_, *tensor.seed, static_cast<std::uint32_t>(f), i, c1);
        to_row(*parameters_, i, message.data(), c0);
        ring_row.multiply(c1, row(i), product.data(), n, isa);
        ring_row.subtract(c0, product.data(), c0, n, isa);
      }
    });
  });
}

TensorPtr SecretKey::encrypt(const Values& values, const Fresh& fresh) const {
  check_values(*parameters_, values, fresh.bound);
  const auto tensor = fresh_tensor(parameters_, values.tokens, values.features, fresh, false, false, nullptr);
  encrypt_into(*tensor,
               [&](std::size_t f, std::int64_t* out) { encode(*parameters_, values, f, fresh.scale[f], out); });
  return tensor;
}

TensorPtr SecretKey::encrypt_coefficients(const double* numbers, std::size_t features, const Fresh& fresh) const {
  const std::size_t n = parameters_->n();
  check_numbers(numbers, features * n, fresh.bound);
  const auto tensor = packed_tensor(parameters_, features, fresh, false, nullptr);
  for (const double scale : fresh.scale) {
    if (!(fresh.bound * scale < 0x1p62)) throw Error("numbers times their scale pass 2^62; choose a smaller scale");
  }
  encrypt_into(*tensor, [&](std::size_t f, std::int64_t* out) {
    for (std::size_t k = 0; k < n; ++k) {
      out[k] = static_cast<std::int64_t>(std::nearbyint(numbers[f * n + k] * fresh.scale[f]));
    }
  });
  return tensor;
}

void SecretKey::check_decryptable(const Tensor& tensor) const {
  if (tensor.parameters->hash() != parameters_->hash()) {
    throw Error("a tensor of " + tensor.parameters->name() + " cannot be decrypted with a key of " +
                parameters_->name());
  }
  if (tensor.planned) throw Error("a planned tensor holds no ciphertext; run the circuit on an encrypted one");
  check_room(tensor);
}

void SecretKey::coefficients(const Tensor& tensor, std::size_t f, double* out) const {
  const std::size_t n = parameters_->n();
  const math::Isa isa = math::active_isa();
  // Limbs enough for the largest value the bound allows, with 20 bits in which overflow shows.
  const double wanted = std::log2(tensor.scale[f] * std::fmax(tensor.bound, 1)) + 20;
  std::size_t limbs = 0;
  for (double bits = 0; limbs < tensor.limbs() && (limbs == 0 || bits < wanted); ++limbs) {
    bits += std::log2(static_cast<double>(parameters_->prime(limbs).q));
  }
  Words rows(limbs * n);
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      std::uint64_t* row_out = rows.data() + i * n;
      const ring::ResidueRow& ring_row = parameters_->prime(i).row;
      ring_row.multiply(tensor.row(f, 1, i), row(i), row_out, n, isa);
      ring_row.add(row_out, tensor.row(f, 0, i), row_out, n, isa);
      parameters_->prime(i).ntt.inverse(row_out, isa);
    }
  });
  const CentredLift lift(*parameters_, limbs);
  lift.to_digits(rows.data());
  // x = sum over i of (u_i - (q_i - 1) / 2) q_0 .. q_(i-1): a small x has zeros at the top.
  for (std::size_t k = 0; k < n; ++k) {
    double value = 0, weight = 1;
    for (std::size_t i = 0; i < limbs; ++i) {
      const std::uint64_t q = parameters_->prime(i).q;
      value += weight * static_cast<double>(static_cast<std::int64_t>(rows[i * n + k] - q / 2));
      weight *= static_cast<double>(q);
    }
    out[k] = value;
  }
}

namespace {

// `body(feature)` gives the largest |value| of that feature; the worst is held against the tensor's bound.
template <class Body>
void decrypt_features(const Tensor& tensor, Body body) {
  std::vector<double> largest(tensor.features);
  for_features(tensor.features, [&](std::size_t f) { largest[f] = body(f); });
  const double peak = *std::max_element(largest.begin(), largest.end());
  if (!(peak <= tensor.bound * 1.01 + 2 * tensor.worst_error())) {
    throw Error("a decrypted value is beyond the tensor's bound of " + std::to_string(tensor.bound) +
                ": an input left the domain declared for it, or the values outgrew the modulus; declare larger bounds, "
                "fit approximations on a wider domain, or keep a level more");
  }
}

}  // namespace

void SecretKey::decrypt(const Tensor& tensor, double* re, double* im) const {
  check_decryptable(tensor);
  const std::size_t slots = parameters_->slots();
  decrypt_features(tensor, [&](std::size_t f) {
    math::SecretBuffer<double> buffer(2 * slots);
    double *slot_re = buffer.data(), *slot_im = slot_re + slots;
    coefficients(tensor, f, slot_re);
    parameters_->encoder().to_slots(slot_re, slot_im);
    const double inverse_scale = 1 / tensor.scale[f];
    double peak = 0;
    for (std::size_t t = 0; t < tensor.tokens; ++t) {
      const double value = slot_re[t] * inverse_scale;
      const double imaginary = im == nullptr ? 0 : slot_im[t] * inverse_scale;
      peak = std::fmax(peak, std::hypot(value, imaginary));
      re[t * tensor.features + f] = value;
      if (im != nullptr) im[t * tensor.features + f] = imaginary;
    }
    return peak;
  });
}

void SecretKey::decrypt_coefficients(const Tensor& tensor, double* out) const {
  check_decryptable(tensor);
  const std::size_t n = parameters_->n();
  decrypt_features(tensor, [&](std::size_t f) {
    double peak = 0;
    coefficients(tensor, f, out + f * n);
    for (std::size_t k = 0; k < n; ++k) {
      out[f * n + k] /= tensor.scale[f];
      peak = std::fmax(peak, std::fabs(out[f * n + k]));
    }
    return peak;
  });
}

SeedBytes SecretKey::key_seed(const SeedBytes* common, KeyRole role, std::uint32_t element) const {
  SeedBytes seed;
  if (common == nullptr) {
    ring::os_random(seed.data(), seed.size());
    return seed;
  }
  seed = derived_seed(*common, role, element);
  const std::lock_guard<std::mutex> lock(derived_mutex_);
  if (!derived_.insert(seed).second) {
    throw Error("a key of this kind was made of this common randomness: use that one, or agree on other randomness");
  }
  return seed;
}

std::shared_ptr<const PublicKey> SecretKey::public_key(const SeedBytes* common) const {
  const std::size_t n = parameters_->n();
  auto key = std::make_shared<PublicKey>(parameters_, key_seed(common, KeyRole::encryption, 0));
  const ring::Seed error_seed = ring::Seed::from_os();
  const math::Isa isa = math::active_isa();
  math::SecretBuffer<std::int8_t> error(n);
  ring::sample_binomial(error_seed, {ring::Domain::error, 0, 0}, error.data(), n, isa);
  Words product(n);
  for (std::size_t i = 0; i < parameters_->max_limbs(); ++i) {
    const ring::ResidueRow& ring_row = parameters_->prime(i).row;
    small_to_row(*parameters_, i, error.data(), key->row(0, i));
    ring_row.multiply(key->row(1, i), row(i), product.data(), n, isa);
    ring_row.subtract(key->row(0, i), product.data(), key->row(0, i), n, isa);
  }
  return key;
}

std::shared_ptr<const SwitchingKey> SecretKey::switching_key(const std::uint64_t* source,
                                                             const ring::Automorphism* automorphism,
                                                             const SeedBytes& seed) const {
  const std::size_t n = parameters_->n(), primes = parameters_->prime_count(), limbs = parameters_->max_limbs();
  auto key = std::make_shared<SwitchingKey>(parameters_, seed);
  const ring::Seed error_seed = ring::Seed::from_os();
  const math::Isa isa = math::active_isa();
  math::SecretBuffer<std::int8_t> errors(key->digits() * n);
  for (std::size_t d = 0; d < key->digits(); ++d) {
    ring::sample_binomial(error_seed, {ring::Domain::error, static_cast<std::uint32_t>(d), 0}, errors.data() + d * n, n,
                          isa);
  }
  math::parallel_for(primes, 1, [&](std::size_t begin, std::size_t end) {
    Words target(n), product(n);
    for (std::size_t i = begin; i < end; ++i) {
      const ring::ResidueRow& ring_row = parameters_->prime(i).row;
      const std::uint64_t* secret = row(i);
      if (automorphism != nullptr) {
        automorphism->permute(row(i), 0, n, target.data(), isa);
        secret = target.data();
      }
      for (std::size_t d = 0; d < key->digits(); ++d) {
        std::uint64_t* b = key->row(d, 0, i);
        small_to_row(*parameters_, i, errors.data() + d * n, b);
        ring_row.multiply(key->row(d, 1, i), secret, product.data(), n, isa);
        ring_row.subtract(b, product.data(), b, n, isa);
        if (i < limbs && i / parameters_->digit_limbs() == d) {
          ring_row.multiply_scalar(source + i * n, parameters_->special_product(i), product.data(), n, isa);
          ring_row.add(b, product.data(), b, n, isa);
        }
      }
    }
  });
  return key;
}

std::shared_ptr<const SwitchingKey> SecretKey::relinearisation_key(const SeedBytes* common) const {
  const std::size_t n = parameters_->n(), limbs = parameters_->max_limbs();
  Words square(limbs * n);
  for (std::size_t i = 0; i < limbs; ++i) {
    parameters_->prime(i).row.multiply(row(i), row(i), square.data() + i * n, n, math::active_isa());
  }
  return switching_key(square.data(), nullptr, key_seed(common, KeyRole::evaluation, kRelinearisation));
}

GaloisKey SecretKey::galois_key(std::uint32_t element, const SeedBytes* common) const {
  const std::uint64_t order = 2 * parameters_->n();
  if (element % 2 == 0 || element >= order) {
    throw Error(std::to_string(element) + " is no automorphism; pass an odd number below " + std::to_string(order));
  }
  std::uint64_t inverse = 1;  // element^(order / 2 - 1): the group's exponent divides order / 2
  for (std::uint64_t i = 0, power = element, exponent = order / 2 - 1; i < 64 && exponent != 0; ++i, exponent >>= 1) {
    if (exponent & 1) inverse = inverse * power % order;
    power = power * power % order;
  }
  const ring::Automorphism target(parameters_->n(), static_cast<std::uint32_t>(inverse));
  return {element, switching_key(row(0), &target, key_seed(common, KeyRole::evaluation, element))};
}

TensorPtr encrypt(const PublicKey& key, const Values& values, const Fresh& fresh) {
  const ParametersPtr& parameters = key.parameters;
  check_values(*parameters, values, fresh.bound);
  const std::size_t n = parameters->n();
  const auto tensor = fresh_tensor(parameters, values.tokens, values.features, fresh, true, false, nullptr);
  const ring::Seed seed = ring::Seed::from_os();
  const math::Isa isa = math::active_isa();
  math::parallel_for(values.features, 1, [&](std::size_t begin, std::size_t end) {
    math::SecretBuffer<std::int64_t> message(n);
    math::SecretBuffer<std::int8_t> mask(n), error(2 * n);
    Words v(n), e(n);
    for (std::size_t f = begin; f < end; ++f) {
      const auto index = static_cast<std::uint32_t>(f);
      encode(*parameters, values, f, fresh.scale[f], message.data());
      ring::sample_ternary(seed, {ring::Domain::secret, index, 0}, mask.data(), n, isa);
      ring::sample_binomial(seed, {ring::Domain::error, index, 0}, error.data(), n, isa);
      ring::sample_binomial(seed, {ring::Domain::error, index, 1}, error.data() + n, n, isa);
      for (std::size_t k = 0; k < n; ++k) message[k] += error[k];
      for (std::size_t i = 0; i < tensor->limbs(); ++i) {
        const ring::ResidueRow& ring_row = parameters->prime(i).row;
        std::uint64_t *c0 = tensor->row(f, 0, i), *c1 = tensor->row(f, 1, i);
        small_to_row(*parameters, i, mask.data(), v.data());
        to_row(*parameters, i, message.data(), e.data());
        ring_row.multiply(key.row(0, i), v.data(), c0, n, isa);
        ring_row.add(c0, e.data(), c0, n, isa);
        small_to_row(*parameters, i, error.data() + n, e.data());
        ring_row.multiply(key.row(1, i), v.data(), c1, n, isa);
        ring_row.add(c1, e.data(), c1, n, isa);
      }
    }
  });
  return tensor;
}

}  // namespace privtuner::ckks
