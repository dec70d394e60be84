// Work space of the evaluator, shared by its files.
#pragma once

#include <utility>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::ckks {

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

// The digits of one ciphertext component: what every key switch of it starts from.
struct Evaluator::Decomposition {
  const std::uint64_t* rows = nullptr;  // NTT domain
  std::size_t limbs = 0;
  std::uint64_t* scaled;     // [limb][N] y_j of BaseConversion, coefficients
  std::uint64_t* quotients;  // [digit][N]
};

}  // namespace privtuner::ckks
