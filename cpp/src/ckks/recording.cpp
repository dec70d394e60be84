#include "privtuner/ckks/recording.hpp"

#include <stdexcept>
#include <utility>

namespace privtuner::ckks {

Recording::Recording(std::size_t batch) : batch_(batch) {
  if (batch < 1) throw std::invalid_argument("a batch of 0 features; pass 1 or more");
}

void Recording::add(Step step) {
  const std::lock_guard<std::mutex> lock(mutex_);
  steps_.push_back(std::move(step));
}

std::vector<Step> Recording::take() {
  std::vector<Step> steps;
  const std::lock_guard<std::mutex> lock(mutex_);
  steps.swap(steps_);
  return steps;
}

}  // namespace privtuner::ckks
