#include "bindings.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of privtuner. Private: use the modules of the package.";
  privtuner::bindings::register_errors(module);
  privtuner::bindings::register_system(module);
  privtuner::bindings::register_wire(module);
  privtuner::bindings::register_ring(module);
  privtuner::bindings::register_linear(module);
  privtuner::bindings::register_ckks(module);
  privtuner::bindings::register_gemm(module);
}
