// C++ exceptions become the package's own, so that users catch one family.
#include "bindings.hpp"
#include "privtuner/ckks/parameters.hpp"
#include "privtuner/linear/owner.hpp"
#include "privtuner/math/bytes.hpp"

namespace privtuner::bindings {

void register_errors(py::module_&) {
  const py::module_ errors = py::module_::import("privtuner.errors");
  const auto named = [&](const char* name) { return py::object(errors.attr(name)).release().ptr(); };
  static PyObject* message_error = named("MessageError");
  static PyObject* secret_error = named("SecretError");
  static PyObject* ckks_error = named("CkksError");
  static PyObject* input_error = named("InputError");
  static PyObject* engine_error = named("EngineError");
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const math::MessageError& error) {
      PyErr_SetString(message_error, error.what());
    } catch (const linear::SecretError& error) {
      PyErr_SetString(secret_error, error.what());
    } catch (const ckks::Error& error) {
      PyErr_SetString(ckks_error, error.what());
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(input_error, error.what());
    } catch (const py::builtin_exception&) {
      throw;  // one of pybind11's own, which are runtime errors too
    } catch (const std::runtime_error& error) {
      // A path or a number of threads that the environment asks for in vain, or no randomness from the system.
      PyErr_SetString(engine_error, error.what());
    }
  });
}

}  // namespace privtuner::bindings
