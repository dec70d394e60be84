// Recorded steps as Python sees them, in the module `steps`: a class a kind, with the fields of ckks::step.
#pragma once

#include "bindings.hpp"

namespace privtuner::bindings {

// Fields are read-only, and arrays views of the step's own memory that keep it alive. The sums of a step lie flat in it
// (terms, weights, constants); an array that is not there is None.
void register_steps(py::module_& parent);

}  // namespace privtuner::bindings
