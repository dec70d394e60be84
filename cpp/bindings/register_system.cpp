// Version, instruction-set paths, threads.
#include <string>

#include "bindings.hpp"
#include "privtuner/math/cpu.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::bindings {

void register_system(py::module_& module) {
  module.attr("__version__") = PRIVTUNER_VERSION;
#if defined(__clang__)
  module.attr("compiler") = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  module.attr("compiler") = std::string("gcc ") + __VERSION__;
#else
  module.attr("compiler") = "unknown";
#endif
  module.attr("openfhe_status") =
      PRIVTUNER_OPENFHE_STATUS;  // where OpenFHE was found, or why this build goes without it

  module.def("isa_paths", [] {
    py::list paths;
    for (const auto& [isa, name, base] : math::kIsaPaths) {
      py::dict path;
      path["name"] = name;
      path["compiled"] = math::isa_compiled(isa);
      path["usable"] = math::isa_usable(isa);
      path["obstacle"] = math::isa_obstacle(isa);
      paths.append(path);
    }
    return paths;
  });
  module.def("active_isa", [] { return math::isa_name(math::active_isa()); });
  module.def(
      "set_active_isa", [](const std::string& name) { math::set_active_isa(math::isa_from_name(name)); },
      py::arg("name"));
  module.def("num_threads", &math::num_threads);
  module.def("set_num_threads", &math::set_num_threads, py::arg("n"));
}

}  // namespace privtuner::bindings
