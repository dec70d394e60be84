// The loop over the features of a tensor.
#pragma once

#include <cstddef>
#include <functional>

#include "privtuner/math/parallel.hpp"

namespace privtuner::ckks {

// One feature uses all threads inside, many features one thread each.
inline void for_features(std::size_t count, const std::function<void(std::size_t)>& body) {
  if (count == 1) return body(0);
  math::parallel_for(count, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t f = begin; f < end; ++f) body(f);
  });
}

}  // namespace privtuner::ckks
