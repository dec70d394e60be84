// CKKS: parameters and tensors. Arrays are checked here, the GIL is released around all arithmetic.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ckks_arguments.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/refresh.hpp"
#include "steps.hpp"

namespace privtuner::bindings {
namespace {

using ckks::ParametersPtr;
using ckks::Tensor;
using ckks::TensorPtr;

// Residues modulo one prime, [feature][component][N].
py::array_t<std::uint64_t> residues(const Tensor& x, std::size_t limb) {
  if (x.planned) throw ckks::Error("a planned tensor holds no residues");
  if (limb >= x.limbs()) {
    throw std::invalid_argument("limb " + std::to_string(limb) + " of " + std::to_string(x.limbs()));
  }
  const std::size_t n = x.parameters->n();
  py::array_t<std::uint64_t> out({x.features, std::size_t{2}, n});
  std::uint64_t* data = out.mutable_data();
  for (std::size_t f = 0; f < x.features; ++f) {
    for (int c = 0; c < 2; ++c, data += n) std::copy_n(x.row(f, c, limb), n, data);
  }
  return out;
}

// All words, [feature][component][limb][N], where they lie.
py::array_t<std::uint64_t> words_of(const std::shared_ptr<Tensor>& x) {
  if (x->planned) throw ckks::Error("a planned tensor holds no words");
  return view_of<std::uint64_t, Tensor>(x, x->row(0, 0, 0), shape_of({x->features, 2, x->limbs(), x->parameters->n()}));
}

// A planned tensor filled with words that were computed elsewhere.
TensorPtr with_words(const Tensor& planned, const py::array& array) {
  if (!planned.planned) throw ckks::Error("only a planned tensor takes words; this one holds its own");
  if (!py::isinstance<py::array_t<std::uint64_t, py::array::c_style>>(array) ||
      reinterpret_cast<std::uintptr_t>(array.data()) % sizeof(std::uint64_t) != 0) {
    throw std::invalid_argument("words must be a C-contiguous, aligned array of uint64, not one of " +
                                static_cast<std::string>(py::str(array.dtype())));
  }
  const std::size_t limbs = planned.limbs(), n = planned.parameters->n();
  const std::vector<py::ssize_t> shape = shape_of({planned.features, 2, limbs, n});
  if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
    throw std::invalid_argument("words of shape " + static_cast<std::string>(py::str(array.attr("shape"))) +
                                " for a tensor of shape (" + std::to_string(planned.features) + ", 2, " +
                                std::to_string(limbs) + ", " + std::to_string(n) + ")");
  }
  const auto* words = static_cast<const std::uint64_t*>(array.data());
  const py::gil_scoped_release release;
  return std::make_shared<Tensor>(planned.with_words(words));
}

void require_limbs(const ckks::Parameters& p, std::size_t limbs) {
  if (limbs < 1 || limbs > p.max_limbs()) {
    throw std::invalid_argument(std::to_string(limbs) + " limbs; choose 1 to " + std::to_string(p.max_limbs()));
  }
}

const ckks::BaseConversion& digit_conversion(const ckks::Parameters& p, std::size_t digit, std::size_t limbs) {
  require_limbs(p, limbs);
  if (digit >= p.digits(limbs)) {
    throw std::invalid_argument("digit " + std::to_string(digit) + " of " + std::to_string(p.digits(limbs)));
  }
  return p.digit_conversion(digit, limbs);
}

const ckks::BaseConversion& special_conversion(const ckks::Parameters& p, std::size_t limbs, bool with_last) {
  require_limbs(p, limbs);
  return p.special_conversion(limbs, with_last);
}

const ckks::BaseConversion& last_conversion(const ckks::Parameters& p, std::size_t limbs) {
  require_limbs(p, limbs);
  return p.last_conversion(limbs);
}

// [prime of the chain][source + 1].
py::array_t<std::uint64_t> weights_of(const ckks::BaseConversion& c) {
  py::array_t<std::uint64_t> weights({c.weights.size(), c.from.size() + 1});
  std::uint64_t* at = weights.mutable_data();
  for (const std::vector<std::uint64_t>& row : c.weights) at = std::copy(row.begin(), row.end(), at);
  return weights;
}

py::array_t<std::uint32_t> permutation(const ckks::Parameters& p, std::uint32_t element) {
  if (element % 2 == 0 || element >= 2 * p.n()) {
    throw std::invalid_argument(std::to_string(element) + " is no automorphism; pass an odd number below " +
                                std::to_string(2 * p.n()));
  }
  return array_of(ckks::galois_permutation(p, element));
}

}  // namespace

void register_ckks(py::module_& module) {
  register_steps(module);

  py::class_<ckks::BaseConversion>(module, "BaseConversion")
      .def_readonly("sources", &ckks::BaseConversion::from)
      .def_property_readonly("inverse_cofactor",
                             [](const ckks::BaseConversion& c) { return array_of(c.inverse_cofactor); })
      .def_property_readonly("inverse_prime", [](const ckks::BaseConversion& c) { return array_of(c.inverse_prime); })
      .def_property_readonly("weights", &weights_of)
      .def_property_readonly("inverse_product",
                             [](const ckks::BaseConversion& c) { return array_of(c.inverse_product); });

  py::class_<ckks::Parameters, std::shared_ptr<ckks::Parameters>>(module, "CkksParameters")
      .def(py::init([](int depth, int scale_bits, int first_bits, int log_n, bool insecure) {
             return std::make_shared<ckks::Parameters>(ckks::Wish{depth, scale_bits, first_bits, log_n, insecure});
           }),
           py::arg("depth"), py::arg("scale_bits"), py::arg("first_bits"), py::arg("log_n"), py::arg("insecure"),
           Release())
      .def_property_readonly("name", &ckks::Parameters::name)
      .def_property_readonly("ring_dimension", &ckks::Parameters::n)
      .def_property_readonly("slots", &ckks::Parameters::slots)
      .def_property_readonly("depth", &ckks::Parameters::depth)
      .def_property_readonly("scale_bits", [](const ckks::Parameters& p) { return p.wish().scale_bits; })
      .def_property_readonly("log_q", &ckks::Parameters::log_q)
      .def_property_readonly("log_qp", &ckks::Parameters::log_qp)
      .def_property_readonly("security_bits", &ckks::Parameters::security_bits)
      .def_property_readonly("hash", &ckks::Parameters::hash)
      .def_property_readonly("primes",
                             [](const ckks::Parameters& p) {
                               std::vector<std::uint64_t> primes;
                               for (std::size_t i = 0; i < p.prime_count(); ++i) primes.push_back(p.prime(i).q);
                               return primes;
                             })
      .def("scale",
           [](const ckks::Parameters& p, int level) {
             if (level < 0 || level > p.depth()) throw std::invalid_argument("no level " + std::to_string(level));
             return p.scale(level);
           })
      .def("keys_bytes",
           [](const ckks::Parameters& p, std::size_t count) { return ckks::keys_message_bytes(p, count); })
      .def("refresh_batch", &ckks::refresh_batch)
      .def("refresh_bytes", [](const ckks::Parameters& p, std::size_t count) { return ckks::refresh_bytes(p, count); })
      .def("refreshed_bytes", [](const ckks::Parameters& p, std::size_t count,
                                 int level) { return ckks::refreshed_bytes(p, count, level); })
      .def("public_key_bytes", &ckks::public_key_message_bytes)
      .def("galois_element", [](const ckks::Parameters& p, long long steps) { return ckks::galois_element(p, steps); })
      .def_property_readonly("max_limbs", &ckks::Parameters::max_limbs)
      .def_property_readonly("special_count", &ckks::Parameters::special_count)
      .def_property_readonly("digit_limbs", &ckks::Parameters::digit_limbs)
      .def_property_readonly("special_products",
                             [](const ckks::Parameters& p) {
                               std::vector<std::uint64_t> products;
                               for (std::size_t i = 0; i < p.max_limbs(); ++i) products.push_back(p.special_product(i));
                               return products;
                             })
      .def("digit_conversion", &digit_conversion, py::arg("digit"), py::arg("limbs"),
           py::return_value_policy::reference_internal)
      .def("special_conversion", &special_conversion, py::arg("limbs"), py::arg("with_last"),
           py::return_value_policy::reference_internal)
      .def("last_conversion", &last_conversion, py::arg("limbs"), py::return_value_policy::reference_internal)
      .def("galois_permutation", &permutation, py::arg("element"))
      .def_property_readonly("conjugation_element", &ckks::conjugation_element)
      .def_property_readonly("packing_elements", &circuits::packing_elements)
      .def(
          "transform",
          [](const ckks::Parameters& p, std::size_t limb, py::array_t<std::uint64_t, py::array::c_style> words,
             int times) {
            if (limb >= p.prime_count() || words.ndim() != 1 || words.shape(0) != static_cast<py::ssize_t>(p.n())) {
              throw std::invalid_argument("expected N words and the index of a prime");
            }
            std::uint64_t* data = words.mutable_data();
            for (std::size_t i = 0; i < p.n(); ++i) {
              if (data[i] >= p.prime(limb).q) throw std::invalid_argument("a word is not below the prime");
            }
            const py::gil_scoped_release release;
            for (int i = 0; i < times; ++i) p.prime(limb).ntt.forward(data, math::active_isa());
          },
          py::arg("limb"), py::arg("words").noconvert(), py::arg("times") = 1)
      .def("check_values", [](const ckks::Parameters& p, const Doubles& re, const std::optional<Doubles>& im,
                              double bound) { ckks::check_values(p, values_of(re, im), bound); })
      .def("check_encoding",
           [](const ckks::Parameters& p, const Doubles& re, const std::optional<Doubles>& im, const Doubles& scale) {
             const ckks::Values values = values_of(re, im);
             std::vector<double> scales = vector_of(scale);
             if (scales.size() != values.features) throw std::invalid_argument("not one scale a feature");
             ckks::check_encoding(p, values, scales);
           })
      .def("to_bytes",
           [](const ckks::Parameters& p) {
             std::uint8_t* out = nullptr;
             py::bytes bytes = new_bytes(ckks::parameters_message_bytes(), out);
             ckks::write(p, out);
             return bytes;
           })
      .def_static("from_bytes", [](const py::buffer& buffer) {
        const Bytes bytes(buffer);
        return std::const_pointer_cast<ckks::Parameters>(ckks::read_parameters(bytes.data(), bytes.size()));
      });

  py::class_<Tensor, std::shared_ptr<Tensor>>(module, "CkksTensor")
      .def_readonly("tokens", &Tensor::tokens)
      .def_readonly("features", &Tensor::features)
      .def_readonly("level", &Tensor::level)
      .def_readonly("bound", &Tensor::bound)
      .def_readonly("planned", &Tensor::planned)
      .def_property_readonly("scale", [](const Tensor& x) { return array_of(x.scale); })
      .def_property_readonly("noise", [](const Tensor& x) { return array_of(x.noise); })
      .def_property_readonly("shared", [](const Tensor& x) { return array_of(x.shared); })
      .def_property_readonly("nbytes", &Tensor::bytes)
      .def_property_readonly("message_bytes", [](const Tensor& x) { return ckks::message_bytes(x); })
      .def_property_readonly("error", &Tensor::error)
      .def_property_readonly("worst_error", &Tensor::worst_error)
      .def_property_readonly("ref", &Tensor::ref)
      .def("residues", &residues)
      .def("words", &words_of)
      .def("check_room", &ckks::check_room)
      .def("without_noise", [](const Tensor& x) { return std::make_shared<Tensor>(x.without_noise()); })
      .def("as_planned", [](const Tensor& x) { return std::make_shared<Tensor>(x.as_planned()); })
      .def("with_words", &with_words, py::arg("words"))
      .def("to_bytes", &message<Tensor>)
      .def_static("plan",
                  [](const ParametersPtr& parameters, std::size_t tokens, int level, double bound, const Doubles& scale,
                     const Doubles& noise, const Doubles& shared) {
                    if (level < 0 || level > parameters->depth() || noise.size() != scale.size() ||
                        shared.size() != scale.size()) {
                      throw std::invalid_argument("a level that does not exist, or numbers of features that differ");
                    }
                    auto x = std::make_shared<Tensor>(parameters, tokens, static_cast<std::size_t>(scale.size()), level,
                                                      true, nullptr);
                    x->bound = bound;
                    x->scale = vector_of(scale);
                    x->noise = vector_of(noise);
                    x->shared = vector_of(shared);
                    return x;
                  })
      .def_static("from_bytes", [](const ParametersPtr& parameters, const py::buffer& buffer,
                                   const std::shared_ptr<Tensor>& expected) {
        const Bytes bytes(buffer);
        const py::gil_scoped_release release;
        return ckks::read_tensor(parameters, expected.get(), bytes.data(), bytes.size());
      });

  register_ckks_keys(module);
  register_ckks_evaluator(module);
}

}  // namespace privtuner::bindings
