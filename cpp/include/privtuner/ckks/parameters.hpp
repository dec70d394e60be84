// Parameters of RNS-CKKS: the ring, the chain of primes, the digits of hybrid key switching, the scales.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "privtuner/ckks/encoder.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/ring/ntt.hpp"
#include "privtuner/ring/residues.hpp"

namespace privtuner::ckks {

// An operation that cannot be done: no level left, scales that disagree, a key that is missing, values out of range.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline constexpr int kMinLogN = 10, kMinSecureLogN = 12, kMaxLogN = 16;
inline constexpr int kMinScaleBits = 20, kMaxScaleBits = 49;
inline constexpr int kMaxPrimeBits = 50;
inline constexpr int kMaxDepth = 40;
inline constexpr double kErrorVariance = 10.5;      // of the centred binomial distribution with eta = 21
inline constexpr double kSecretVariance = 2.0 / 3;  // of a uniform ternary coefficient

// Largest log2(QP) with 128 bits of classical security for uniform ternary secrets and sigma = 3.2, at N = 2^log_n
// (Bossuat et al., "Security Guidelines for Implementing Homomorphic Encryption", IACR ePrint 2024/463). 0 for rings
// too small to have one here.
double max_log_modulus(int log_n);

// What the caller asks for.
struct Wish {
  int depth = 1;        // multiplications in a row
  int scale_bits = 40;  // log2 of the scale
  int first_bits = 0;   // of the prime that is left at level 0; 0: scale_bits + 10, at most 50
  int log_n = 0;        // 0: the smallest secure ring
  bool insecure = false;
};

struct Prime {
  std::uint64_t q;
  ring::ResidueRow row;
  ring::Ntt<std::uint64_t> ntt;
  Prime(std::size_t n, std::uint64_t value) : q(value), row(value), ntt(n, value) {}
};

// Exact conversion of residues modulo a product D of primes to other primes, of the representative in [-D/2, D/2]
// (within 2^-45 D of the ends either one may come out: congruent modulo D all the same).
// x = sum_j y_j D/q_j - u D with y_j = x_j (D/q_j)^-1 mod q_j and u = round(sum_j y_j / q_j) (Halevi, Polyakov, Shoup,
// "An Improved RNS Variant of the BFV Homomorphic Encryption Scheme", 2018, section 2.3).
struct BaseConversion {
  std::vector<std::size_t> from;                    // indices of primes
  std::vector<std::uint64_t> inverse_cofactor;      // (D / q_j)^-1 mod q_j
  std::vector<double> inverse_prime;                // 1 / q_j
  std::vector<std::vector<std::uint64_t>> weights;  // [prime of the chain][from + 1]: D / q_j, and -D, mod that prime
  std::vector<std::uint64_t> inverse_product;       // [prime of the chain]: D^-1, where it exists
};

// Immutable; shared by keys, tensors and evaluators.
class Parameters {
 public:
  // Throws std::invalid_argument naming the value and its range, or why no secure set fits the wish.
  explicit Parameters(const Wish& wish);
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;

  const Wish& wish() const { return wish_; }
  std::string name() const;
  int log_n() const { return log_n_; }
  std::size_t n() const { return std::size_t{1} << log_n_; }
  std::size_t slots() const { return n() / 2; }
  const Encoder& encoder() const { return *encoder_; }
  int depth() const { return wish_.depth; }
  // Limbs of a ciphertext at `level`.
  std::size_t limbs(int level) const { return static_cast<std::size_t>(level) + 1; }
  std::size_t max_limbs() const { return limbs(depth()); }
  std::size_t special_count() const { return primes_.size() - max_limbs(); }
  // Primes 0 .. max_limbs() - 1 are the chain Q, the others the special primes P.
  const Prime& prime(std::size_t i) const { return primes_[i]; }
  std::size_t prime_count() const { return primes_.size(); }
  // The scale a ciphertext at `level` has when every operation keeps to the chain: scale(l - 1) = scale(l)^2 / q_l.
  double scale(int level) const { return scales_[static_cast<std::size_t>(level)]; }
  double log_q() const { return log_q_; }
  double log_qp() const { return log_qp_; }
  // 128 when log_qp is within the table for this ring, else 0.
  int security_bits() const { return log_qp_ <= max_log_modulus(log_n_) ? 128 : 0; }
  // Of everything that ciphertexts and keys depend on.
  std::uint64_t hash() const { return hash_; }

  // Digits of a key switch: `digit_limbs` consecutive limbs each.
  std::size_t digit_limbs() const { return digit_limbs_; }
  std::size_t digits(std::size_t limb_count) const { return (limb_count + digit_limbs_ - 1) / digit_limbs_; }
  // From digit `digit` of a ciphertext of `limb_count` limbs to all primes.
  const BaseConversion& digit_conversion(std::size_t digit, std::size_t limb_count) const;
  // From the special primes, and the limb `limb_count - 1` too if `last`, to the limbs below.
  const BaseConversion& special_conversion(std::size_t limb_count, bool last) const;
  // From limb `limb_count - 1` to the limbs below.
  const BaseConversion& last_conversion(std::size_t limb_count) const { return lasts_[limb_count - 1]; }
  // P mod q_i.
  std::uint64_t special_product(std::size_t i) const { return special_product_[i]; }
  double log_special() const { return log_qp_ - log_q_; }

 private:
  void choose_ring(int first);
  void choose_primes();
  void make_conversions();
  BaseConversion conversion(std::vector<std::size_t> from) const;

  Wish wish_;
  int log_n_ = 0, first_bits_ = 0, special_bits_ = 0;
  std::size_t digit_limbs_ = 0, specials_ = 0;
  double log_q_ = 0, log_qp_ = 0;
  std::uint64_t hash_ = 0;
  std::unique_ptr<Encoder> encoder_;
  std::vector<Prime> primes_;
  std::vector<double> scales_;
  std::vector<BaseConversion> digits_, with_last_, lasts_;
  std::vector<BaseConversion> specials_alone_;  // one entry
  std::vector<std::uint64_t> special_product_;
};

using ParametersPtr = std::shared_ptr<const Parameters>;

}  // namespace privtuner::ckks
