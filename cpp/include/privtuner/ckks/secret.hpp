// The data owner's side: the secret key, encryption and decryption. A server needs none of this.
#pragma once

#include <memory>
#include <vector>

#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/plaintext.hpp"
#include "privtuner/ckks/tensor.hpp"

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

// Throws Error if the values cannot be encrypted: too many tokens, one that is not finite or above the bound.
void check_values(const Parameters& parameters, const Values& values, double bound);
// Throws Error if values as large as the tensor's bound do not fit its modulus.
void check_room(const Tensor& tensor);

// A uniform ternary secret. Never copied, never serialised; wiped when released.
class SecretKey {
 public:
  explicit SecretKey(ParametersPtr parameters);

  const ParametersPtr& parameters() const { return parameters_; }

  // The seed of component 1 travels instead of it. Throws Error when values pass the bound or the tokens the slots.
  TensorPtr encrypt(const Values& values, const Fresh& fresh) const;

  // tokens x features values, row-major; im may be null. Throws Error when a value is beyond the tensor's bound: then
  // it left the domain of an approximation or the modulus, and no digit of it can be trusted.
  void decrypt(const Tensor& tensor, double* re, double* im) const;

  // The coefficients over the scale instead of the slots, [feature][N]: for sums that were packed. Throws as decrypt.
  void decrypt_coefficients(const Tensor& tensor, double* out) const;

  std::shared_ptr<const PublicKey> public_key() const;
  std::shared_ptr<const SwitchingKey> relinearisation_key() const;
  GaloisKey galois_key(std::uint32_t element) const;

 private:
  void check_decryptable(const Tensor& tensor) const;
  // The raw coefficients of one feature, N.
  void coefficients(const Tensor& tensor, std::size_t feature, double* out) const;

  // An encryption under the secret's image by `automorphism` (null: the secret) of P times `source` [limb][N].
  std::shared_ptr<const SwitchingKey> switching_key(const std::uint64_t* source,
                                                    const ring::Automorphism* automorphism) const;
  const std::uint64_t* row(std::size_t prime) const { return words_.data() + prime * parameters_->n(); }

  ParametersPtr parameters_;
  math::SecretBuffer<std::uint64_t> words_;  // [prime of QP][N], NTT domain
};

// Encryption without the secret.
TensorPtr encrypt(const PublicKey& key, const Values& values, const Fresh& fresh);

}  // namespace privtuner::ckks
