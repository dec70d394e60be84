#include "steps.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "privtuner/ckks/recording.hpp"

namespace privtuner::bindings {
namespace {

namespace step = ckks::step;

template <class Step>
using Class = py::class_<Step, std::shared_ptr<Step>>;

// Words of the step, or None where it has none.
template <class Step>
py::object words_of(const std::shared_ptr<Step>& s, const std::vector<std::uint64_t>& words,
                    std::initializer_list<std::size_t> shape) {
  if (words.empty()) return py::none();
  return view_of<std::uint64_t, Step>(s, words.data(), shape_of(shape));
}

template <class Step>
Class<Step> step_class(py::module_& module, const char* name) {
  return Class<Step>(module, name).def_readonly("out", &Step::out);
}

template <class Step>
void define_sum(Class<Step>& c, step::Terms Step::* sum) {
  using Held = std::shared_ptr<Step>;
  c.def_property_readonly("terms", [sum](const Step& s) { return (s.*sum).terms; })
      .def_property_readonly("weights",
                             [sum](const Held& s) {
                               const step::Terms& t = (*s).*sum;
                               return view_of<std::uint64_t, Step>(
                                   s, t.weights.data(), shape_of({s->limbs, t.terms.size(), s->out.features}));
                             })
      .def_property_readonly("constants", [sum](const Held& s) {
        return words_of(s, ((*s).*sum).constants, {s->limbs, s->out.features});
      });
}

}  // namespace

void register_steps(py::module_& parent) {
  py::module_ module =
      parent.def_submodule("steps", "What an evaluator would have done to the words of planned tensors.");
  py::class_<ckks::TensorRef>(module, "TensorRef")
      .def_readonly("storage", &ckks::TensorRef::storage)
      .def_readonly("first", &ckks::TensorRef::first)
      .def_readonly("features", &ckks::TensorRef::features)
      .def_readonly("level", &ckks::TensorRef::level);

  auto combine = step_class<step::Combine>(module, "Combine")
                     .def_readonly("rescaled", &step::Combine::rescaled)
                     .def_readonly("limbs", &step::Combine::limbs);
  define_sum(combine, &step::Combine::sum);

  step_class<step::Add>(module, "Add")
      .def_readonly("x", &step::Add::x)
      .def_readonly("y", &step::Add::y)
      .def_readonly("minus", &step::Add::minus);

  step_class<step::Sum>(module, "Sum").def_readonly("x", &step::Sum::x);

  step_class<step::Copy>(module, "Copy").def_readonly("parts", &step::Copy::parts);

  step_class<step::Plain>(module, "Plain")
      .def_readonly("x", &step::Plain::x)
      .def_readonly("limbs", &step::Plain::limbs)
      .def_property_readonly("coefficients", [](const std::shared_ptr<step::Plain>& s) {
        const std::size_t features = s->out.features;
        return view_of<std::int64_t, step::Plain>(s, s->coefficients.data(),
                                                  shape_of({features, s->coefficients.size() / features}));
      });

  auto product = step_class<step::Product>(module, "Product")
                     .def_readonly("x", &step::Product::x)
                     .def_readonly("y", &step::Product::y)
                     .def_readonly("summed", &step::Product::summed)
                     .def_readonly("limbs", &step::Product::limbs)
                     .def_property_readonly("multipliers", [](const std::shared_ptr<step::Product>& s) {
                       return words_of(s, s->multipliers, {s->limbs, s->out.features});
                     });
  define_sum(product, &step::Product::addend);

  step_class<step::Matrix>(module, "Matrix")
      .def_readonly("x", &step::Matrix::x)
      .def_readonly("transpose", &step::Matrix::transpose);

  Class<step::Galois>(module, "Galois")
      .def_readonly("x", &step::Galois::x)
      .def_readonly("outs", &step::Galois::outs)
      .def_readonly("elements", &step::Galois::elements);

  step_class<step::Monomial>(module, "Monomial")
      .def_readonly("x", &step::Monomial::x)
      .def_readonly("power", &step::Monomial::power);
}

}  // namespace privtuner::bindings
