// The envelope of all messages, as the submodule `wire`.
#include <algorithm>
#include <cstring>
#include <deque>
#include <string>

#include "bindings.hpp"
#include "privtuner/wire/envelope.hpp"

namespace privtuner::bindings {
namespace {

// The bytes of a contiguous buffer of any shape and type, valid as long as it lives.
class Part {
 public:
  explicit Part(py::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~Part() { PyBuffer_Release(&view_); }
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

template <class Names>
py::tuple tuple_of(const Names& names) {
  py::list list;
  for (const char* name : names) list.append(name);
  return py::tuple(list);
}

// The place of `name` among the names of kinds or directions.
template <class Names>
std::uint8_t place_of(const char* what, const Names& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found != names.end()) return static_cast<std::uint8_t>(found - names.begin());
  std::string choice;
  for (const char* other : names) choice += (choice.empty() ? "" : ", ") + std::string(other);
  throw std::invalid_argument(std::string(what) + " '" + name + "': choose one of " + choice);
}

wire::Kind kind_of(const std::string& name) {
  return static_cast<wire::Kind>(1 + place_of("kind", wire::kKindNames, name));
}

py::tuple fields_of(const wire::Head& head) {
  return py::make_tuple(wire::name(head.kind), wire::name(head.direction), head.parameters, bytes_of(head.subject),
                        bytes_of(head.request), head.tokens, head.features, head.length);
}

py::tuple peek(const py::buffer& data) {
  const Bytes bytes(data);
  return fields_of(wire::peek(bytes.data(), bytes.size()));
}

py::bytes seal(const std::string& kind, const py::list& parts, const std::string& direction, std::uint64_t parameters,
               const py::bytes& subject, const py::bytes& request, std::uint32_t tokens, std::uint32_t features) {
  wire::Head head{kind_of(kind)};
  head.direction = static_cast<wire::Direction>(place_of("direction", wire::kDirectionNames, direction));
  head.parameters = parameters;
  head.subject = fixed<16>(subject, "a subject");
  head.request = fixed<16>(request, "a request id");
  head.tokens = tokens;
  head.features = features;
  std::deque<Part> pieces;
  std::size_t size = wire::kHeadBytes;
  for (const py::handle& part : parts) size += pieces.emplace_back(part).size();
  std::uint8_t* message = nullptr;
  py::bytes bytes = new_bytes(size, message);
  const py::gil_scoped_release release;
  std::uint8_t* at = message + wire::kHeadBytes;
  for (const Part& piece : pieces) {
    if (piece.size() > 0) std::memcpy(at, piece.data(), piece.size());
    at += piece.size();
  }
  wire::seal(head, message, size);
  return bytes;
}

py::tuple open(const std::string& kind, const py::buffer& data) {
  const Bytes bytes(data);
  const wire::Kind wanted = kind_of(kind);
  const wire::Head head = [&] {
    const py::gil_scoped_release release;
    return wire::open(wanted, bytes.data(), bytes.size());
  }();
  return fields_of(head);
}

}  // namespace

void register_wire(py::module_& module) {
  py::module_ submodule = module.def_submodule("wire", "One envelope for every message: see privtuner.wire.");
  submodule.attr("VERSION") = wire::kVersion;
  submodule.attr("HEAD_BYTES") = wire::kHeadBytes;
  submodule.attr("KINDS") = tuple_of(wire::kKindNames);
  submodule.attr("DIRECTIONS") = tuple_of(wire::kDirectionNames);
  submodule.def("peek", &peek, py::arg("data"));
  submodule.def("seal", &seal, py::arg("kind"), py::arg("parts"), py::arg("direction"), py::arg("parameters"),
                py::arg("subject"), py::arg("request"), py::arg("tokens"), py::arg("features"));
  submodule.def("open", &open, py::arg("kind"), py::arg("data"));
}

}  // namespace privtuner::bindings
