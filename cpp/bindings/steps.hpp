// Recorded steps as Python sees them.
#pragma once

#include <vector>

#include "bindings.hpp"
#include "privtuner/ckks/recording.hpp"

namespace privtuner::bindings {

// (storage, first feature, features, level).
py::tuple tuple_of(const ckks::TensorRef& ref);

// One dict a step: "kind" is combine, add, sum, copy, plain, product, matrix, galois or monomial, the other keys are
// the fields of ckks::step; tensors are tuples as above, arrays that are not there None. The arrays are read-only.
py::list list_of(std::vector<ckks::Step> steps);

}  // namespace privtuner::bindings
