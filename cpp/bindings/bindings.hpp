// What the register_*.cpp files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

// A view of a writable buffer of bytes (bytearray, memoryview, uint8 array), valid as long as it lives.
class WritableBytes {
 public:
  explicit WritableBytes(const py::buffer& buffer) : info_(buffer.request()) {
    if (info_.readonly || info_.ndim != 1 || info_.itemsize != 1 || (info_.size > 1 && info_.strides[0] != 1)) {
      throw py::type_error("expected writable, contiguous bytes (bytearray, memoryview or an array of uint8)");
    }
  }
  std::uint8_t* data() const { return static_cast<std::uint8_t*>(info_.ptr); }
  std::size_t size() const { return static_cast<std::size_t>(info_.size); }

 private:
  py::buffer_info info_;
};

// A read-only array over memory that `owner` holds; it keeps the owner alive.
template <class Word, class Owner>
py::array_t<Word> view_of(std::shared_ptr<const Owner> owner, const Word* data, std::vector<py::ssize_t> shape) {
  using Held = std::shared_ptr<const Owner>;
  auto held = std::make_unique<Held>(std::move(owner));
  const py::capsule base(held.get(), [](void* pointer) { delete static_cast<Held*>(pointer); });
  held.release();
  py::array_t<Word> view(std::move(shape), data, base);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

inline std::vector<py::ssize_t> shape_of(std::initializer_list<std::size_t> lengths) {
  return std::vector<py::ssize_t>(lengths.begin(), lengths.end());
}

// A new bytes object of uninitialised content and where to write it.
inline py::bytes new_bytes(std::size_t size, std::uint8_t*& data) {
  PyObject* object = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
  if (object == nullptr) throw py::error_already_set();
  data = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(object));
  return py::reinterpret_steal<py::bytes>(object);
}

// Bytes of a fixed number, such as an id.
template <std::size_t kSize>
std::array<std::uint8_t, kSize> fixed(const py::bytes& bytes, const char* what) {
  const std::string text = bytes;
  std::array<std::uint8_t, kSize> result;
  if (text.size() != kSize) throw std::invalid_argument(std::string(what) + " has " + std::to_string(kSize) + " bytes");
  std::memcpy(result.data(), text.data(), kSize);
  return result;
}

template <std::size_t kSize>
py::bytes bytes_of(const std::array<std::uint8_t, kSize>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), kSize);
}

void register_errors(py::module_& module);
void register_system(py::module_& module);
void register_ring(py::module_& module);
void register_gemm(py::module_& module);
void register_wire(py::module_& module);
void register_linear(py::module_& module);
void register_ckks(py::module_& module);

}  // namespace privtuner::bindings
