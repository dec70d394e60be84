// Encrypted tensors, feature-major: tokens in the slots, one ciphertext a feature.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "privtuner/ckks/parameters.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ckks {

inline constexpr double kLeastScale = 0.5;  // below it nothing of a value is left

// Bytes of the tensors that are alive, and the most there ever were: what a dry run reports as memory.
class Ledger {
 public:
  void add(std::size_t bytes) {
    const std::size_t now = live_.fetch_add(bytes) + bytes;
    std::size_t peak = peak_.load();
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
  }
  void remove(std::size_t bytes) { live_.fetch_sub(bytes); }
  std::size_t live() const { return live_.load(); }
  std::size_t peak() const { return peak_.load(); }
  void reset_peak() { peak_.store(live_.load()); }

 private:
  std::atomic<std::size_t> live_{0}, peak_{0};
};

// Features [first, first + features) of the words that storage number `storage` holds, or would hold. No number is
// given twice in one process.
struct TensorRef {
  std::uint64_t storage;
  std::size_t first, features;
  int level;
};

// `features` ciphertexts of one level, [feature][component 2][limb][N], NTT domain, every word below its prime.
//
// A feature f holds values = slots / scale[f], with an error of standard deviation noise[f] / scale[f] in the real part
// of a slot, and of every slot |value| <= bound (declared or derived; what the error of a product is predicted from).
// shared[f] is the part of noise[f] that other features may have from the same source, as after a matrix product: in a
// sum over features shared parts add up, the others' squares do.
// A planned tensor has everything but the words: operations on it carry level, scale and error alone. A copy shares the
// words.
struct Tensor {
  ParametersPtr parameters;
  std::size_t tokens = 0, features = 0;
  int level = 0;
  bool planned = false;
  double bound = 0;
  std::vector<double> scale, noise, shared;
  std::optional<std::array<std::uint8_t, 32>> seed;  // component 1 of feature f is the public stream (seed, f)

  // Uninitialised words, or none if planned. Scale and noise are set by the caller.
  Tensor(ParametersPtr parameters, std::size_t tokens, std::size_t features, int level, bool planned,
         std::shared_ptr<Ledger> ledger);

  // The part of noise[f] that no other feature has.
  double own_noise(std::size_t f) const {
    return std::sqrt(std::max(0.0, noise[f] * noise[f] - shared[f] * shared[f]));
  }
  // Whether two tensors are of the same words but not the same features: then their errors meet crosswise.
  bool overlaps(const Tensor& other) const {
    return storage_ == other.storage_ && (first_ != other.first_ || features != other.features);
  }

  // Features [begin, end), sharing the words. begin < end <= features.
  Tensor view(std::size_t begin, std::size_t end) const;

  // Which words these are, with or without words at hand.
  TensorRef ref() const;
  // A tensor of its own that knows all about these words but has none.
  Tensor as_planned() const;
  // A tensor of its own with all that this one knows, and room for its words.
  Tensor with_room() const;
  // The same words without their error: what an operation adds is the error of its result.
  Tensor without_noise() const;
  // A tensor of its own with all that this planned one knows, and a copy of these words, [feature][component][limb][N].
  // Throws std::invalid_argument for a word that is not below its prime.
  Tensor with_words(const std::uint64_t* words) const;

  std::size_t limbs() const { return parameters->limbs(level); }
  std::size_t bytes() const { return features * 2 * limbs() * parameters->n() * sizeof(std::uint64_t); }
  std::uint64_t* row(std::size_t feature, int component, std::size_t limb) {
    return words_ + ((feature * 2 + static_cast<std::size_t>(component)) * limbs() + limb) * parameters->n();
  }
  const std::uint64_t* row(std::size_t feature, int component, std::size_t limb) const {
    return const_cast<Tensor*>(this)->row(feature, component, limb);
  }
  // Standard deviation of the error of the worst feature's values.
  double error() const;
  // What the worst of all slots' errors stays below, but for one case in a million.
  double worst_error() const;

 private:
  struct Storage;
  Tensor moved(bool without_words) const;
  std::shared_ptr<Storage> storage_;
  std::size_t first_ = 0;  // feature of the storage that is feature 0 here
  std::uint64_t* words_ = nullptr;
};

using TensorPtr = std::shared_ptr<const Tensor>;

// Worst of `count` errors of standard deviation 1, but for one case in a million. An error that the secret multiplies
// is a product of two Gaussians in every slot, whose real part has the Laplace distribution; its tail bounds the
// others'.
double worst_of(double count);

}  // namespace privtuner::ckks
