#include "steps.hpp"

#include <pybind11/stl.h>

#include <utility>
#include <variant>

namespace privtuner::bindings {
namespace {

namespace step = ckks::step;

py::list list_of(const std::vector<ckks::TensorRef>& refs) {
  py::list list;
  for (const ckks::TensorRef& ref : refs) list.append(tuple_of(ref));
  return list;
}

// The buffer's words, handed over without a copy; None if there are none.
template <class Buffer>
py::object array_of(Buffer buffer, std::vector<py::ssize_t> shape) {
  if (buffer.size() == 0) return py::none();
  const auto owner = std::make_shared<const Buffer>(std::move(buffer));
  return view_of(owner, owner->data(), std::move(shape));
}

void put(py::dict& out, step::Terms terms, std::size_t limbs, std::size_t features) {
  const auto l = static_cast<py::ssize_t>(limbs), f = static_cast<py::ssize_t>(features);
  out["terms"] = list_of(terms.terms);
  out["weights"] = array_of(std::move(terms.weights), {l, static_cast<py::ssize_t>(terms.terms.size()), f});
  out["constants"] = array_of(std::move(terms.constants), {l, f});
}

struct ToDict {
  py::dict operator()(step::Combine s) const {
    py::dict out = start("combine", s.out);
    put(out, std::move(s.sum), s.limbs, s.out.features);
    out["rescaled"] = s.rescaled;
    out["limbs"] = s.limbs;
    return out;
  }
  py::dict operator()(step::Add s) const {
    py::dict out = start("add", s.out);
    out["x"] = tuple_of(s.x);
    out["y"] = tuple_of(s.y);
    out["minus"] = s.minus;
    return out;
  }
  py::dict operator()(step::Sum s) const {
    py::dict out = start("sum", s.out);
    out["x"] = tuple_of(s.x);
    return out;
  }
  py::dict operator()(step::Copy s) const {
    py::dict out = start("copy", s.out);
    out["parts"] = list_of(s.parts);
    return out;
  }
  py::dict operator()(step::Plain s) const {
    py::dict out = start("plain", s.out);
    out["x"] = tuple_of(s.x);
    const std::size_t features = s.out.features, n = s.coefficients.size() / features;
    out["coefficients"] =
        array_of(std::move(s.coefficients), {static_cast<py::ssize_t>(features), static_cast<py::ssize_t>(n)});
    out["limbs"] = s.limbs;
    return out;
  }
  py::dict operator()(step::Product s) const {
    py::dict out = start("product", s.out);
    out["x"] = tuple_of(s.x);
    out["y"] = tuple_of(s.y);
    out["summed"] = s.summed;
    out["multipliers"] = array_of(std::move(s.multipliers),
                                  {static_cast<py::ssize_t>(s.limbs), static_cast<py::ssize_t>(s.out.features)});
    put(out, std::move(s.addend), s.limbs, s.out.features);
    out["limbs"] = s.limbs;
    return out;
  }
  py::dict operator()(step::Matrix s) const {
    py::dict out = start("matrix", s.out);
    out["x"] = tuple_of(s.x);
    out["transpose"] = s.transpose;
    return out;
  }
  py::dict operator()(step::Galois s) const {
    py::dict out;
    out["kind"] = "galois";
    out["x"] = tuple_of(s.x);
    out["outs"] = list_of(s.outs);
    out["elements"] = s.elements;
    return out;
  }
  py::dict operator()(step::Monomial s) const {
    py::dict out = start("monomial", s.out);
    out["x"] = tuple_of(s.x);
    out["power"] = s.power;
    return out;
  }

 private:
  static py::dict start(const char* kind, const ckks::TensorRef& ref) {
    py::dict out;
    out["kind"] = kind;
    out["out"] = tuple_of(ref);
    return out;
  }
};

}  // namespace

py::tuple tuple_of(const ckks::TensorRef& ref) {
  return py::make_tuple(ref.storage, ref.first, ref.features, ref.level);
}

py::list list_of(std::vector<ckks::Step> steps) {
  py::list list;
  for (ckks::Step& step : steps) list.append(std::visit(ToDict(), std::move(step)));
  return list;
}

}  // namespace privtuner::bindings
