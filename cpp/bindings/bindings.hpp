// What the register_*.cpp files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace privtuner::bindings {

namespace py = pybind11;

// A read-only view of any bytes-like object, valid as long as it lives.
class Bytes {
 public:
  explicit Bytes(const py::buffer& buffer) : info_(buffer.request()) {
    if (info_.ndim != 1 || info_.itemsize != 1 || (info_.size > 1 && info_.strides[0] != 1)) {
      throw py::type_error("expected contiguous bytes (bytes, bytearray or memoryview)");
    }
  }
  const std::uint8_t* data() const { return static_cast<const std::uint8_t*>(info_.ptr); }
  std::size_t size() const { return static_cast<std::size_t>(info_.size); }

 private:
  py::buffer_info info_;
};

// A new bytes object of uninitialised content and where to write it.
inline py::bytes new_bytes(std::size_t size, std::uint8_t*& data) {
  PyObject* object = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (object == nullptr) throw py::error_already_set();
  data = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(object));
  return py::reinterpret_steal<py::bytes>(object);
}

void register_errors(py::module_& module);
void register_system(py::module_& module);
void register_gemm(py::module_& module);
void register_linear(py::module_& module);
void register_ckks(py::module_& module);

}  // namespace privtuner::bindings
