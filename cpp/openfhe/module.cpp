// privtuner._openfhe: arrays are checked here, the GIL is released around everything that OpenFHE does.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

namespace py = pybind11;
using Release = py::call_guard<py::gil_scoped_release>;
using Doubles = py::array_t<double, py::array::c_style>;
using Words = py::array_t<std::uint64_t, py::array::c_style>;

void register_errors() {
  const py::module_ errors = py::module_::import("privtuner.errors");
  const auto named = [&](const char* name) { return py::object(errors.attr(name)).release().ptr(); };
  static PyObject* message_error = named("MessageError");
  static PyObject* ckks_error = named("CkksError");
  static PyObject* input_error = named("InputError");
  static PyObject* engine_error = named("EngineError");
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FormatError& error) {
      PyErr_SetString(message_error, error.what());
    } catch (const Error& error) {
      PyErr_SetString(ckks_error, error.what());
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(input_error, error.what());
    } catch (const py::builtin_exception&) {
      throw;  // one of pybind11's own, which are runtime errors too
    } catch (const lbcrypto::OpenFHEException& error) {
      PyErr_SetString(ckks_error, ("OpenFHE: " + reason(error)).c_str());
    } catch (const std::runtime_error& error) {
      PyErr_SetString(engine_error, error.what());
    }
  });
}

// What `write` gives as bytes: without the GIL but for the copy into Python's object.
template <class T, std::string (T::*write)() const = &T::to_bytes>
py::bytes serialised(const T& object) {
  std::string text;
  {
    const py::gil_scoped_release release;
    text = (object.*write)();
  }
  return py::bytes(text);
}

Values values_of(const Doubles& re, const std::optional<Doubles>& im) {
  if (re.ndim() != 2 || re.size() == 0) throw std::invalid_argument("values must be (features, tokens), not empty");
  if (im && (im->ndim() != 2 || im->shape(0) != re.shape(0) || im->shape(1) != re.shape(1))) {
    throw std::invalid_argument("real and imaginary parts of different shapes");
  }
  return {re.data(), im ? im->data() : nullptr, static_cast<std::size_t>(re.shape(0)),
          static_cast<std::size_t>(re.shape(1))};
}

template <class Key>
CiphertextsPtr encrypt_array(const Key& key, const Doubles& re, const std::optional<Doubles>& im, std::uint32_t level) {
  const Values values = values_of(re, im);
  const py::gil_scoped_release release;
  return encrypt(key, values, level);
}

py::object decrypt_array(const Secret& key, const Ciphertexts& x, std::size_t tokens, bool complex) {
  const auto features = static_cast<py::ssize_t>(x.features.size());
  const auto shape = std::vector<py::ssize_t>{features, static_cast<py::ssize_t>(tokens)};
  py::array_t<double> re(shape), im(complex ? shape : std::vector<py::ssize_t>{0, 0});
  double *real = re.mutable_data(), *imaginary = complex ? im.mutable_data() : nullptr;
  {
    const py::gil_scoped_release release;
    decrypt(key, x, tokens, real, imaginary);
  }
  if (complex) return py::make_tuple(re, im);
  return std::move(re);
}

// The range, if it is inside `towers`, `components` and `n`.
Range range_of(std::size_t tower, std::size_t component, std::size_t begin, std::size_t count, std::size_t towers,
               std::size_t components, std::size_t n) {
  if (tower >= towers) throw std::invalid_argument("tower " + std::to_string(tower) + " of " + std::to_string(towers));
  if (component >= components || begin >= n || count < 1 || count > n - begin) {
    throw std::invalid_argument("words [" + std::to_string(begin) + ", " + std::to_string(begin + count) +
                                ") of component " + std::to_string(component) + ": there are " +
                                std::to_string(components) + " of " + std::to_string(n));
  }
  return {tower, component, begin, count};
}

Words residues_array(const Ciphertexts& x, std::size_t tower, std::size_t component, std::size_t begin,
                     std::size_t count) {
  const Range range = range_of(tower, component, begin, count, x.first().GetElements()[0].GetNumOfElements(),
                               x.components(), x.context->ring_dimension());
  Words out({x.features.size(), count});
  std::uint64_t* data = out.mutable_data();
  const py::gil_scoped_release release;
  residues_of(x, range, data);
  return out;
}

void set_residues(Builder& builder, std::size_t tower, std::size_t component, std::size_t begin, const Words& words) {
  if (words.ndim() != 2 || static_cast<std::size_t>(words.shape(0)) != builder.features()) {
    throw std::invalid_argument("residues must be (" + std::to_string(builder.features()) + ", words)");
  }
  const Range range = range_of(tower, component, begin, static_cast<std::size_t>(words.shape(1)), builder.towers(),
                               builder.components(), builder.ring_dimension());
  const std::uint64_t* data = words.data();
  const py::gil_scoped_release release;
  const std::uint64_t modulus = builder.modulus(tower);
  std::uint64_t largest = 0;
  for (std::size_t i = 0; i < builder.features() * range.count; ++i) largest = std::max(largest, data[i]);
  if (largest >= modulus) {
    throw std::invalid_argument("a residue " + std::to_string(largest) + " is not below its modulus " +
                                std::to_string(modulus));
  }
  builder.set(range, data);
}

template <class Weight>
CiphertextsPtr textbook_array(const Ciphertexts& x, const py::array_t<Weight, py::array::c_style>& weights) {
  if (weights.ndim() != 2 || static_cast<std::size_t>(weights.shape(1)) != x.features.size() || weights.size() == 0) {
    throw std::invalid_argument("weights must be (rows, " + std::to_string(x.features.size()) + ")");
  }
  const Weight* data = weights.data();
  const auto rows = static_cast<std::size_t>(weights.shape(0));
  const py::gil_scoped_release release;
  return textbook_product(x, data, rows);
}

void register_context(py::module_& module) {
  py::class_<Context, std::shared_ptr<Context>>(module, "Context")
      .def(py::init([](std::uint32_t depth, std::uint32_t scaling_bits, std::uint32_t first_bits,
                       std::uint32_t ring_dimension, std::uint32_t batch_size, std::uint32_t digits,
                       std::uint32_t digit_bits, const std::string& scaling_technique, const std::string& key_switching,
                       bool complex_data, bool secure) {
             Settings s;
             s.depth = depth, s.scaling_bits = scaling_bits, s.first_bits = first_bits;
             s.ring_dimension = ring_dimension, s.batch_size = batch_size, s.digits = digits, s.digit_bits = digit_bits;
             s.scaling_technique = scaling_technique, s.key_switching = key_switching;
             s.complex_data = complex_data, s.secure = secure;
             return Context::make(s);
           }),
           py::kw_only(), py::arg("depth"), py::arg("scaling_bits"), py::arg("first_bits"), py::arg("ring_dimension"),
           py::arg("batch_size"), py::arg("digits"), py::arg("digit_bits"), py::arg("scaling_technique"),
           py::arg("key_switching"), py::arg("complex_data"), py::arg("secure"), Release())
      .def_static(
          "from_bytes", [](const std::string& data) { return Context::from_bytes(data); }, Release())
      .def("to_bytes", &serialised<Context>)
      .def("enable_bootstrapping", &Context::enable_bootstrapping, Release())
      .def("galois_element", &galois_element)
      .def("same", [](const Context& a, const Context& b) { return a.get() == b.get(); })
      .def("scaling_factor", [](const Context& context,
                                std::uint32_t level) { return context.parameters()->GetScalingFactorReal(level); })
      .def_property_readonly("ring_dimension", &Context::ring_dimension)
      .def_property_readonly("slots", &Context::slots)
      .def_property_readonly("depth", &Context::depth)
      .def_property_readonly("scaling_bits", &Context::scaling_bits)
      .def_property_readonly("manual", &Context::manual)
      .def_property_readonly("complex", &Context::complex)
      .def_property_readonly("secure", &Context::secure)
      .def_property_readonly("moduli", &Context::moduli)
      .def_property_readonly("special_moduli", &Context::special_moduli)
      .def_property_readonly("digits", &Context::digits)
      .def_property_readonly("digit_bits", &Context::digit_bits)
      .def_property_readonly("scaling_technique", &Context::scaling_technique)
      .def_property_readonly("key_switching", &Context::key_switching);
}

void register_keys(py::module_& module) {
  using ContextArgument = std::shared_ptr<Context>;
  py::class_<EvaluationKeys, std::shared_ptr<EvaluationKeys>>(module, "EvaluationKeys")
      .def_static(
          "from_bytes",
          [](const ContextArgument& context, const std::string& multiplication, const std::string& automorphisms) {
            return EvaluationKeys::from_bytes(context, multiplication, automorphisms);
          },
          Release())
      .def("multiplication_bytes", &serialised<EvaluationKeys, &EvaluationKeys::multiplication_bytes>)
      .def("automorphism_bytes", &serialised<EvaluationKeys, &EvaluationKeys::automorphism_bytes>)
      .def_readonly("tag", &EvaluationKeys::tag)
      .def_property_readonly("nbytes", &EvaluationKeys::bytes)
      .def_property_readonly("relinearisation", [](const EvaluationKeys& keys) { return !keys.multiplication.empty(); })
      .def_property_readonly("elements", [](const EvaluationKeys& keys) {
        std::vector<std::uint32_t> elements;
        if (keys.automorphisms) {
          for (const auto& entry : *keys.automorphisms) elements.push_back(entry.first);
        }
        return elements;
      });

  py::class_<Public, std::shared_ptr<Public>>(module, "PublicKey")
      .def_static(
          "from_bytes",
          [](const ContextArgument& context, const std::string& data) { return Public::from_bytes(context, data); },
          Release())
      .def("to_bytes", &serialised<Public>)
      .def("encrypt", &encrypt_array<Public>)
      .def_property_readonly("tag", [](const Public& key) { return key.key->GetKeyTag(); });

  py::class_<Secret, std::shared_ptr<Secret>>(module, "SecretKey")
      .def(py::init([](const ContextArgument& context) { return std::make_shared<Secret>(context); }), Release())
      .def_static(
          "from_bytes",
          [](const ContextArgument& context, const std::string& data) { return Secret::from_bytes(context, data); },
          Release())
      .def("to_bytes", &serialised<Secret>)
      .def("encrypt", &encrypt_array<Secret>)
      .def("decrypt", &decrypt_array)
      .def("public_key", &Secret::public_key)
      .def("evaluation_keys", &Secret::evaluation_keys, Release())
      .def_property_readonly("tag", [](const Secret& key) { return key.key()->GetKeyTag(); });
}

void register_ciphertexts(py::module_& module) {
  using ContextArgument = std::shared_ptr<Context>;
  py::class_<Ciphertexts, std::shared_ptr<Ciphertexts>>(module, "Ciphertexts")
      .def_static(
          "from_bytes",
          [](const ContextArgument& context, const std::string& data) {
            return Ciphertexts::from_bytes(context, data);
          },
          Release())
      .def("to_bytes", &serialised<Ciphertexts>)
      .def("residues", &residues_array)
      .def("select",
           [](const Ciphertexts& x, std::size_t begin, std::size_t end) {
             if (begin >= end || end > x.features.size()) {
               throw std::invalid_argument("features [" + std::to_string(begin) + ", " + std::to_string(end) + ") of " +
                                           std::to_string(x.features.size()));
             }
             auto out = std::make_shared<Ciphertexts>();
             out->context = x.context;
             out->features.assign(x.features.begin() + static_cast<std::ptrdiff_t>(begin),
                                  x.features.begin() + static_cast<std::ptrdiff_t>(end));
             return out;
           })
      .def_static("concatenate",
                  [](const std::vector<CiphertextsPtr>& parts) {
                    if (parts.empty()) throw std::invalid_argument("nothing to concatenate");
                    auto out = std::make_shared<Ciphertexts>();
                    out->context = parts.front()->context;
                    for (const auto& part : parts) {
                      const auto &a = part->first(), &b = parts.front()->first();
                      if (a.GetLevel() != b.GetLevel() || a.GetNoiseScaleDeg() != b.GetNoiseScaleDeg() ||
                          part->components() != parts.front()->components() ||
                          part->moduli() != parts.front()->moduli()) {
                        throw std::invalid_argument("ciphertexts of different levels or sizes cannot be one tensor");
                      }
                      out->features.insert(out->features.end(), part->features.begin(), part->features.end());
                    }
                    return out;
                  })
      .def_property_readonly("features", [](const Ciphertexts& x) { return x.features.size(); })
      .def_property_readonly("components", &Ciphertexts::components)
      .def_property_readonly("level", [](const Ciphertexts& x) { return x.first().GetLevel(); })
      .def_property_readonly("noise_scale_degree", [](const Ciphertexts& x) { return x.first().GetNoiseScaleDeg(); })
      .def_property_readonly("scaling_factor", [](const Ciphertexts& x) { return x.first().GetScalingFactor(); })
      .def_property_readonly("slots", [](const Ciphertexts& x) { return x.first().GetSlots(); })
      .def_property_readonly("tag", [](const Ciphertexts& x) { return x.first().GetKeyTag(); })
      .def_property_readonly("moduli", &Ciphertexts::moduli)
      .def_property_readonly("nbytes", &Ciphertexts::bytes);

  py::class_<Builder>(module, "Builder")
      .def(py::init<const Ciphertexts&, std::size_t, const std::vector<std::uint64_t>&>(), Release())
      .def(py::init<const Secret&, std::size_t, std::size_t>(), Release())
      .def("set", &set_residues)
      .def("finish", &Builder::finish);
}

void register_arithmetic(py::module_& module) {
  module.def("add", &add, Release());
  module.def("subtract", &subtract, Release());
  module.def("negate", &negate, Release());
  module.def("add_constant", &add_constant, Release());
  module.def("multiply_constant", &multiply_constant, Release());
  module.def("multiply_plain", [](const Ciphertexts& x, const Doubles& re, const std::optional<Doubles>& im) {
    const Values values = values_of(re, im);
    if (values.features != 1 && values.features != x.features.size()) {
      throw Error("clear values of " + std::to_string(values.features) + " features do not fit " +
                  std::to_string(x.features.size()));
    }
    const py::gil_scoped_release release;
    return multiply_plain(x, values);
  });
  module.def("multiply", &multiply, py::arg("x"), py::arg("y"), py::arg("keys"), py::arg("times") = 1, Release());
  module.def("dot", &dot, Release());
  module.def("sum_features", &sum_features, Release());
  module.def("linear_combination", &linear_combination, Release());
  module.def("rescale", &rescale, Release());
  module.def("settle", &settle, Release());
  module.def("drop", &drop, Release());
  module.def("rotate", &rotate, Release());
  module.def("conjugate", &conjugate, Release());
  module.def("sum_slots", &sum_slots, Release());
  module.def("power_series", &power_series, Release());
  module.def("chebyshev_series", &chebyshev_series, Release());
  module.def("bootstrap", &bootstrap, Release());
  module.def("textbook_integers", &textbook_array<std::int64_t>);
  module.def("textbook_reals", &textbook_array<double>);
}

}  // namespace
}  // namespace privtuner::openfhe

PYBIND11_MODULE(_openfhe, module) {
  using namespace privtuner::openfhe;
  module.doc() = "OpenFHE for privtuner. Private: use privtuner.openfhe.";
  register_errors();
  watch_forks();
  module.attr("version") = library_version();
  module.attr("library") = PRIVTUNER_OPENFHE_LIBRARY;
  module.def("num_threads", &threads);
  module.def("set_num_threads", &set_threads, Release());
  module.def("counts", [] {
    const Counts now = counts();
    return pybind11::make_tuple(now.contexts, now.multiplication_keys, now.automorphism_keys);
  });
  register_context(module);
  register_keys(module);
  register_ciphertexts(module);
  register_arithmetic(module);
}
