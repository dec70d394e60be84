// What the files of the evaluator share.
#pragma once

#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "features.hpp"
#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::ckks {

inline constexpr double kSameScale = 1e-9;    // relative; scales that agree differ by roundings of doubles
inline constexpr double kLeastFactor = 4096;  // smallest scale of an encoded constant: 12 bits of it survive

inline constexpr std::size_t kTile = 1024;  // words of a row that are worked on at a time; the smallest row has as many

inline std::string bits(double scale) { return "2^" + std::to_string(std::log2(scale)); }

inline std::string describe(const Tensor& x) {
  return "(" + std::to_string(x.tokens) + ", " + std::to_string(x.features) + ") at level " + std::to_string(x.level);
}

inline bool same(double a, double b) { return std::fabs(a - b) <= kSameScale * b; }

// What of feature f's noise other features of a result may have too: all of it where one feature serves many.
inline double shared_noise(const Tensor& x, std::size_t f, std::size_t features, bool crosswise) {
  if (x.features == 1) return features == 1 && !crosswise ? x.shared[0] : x.noise[0];
  return crosswise ? x.noise[f] : x.shared[f];
}

inline double norm(double a, double b) { return std::sqrt(a * a + b * b); }

inline std::vector<double> per_feature(const std::vector<double>& values, std::size_t features, const char* what) {
  if (values.size() == features) return values;
  if (values.size() == 1) return std::vector<double>(features, values[0]);
  throw Error(std::to_string(values.size()) + " " + what + " for " + std::to_string(features) +
              " features; pass one, or one a feature");
}

// Constants and weights times their scales, as they are encoded.
inline void require_room(const std::vector<double>& encoded, const char* what) {
  for (const double value : encoded) {
    if (!(std::fabs(value) < 0x1p900))
      throw Error(std::string(what) + " times their scale pass 2^900; pass smaller ones");
  }
}

inline void require_finite(const std::vector<double>& values, const char* what) {
  for (const double value : values) {
    if (!std::isfinite(value)) throw Error(std::string(what) + " hold NaN or infinity");
  }
}

// Words from the evaluator's pool: fresh pages cost more than the arithmetic on them.
class Evaluator::Scratch {
 public:
  Scratch(const Evaluator& evaluator, std::size_t words) : evaluator_(evaluator) {
    if (words == 0) return;
    {
      const std::lock_guard<std::mutex> lock(evaluator_.pool_mutex_);
      for (auto& kept : evaluator_.pool_) {
        if (kept.size() < words || kept.size() > 2 * words) continue;
        words_.swap(kept);
        kept.swap(evaluator_.pool_.back());
        evaluator_.pool_.pop_back();
        return;
      }
    }
    words_.resize(words);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (words_.empty()) return;
    constexpr std::size_t kKept = 64;
    const std::lock_guard<std::mutex> lock(evaluator_.pool_mutex_);
    if (evaluator_.pool_.size() < kKept) evaluator_.pool_.push_back(std::move(words_));
  }
  std::uint64_t* data() { return words_.data(); }

 private:
  const Evaluator& evaluator_;
  math::AlignedVector<std::uint64_t> words_;
};

// The digits of one ciphertext component at all targets, which are its limbs and then the special primes: what every
// key switch of it starts from.
struct Evaluator::Decomposition {
  Decomposition(const Evaluator& evaluator, const std::uint64_t* of, std::size_t limb_count);

  std::uint64_t* word_row(std::size_t digit, std::size_t target) {
    return words.data() + (digit * targets + target) * n;
  }
  // The limbs of a digit are its residues already.
  bool own(std::size_t digit, std::size_t target) const { return target < limbs && target / digit_limbs == digit; }
  const std::uint64_t* row(std::size_t digit, std::size_t target) {
    return own(digit, target) ? rows + target * n : word_row(digit, target);
  }

  const std::uint64_t* rows;  // [limb][N], NTT domain
  std::size_t n, limbs, targets, digit_limbs, digits;
  Scratch words;             // [digit][target][N]; where the digit has residues already, y_j of BaseConversion
  bool transformed = false;  // words are in the NTT domain, not coefficients
};

// What becomes of a key switch: (switched + P added) divided by the primes of a conversion, then permuted.
struct Evaluator::Switched {
  const BaseConversion& division;
  std::size_t kept;                        // limbs of the result
  const std::uint64_t* added[2];           // [limb][N], NTT domain; null: nothing
  const ring::Automorphism* automorphism;  // null: none
  std::uint64_t* out[2];                   // [limb][N], NTT domain
};

}  // namespace privtuner::ckks
