#include "privtuner/ckks/keys.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/chacha20.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ckks {
namespace {

std::string missing_key(const Parameters& parameters, std::uint32_t element) {
  if (element == kRelinearisation)
    return "a product of ciphertexts needs the relinearisation key; make evaluation keys with it";
  if (element == conjugation_element(parameters))
    return "conjugation needs its key; make evaluation keys with conjugation";
  for (std::size_t step = 1; step < parameters.slots(); ++step) {
    if (galois_element(parameters, static_cast<long long>(step)) != element) continue;
    return "a rotation by " + std::to_string(step) + " needs its key; make evaluation keys with " +
           std::to_string(step) + " among the rotations (a plan lists what a circuit needs)";
  }
  return "the automorphism X -> X^" + std::to_string(element) + " needs its key; make evaluation keys with packing";
}

}  // namespace

void expand_mask(const Parameters& parameters, const SeedBytes& seed_bytes, std::uint32_t index, std::size_t prime,
                 std::uint64_t* out) {
  ring::Seed seed;
  seed.bytes = seed_bytes;
  ring::sample_uniform(seed, {ring::Domain::mask, index, static_cast<std::uint32_t>(prime)}, parameters.prime(prime).q,
                       out, parameters.n(), math::active_isa());
}

SeedBytes derived_seed(const SeedBytes& common, KeyRole role, std::uint32_t element) {
  const std::uint32_t words[3] = {static_cast<std::uint32_t>(ring::Domain::key), static_cast<std::uint32_t>(role),
                                  element};
  ring::ChaChaNonce nonce;
  std::memcpy(nonce.data(), words, sizeof(words));
  std::array<std::uint8_t, ring::kChaChaBlock> block;
  ring::chacha20_keystream(common.data(), nonce, 0, block.data(), 1, math::active_isa());
  SeedBytes seed;
  std::copy_n(block.begin(), seed.size(), seed.begin());
  return seed;
}

SwitchingKey::SwitchingKey(ParametersPtr params, const SeedBytes& seed_bytes)
    : parameters(std::move(params)), seed(seed_bytes) {
  const std::size_t primes = parameters->prime_count();
  words.resize(digits() * 2 * primes * parameters->n());
  math::parallel_for(digits() * primes, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      expand_mask(*parameters, seed, static_cast<std::uint32_t>(i / primes), i % primes,
                  row(i / primes, 1, i % primes));
    }
  });
}

PublicKey::PublicKey(ParametersPtr params, const SeedBytes& seed_bytes)
    : parameters(std::move(params)), seed(seed_bytes) {
  words.resize(2 * parameters->max_limbs() * parameters->n());
  math::parallel_for(parameters->max_limbs(), 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) expand_mask(*parameters, seed, 0, i, row(1, i));
  });
}

std::size_t EvaluationKeys::bytes() const {
  std::size_t total = relinearisation ? relinearisation->words.size() : 0;
  for (const auto& entry : galois) total += entry.second.key->words.size();
  return total * sizeof(std::uint64_t);
}

const SwitchingKey& require_key(const Parameters& parameters, const EvaluationKeys* keys, std::uint32_t element) {
  if (keys != nullptr) {
    if (element == kRelinearisation && keys->relinearisation) return *keys->relinearisation;
    const auto found = keys->galois.find(element);
    if (found != keys->galois.end()) return *found->second.key;
  }
  throw Error(missing_key(parameters, element));
}

std::uint32_t galois_element(const Parameters& parameters, long long steps) {
  const auto slots = static_cast<long long>(parameters.slots());
  const std::uint64_t order = 2 * parameters.n();
  std::uint64_t element = 1, power = 5;
  for (auto exponent = static_cast<std::uint64_t>(((steps % slots) + slots) % slots); exponent != 0; exponent >>= 1) {
    if (exponent & 1) element = element * power % order;
    power = power * power % order;
  }
  return static_cast<std::uint32_t>(element);
}

std::uint32_t conjugation_element(const Parameters& parameters) {
  return static_cast<std::uint32_t>(2 * parameters.n() - 1);
}

std::vector<std::uint32_t> galois_permutation(const Parameters& parameters, std::uint32_t element) {
  const std::size_t n = parameters.n();
  const auto reverse = [&](std::size_t k) {
    std::size_t result = 0;
    for (int bit = 0; bit < parameters.log_n(); ++bit) result = 2 * result + (k >> bit & 1);
    return result;
  };
  // Word i is the value at psi^(2 brv(i) + 1); under the automorphism it is the value at that power's element-th power.
  std::vector<std::uint32_t> index(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t power = (2 * reverse(i) + 1) * element % (2 * n);
    index[i] = static_cast<std::uint32_t>(reverse((power - 1) / 2));
  }
  return index;
}

}  // namespace privtuner::ckks
