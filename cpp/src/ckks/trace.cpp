#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::ckks {

const char* work_name(Work work) {
  constexpr const char* kNames[] = {"product", "relinearise", "decompose", "rotate", "rescale", "term",
                                    "plain",   "matrix",      "mask",      "unmask", "refresh"};
  return kNames[static_cast<int>(work)];
}

void Trace::count(Work work, std::size_t limbs, double amount) {
  const std::lock_guard<std::mutex> lock(mutex_);
  work_[{work, limbs}] += amount;
}
void Trace::count_refresh(std::size_t ciphertexts, int level) {
  const std::lock_guard<std::mutex> lock(mutex_);
  refreshes_.push_back({ciphertexts, level});
}
void Trace::need_relinearisation() {
  const std::lock_guard<std::mutex> lock(mutex_);
  relinearisation_ = true;
}
void Trace::need_galois(std::uint32_t element) {
  const std::lock_guard<std::mutex> lock(mutex_);
  galois_.insert(element);
}
std::map<std::pair<Work, std::size_t>, double> Trace::work() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return work_;
}
bool Trace::relinearisation() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return relinearisation_;
}
std::set<std::uint32_t> Trace::galois() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return galois_;
}
std::vector<RefreshCount> Trace::refreshes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return refreshes_;
}
void Trace::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  work_.clear();
  galois_.clear();
  refreshes_.clear();
  relinearisation_ = false;
}

Matrix::Matrix(gemm::Weights weights, std::vector<double> delta)
    : weights_(std::move(weights)), delta_(std::move(delta)) {
  if (delta_.size() != weights_.rows()) {
    throw std::invalid_argument(std::to_string(delta_.size()) + " row scales for " + std::to_string(weights_.rows()) +
                                " rows");
  }
  for (std::size_t r = 0; r < delta_.size(); ++r) {
    if (!(delta_[r] > 0) || !std::isfinite(delta_[r])) {
      throw std::invalid_argument("the scale of row " + std::to_string(r) + " is not a positive number");
    }
  }
}

}  // namespace privtuner::ckks
