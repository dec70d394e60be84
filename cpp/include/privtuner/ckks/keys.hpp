// What the server holds: public, relinearisation and rotation keys. No type here contains a secret.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "privtuner/ckks/parameters.hpp"
#include "privtuner/math/memory.hpp"

namespace privtuner::ckks {

using SeedBytes = std::array<std::uint8_t, 32>;

// What a key is for, where its random half is derived from randomness that both sides have a part in: an owner who
// chose it could, with zeros, undo what others add to hide where a ciphertext comes from.
enum class KeyRole : std::uint32_t { encryption = 0, evaluation = 1 };

// The seed of the random half of a key: the first bytes of the keystream of `common` for its role and element (0 for
// relinearisation and encryption).
SeedBytes derived_seed(const SeedBytes& common, KeyRole role, std::uint32_t element);

// Encryptions of P s' D_i* under another secret, one a digit: [digit][component 2][prime of QP][N], NTT domain.
// Component 1 of digit i is the public stream (seed, i), so that it travels as 32 bytes.
struct SwitchingKey {
  ParametersPtr parameters;
  SeedBytes seed{};
  math::AlignedVector<std::uint64_t> words;

  // Uninitialised component 0; component 1 expanded from the seed.
  SwitchingKey(ParametersPtr parameters, const SeedBytes& seed);
  std::size_t digits() const { return parameters->digits(parameters->max_limbs()); }
  std::uint64_t* row(std::size_t digit, int component, std::size_t prime) {
    return words.data() +
           ((digit * 2 + static_cast<std::size_t>(component)) * parameters->prime_count() + prime) * parameters->n();
  }
  const std::uint64_t* row(std::size_t digit, int component, std::size_t prime) const {
    return const_cast<SwitchingKey*>(this)->row(digit, component, prime);
  }
};

// The automorphism X -> X^element and the key that leads back to the secret afterwards. The switch comes first, to the
// secret under the inverse automorphism, so that a hoisted rotation permutes two rows a limb and no digit.
struct GaloisKey {
  std::uint32_t element;
  std::shared_ptr<const SwitchingKey> key;
};

// 5^steps mod 2N for a rotation by `steps` (any sign), 2N - 1 for conjugation.
std::uint32_t galois_element(const Parameters& parameters, long long steps);
std::uint32_t conjugation_element(const Parameters& parameters);
// Source index of every word of a row under X -> X^element, in the NTT's order.
std::vector<std::uint32_t> galois_permutation(const Parameters& parameters, std::uint32_t element);

// The keys a circuit needs. Immutable once handed to an evaluator.
struct EvaluationKeys {
  ParametersPtr parameters;
  std::shared_ptr<const SwitchingKey> relinearisation;  // null: no products of ciphertexts
  std::map<std::uint32_t, GaloisKey> galois;
  std::size_t bytes() const;  // in memory
};

// The element that stands for relinearisation where keys are named by their automorphisms, which are odd.
inline constexpr std::uint32_t kRelinearisation = 0;

// The key of one automorphism, or of relinearisation. keys may be null. Throws Error naming what is missing.
const SwitchingKey& require_key(const Parameters& parameters, const EvaluationKeys* keys, std::uint32_t element);

// An encryption of zero, for those who encrypt without the secret: [component 2][limb][N].
struct PublicKey {
  ParametersPtr parameters;
  SeedBytes seed{};
  math::AlignedVector<std::uint64_t> words;

  PublicKey(ParametersPtr parameters, const SeedBytes& seed);
  std::uint64_t* row(int component, std::size_t limb) {
    return words.data() + (static_cast<std::size_t>(component) * parameters->max_limbs() + limb) * parameters->n();
  }
  const std::uint64_t* row(int component, std::size_t limb) const {
    return const_cast<PublicKey*>(this)->row(component, limb);
  }
};

// The public stream (seed, index) modulo prime `prime`.
void expand_mask(const Parameters& parameters, const SeedBytes& seed, std::uint32_t index, std::size_t prime,
                 std::uint64_t* out);

}  // namespace privtuner::ckks
