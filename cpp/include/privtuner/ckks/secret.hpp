// The data owner's side: the secret key, encryption and decryption. A server needs none of this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/plaintext.hpp"
#include "privtuner/ckks/tensor.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ckks {

// What fresh ciphertexts look like.
struct Fresh {
  int level;
  double bound;               // |value| <= bound, public: encrypt throws Error if a value is above it
  std::vector<double> scale;  // one a feature
};

// Standard deviation of the error of a fresh ciphertext, in units of 1 / scale.
double fresh_noise(const Parameters& parameters, bool with_public_key);
// A fresh tensor without words, for planning.
TensorPtr planned_tensor(const ParametersPtr& parameters, std::size_t tokens, std::size_t features, const Fresh& fresh,
                         bool with_public_key, const std::shared_ptr<Ledger>& ledger);

// The same of numbers in the coefficients (encrypt_coefficients), whose errors are those of coefficients.
TensorPtr planned_coefficients(const ParametersPtr& parameters, std::size_t features, const Fresh& fresh,
                               const std::shared_ptr<Ledger>& ledger);

// Throws Error if the values cannot be encrypted: too many tokens, one that is not finite or above the bound.
void check_values(const Parameters& parameters, const Values& values, double bound);
// Throws Error for one of the numbers that is not finite or above the bound.
void check_numbers(const double* numbers, std::size_t count, double bound);
// Throws Error if values as large as the tensor's bound do not fit its modulus.
void check_room(const Tensor& tensor);

// A uniform ternary secret. Never copied, never serialised; wiped when released.
class SecretKey {
 public:
  // The seed decides the secret: whoever has it has the key.
  explicit SecretKey(ParametersPtr parameters, const ring::Seed& seed = ring::Seed::from_os());

  const ParametersPtr& parameters() const { return parameters_; }

  // The seed of component 1 travels instead of it. Throws Error when values pass the bound or the tokens the slots.
  TensorPtr encrypt(const Values& values, const Fresh& fresh) const;

  // The same of numbers that stand in the coefficients instead of the slots, [feature][N].
  TensorPtr encrypt_coefficients(const double* numbers, std::size_t features, const Fresh& fresh) const;

  // tokens x features values, row-major; im may be null. Throws Error when a value is beyond the tensor's bound: then
  // it left the domain of an approximation or the modulus, and no digit of it can be trusted.
  void decrypt(const Tensor& tensor, double* re, double* im) const;

  // The coefficients over the scale instead of the slots, [feature][N]: for sums that were packed. Throws as decrypt.
  void decrypt_coefficients(const Tensor& tensor, double* out) const;

  // Keys whose random halves are derived from `common`, or for null from a seed of their own. Two keys of one kind and
  // one `common` would tell the difference of their errors: the second one is refused with Error.
  std::shared_ptr<const PublicKey> public_key(const SeedBytes* common = nullptr) const;
  std::shared_ptr<const SwitchingKey> relinearisation_key(const SeedBytes* common = nullptr) const;
  GaloisKey galois_key(std::uint32_t element, const SeedBytes* common = nullptr) const;

  // Answers a refresh (messages.hpp) of `count` ciphertexts, at `level`: refreshed_bytes() bytes. What they decrypt to
  // decides nothing, least of all which steps are taken. Throws MessageError, Error for a level that cannot be.
  void refresh(const std::uint8_t* message, std::size_t size, std::size_t count, int level, std::uint8_t* out) const;

  // The coefficients of a tensor at level 0, [feature][N], exact modulo its one prime. For what somebody else masked
  // (refresh.hpp, mask_opening): the steps taken are the same whatever it holds.
  void open(const Tensor& masked, std::uint64_t* out) const;

 private:
  // Encrypts the coefficients that `fill(feature, out)` writes, of a tensor without words yet.
  template <class Fill>
  void encrypt_into(Tensor& tensor, Fill fill) const;
  void check_decryptable(const Tensor& tensor) const;
  // The raw coefficients of one feature, N.
  void coefficients(const Tensor& tensor, std::size_t feature, double* out) const;

  // An encryption under the secret's image by `automorphism` (null: the secret) of P times `source` [limb][N].
  std::shared_ptr<const SwitchingKey> switching_key(const std::uint64_t* source, const ring::Automorphism* automorphism,
                                                    const SeedBytes& seed) const;
  SeedBytes key_seed(const SeedBytes* common, KeyRole role, std::uint32_t element) const;
  const std::uint64_t* row(std::size_t prime) const { return words_.data() + prime * parameters_->n(); }

  ParametersPtr parameters_;
  math::SecretBuffer<std::uint64_t> words_;  // [prime of QP][N], NTT domain
  mutable std::mutex derived_mutex_;
  mutable std::set<SeedBytes> derived_;  // seeds of keys that were made of common randomness
};

// Encryption without the secret.
TensorPtr encrypt(const PublicKey& key, const Values& values, const Fresh& fresh);

}  // namespace privtuner::ckks
