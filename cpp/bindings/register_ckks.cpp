// CKKS: arrays are checked here, the GIL is released around all arithmetic.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "privtuner/circuits/expansion.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/circuits/polynomial.hpp"
#include "privtuner/circuits/refreshing.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/ckks/messages.hpp"
#include "privtuner/ckks/refresh.hpp"
#include "privtuner/ckks/secret.hpp"
#include "steps.hpp"

namespace privtuner::bindings {
namespace {

using ckks::Evaluator;
using ckks::ParametersPtr;
using ckks::Tensor;
using ckks::TensorPtr;

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

std::vector<double> vector_of(const Doubles& array) {
  if (array.ndim() > 1) throw std::invalid_argument("expected one number or a vector of numbers");
  return std::vector<double>(array.data(), array.data() + array.size());
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// (tokens, features) values that live as long as the arrays do.
ckks::Values values_of(const Doubles& re, const std::optional<Doubles>& im) {
  if (re.ndim() != 2 || (im && (im->ndim() != 2 || im->shape(0) != re.shape(0) || im->shape(1) != re.shape(1)))) {
    throw std::invalid_argument("values must have the shape (tokens, features)");
  }
  ckks::Values values;
  values.re = re.data();
  values.im = im ? im->data() : nullptr;
  values.tokens = static_cast<std::size_t>(re.shape(0));
  values.features = static_cast<std::size_t>(re.shape(1));
  values.token_stride = static_cast<std::ptrdiff_t>(re.shape(1));
  values.feature_stride = 1;
  return values;
}

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

// The words of one key, [digit][component][prime][N], where they lie.
py::array_t<std::uint64_t> key_words(const std::shared_ptr<ckks::EvaluationKeys>& keys,
                                     std::optional<std::uint32_t> element) {
  if (element == ckks::kRelinearisation) throw std::invalid_argument("0 is no automorphism; None: relinearisation");
  const ckks::Parameters& p = *keys->parameters;
  const ckks::SwitchingKey& key = ckks::require_key(p, keys.get(), element.value_or(ckks::kRelinearisation));
  return view_of<std::uint64_t, ckks::EvaluationKeys>(keys, key.row(0, 0, 0),
                                                      shape_of({key.digits(), 2, p.prime_count(), p.n()}));
}

template <class T>
py::bytes message(const T& object) {
  std::uint8_t* out = nullptr;
  py::bytes bytes = new_bytes(ckks::message_bytes(object), out);
  const py::gil_scoped_release release;
  ckks::write(object, out);
  return bytes;
}

circuits::Polynomial polynomial_of(const std::string& basis, const Doubles& coefficients, double low, double high) {
  circuits::Polynomial polynomial;
  if (basis == "chebyshev") {
    polynomial.basis = circuits::Basis::chebyshev;
  } else if (basis != "power") {
    throw std::invalid_argument("basis '" + basis + "': choose power or chebyshev");
  }
  polynomial.coefficients = vector_of(coefficients);
  polynomial.low = low;
  polynomial.high = high;
  polynomial.check();
  return polynomial;
}

ckks::Fresh fresh_of(const ckks::Parameters& parameters, int level, double bound, const Doubles& scale,
                     std::size_t features) {
  if (level < 0 || level > parameters.depth()) {
    throw ckks::Error("level " + std::to_string(level) + " is outside [0, " + std::to_string(parameters.depth()) +
                      "] of " + parameters.name());
  }
  if (!(bound > 0) || !std::isfinite(bound)) {
    throw std::invalid_argument("bound " + std::to_string(bound) + " is not a positive number");
  }
  ckks::Fresh fresh{level, bound, vector_of(scale)};
  if (fresh.scale.empty()) fresh.scale.assign(features, parameters.scale(level));
  if (fresh.scale.size() == 1) fresh.scale.assign(features, fresh.scale[0]);
  if (fresh.scale.size() != features) {
    throw std::invalid_argument(std::to_string(fresh.scale.size()) + " scales for " + std::to_string(features) +
                                " features");
  }
  for (const double value : fresh.scale) {
    if (!(value >= 1) || !std::isfinite(value)) {
      throw std::invalid_argument("scale " + std::to_string(value) + " is not a number from 1 on");
    }
  }
  if (features < 1 || features > ckks::kMaxFeatures) {
    throw std::invalid_argument(std::to_string(features) + " features; pass 1 to " +
                                std::to_string(ckks::kMaxFeatures));
  }
  return fresh;
}

std::shared_ptr<ckks::Matrix> matrix_of(const py::array& weights, const Doubles& delta) {
  if (weights.ndim() != 2) throw std::invalid_argument("weights must have the shape (d_out, d_in)");
  const auto rows = static_cast<std::size_t>(weights.shape(0)), cols = static_cast<std::size_t>(weights.shape(1));
  if (py::isinstance<py::array_t<std::int8_t, py::array::c_style>>(weights)) {
    return std::make_shared<ckks::Matrix>(gemm::Weights(static_cast<const std::int8_t*>(weights.data()), rows, cols),
                                          vector_of(delta));
  }
  if (py::isinstance<py::array_t<std::int16_t, py::array::c_style>>(weights)) {
    return std::make_shared<ckks::Matrix>(gemm::Weights(static_cast<const std::int16_t*>(weights.data()), rows, cols),
                                          vector_of(delta));
  }
  throw std::invalid_argument("weights must be a contiguous array of int8 or int16");
}

// Those of the coefficients [feature][N] where `count` numbers are packed, as uint64 (count, features).
py::array packed_words(const ckks::Parameters& parameters, const std::uint64_t* coefficients, std::size_t features,
                       std::size_t count) {
  const std::size_t n = parameters.n();
  if (count < 1 || count > n) {
    throw std::invalid_argument(std::to_string(count) + " numbers do not fit the " + std::to_string(n) +
                                " coefficients of a ciphertext");
  }
  py::array_t<std::uint64_t> words({count, features});
  std::uint64_t* out = words.mutable_data();
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t place = circuits::packed_place(n, count, i).coefficient;
    for (std::size_t f = 0; f < features; ++f) out[i * features + f] = coefficients[f * n + place];
  }
  return words;
}

py::array decrypt(const ckks::SecretKey& key, const Tensor& tensor, bool complex) {
  const auto tokens = static_cast<py::ssize_t>(tensor.tokens), features = static_cast<py::ssize_t>(tensor.features);
  py::array_t<double> re({tokens, features});
  if (!complex) {
    double* out = re.mutable_data();
    const py::gil_scoped_release release;
    key.decrypt(tensor, out, nullptr);
    return re;
  }
  py::array_t<double> im({tokens, features});
  double *out = re.mutable_data(), *out_im = im.mutable_data();
  {
    const py::gil_scoped_release release;
    key.decrypt(tensor, out, out_im);
  }
  py::array_t<std::complex<double>> both({tokens, features});
  auto* target = both.mutable_data();
  for (py::ssize_t i = 0; i < tokens * features; ++i) target[i] = {out[i], out_im[i]};
  return both;
}

using Common = std::optional<py::bytes>;

// The randomness that both sides have a part in, if there is any.
std::optional<ckks::SeedBytes> common_of(const Common& common) {
  if (!common) return std::nullopt;
  return fixed<32>(*common, "common randomness");
}

const ckks::SeedBytes* pointer_to(const std::optional<ckks::SeedBytes>& common) { return common ? &*common : nullptr; }

void require_packed(const ckks::Values& numbers, std::size_t n) {
  if (numbers.tokens < 1 || numbers.tokens > n) {
    throw std::invalid_argument(std::to_string(numbers.tokens) + " numbers do not fit the " + std::to_string(n) +
                                " coefficients of a ciphertext");
  }
}

// Numbers (count, ciphertexts), placed as packed sums are.
TensorPtr encrypt_packed(const ckks::SecretKey& key, const Doubles& numbers, int level, double bound,
                         const Doubles& scale) {
  const ckks::Values values = values_of(numbers, std::nullopt);
  const std::size_t n = key.parameters()->n(), count = values.tokens, features = values.features;
  require_packed(values, n);
  const ckks::Fresh fresh = fresh_of(*key.parameters(), level, bound, scale, features);
  const py::gil_scoped_release release;
  math::SecretBuffer<double> coefficients(features * n);
  std::fill_n(coefficients.data(), features * n, 0.0);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t place = circuits::packed_place(n, count, i).coefficient;
    for (std::size_t f = 0; f < features; ++f) coefficients[f * n + place] = values.re[i * features + f];
  }
  return key.encrypt_coefficients(coefficients.data(), features, fresh);
}

using Release = py::call_guard<py::gil_scoped_release>;

void register_evaluator(py::module_& module) {
  py::class_<Evaluator, std::shared_ptr<Evaluator>>(module, "CkksEvaluator")
      .def(py::init([](const ParametersPtr& parameters, const std::shared_ptr<ckks::EvaluationKeys>& keys, bool record,
                       std::size_t batch) {
             const auto recording = record ? std::make_shared<ckks::Recording>(batch) : nullptr;
             return std::make_shared<Evaluator>(parameters, keys, recording);
           }),
           py::arg("parameters"), py::arg("keys"), py::arg("record") = false, py::arg("batch") = 1)
      .def("take_steps",
           [](const Evaluator& e) {
             return e.recording() == nullptr ? std::vector<ckks::Step>() : e.recording()->take();
           })
      .def("add", &Evaluator::add, Release())
      .def("subtract", &Evaluator::subtract, Release())
      .def("negate", &Evaluator::negate, Release())
      .def("multiply", &Evaluator::multiply, Release())
      .def("dot", &Evaluator::dot, Release())
      .def("sum_features", &Evaluator::sum_features, Release())
      .def(
          "concatenate",
          [](const Evaluator& e, const std::vector<TensorPtr>& tensors) { return e.concatenate(tensors); }, Release())
      .def("select", &Evaluator::select, Release())
      .def("rescale", &Evaluator::rescale, Release())
      .def("drop", &Evaluator::drop, Release())
      .def("rotate", &Evaluator::rotate, Release())
      .def("conjugate", &Evaluator::conjugate, Release())
      .def("sum_slots", &Evaluator::sum_slots, Release())
      .def("assume", &Evaluator::assume, Release())
      .def("pack_slot_sums", &circuits::pack_slot_sums, Release())
      .def("expand", &circuits::expand, Release())
      .def("lower_for_refresh", &circuits::lower_for_refresh, Release())
      .def("refreshed", &Evaluator::refreshed, Release())
      .def("split_pairs", &circuits::split_pairs, Release())
      .def("revealed", &Evaluator::revealed, Release())
      .def("add_constant",
           [](const Evaluator& e, const TensorPtr& x, const Doubles& constants) {
             const std::vector<double> values = vector_of(constants);
             const py::gil_scoped_release release;
             return e.add_constant(x, values);
           })
      .def("multiply_constant",
           [](const Evaluator& e, const TensorPtr& x, const Doubles& constants) {
             const std::vector<double> values = vector_of(constants);
             const py::gil_scoped_release release;
             return e.multiply_constant(x, values);
           })
      .def("multiply_plain",
           [](const Evaluator& e, const TensorPtr& x, const Doubles& re, const std::optional<Doubles>& im) {
             const ckks::Values values = values_of(re, im);
             const py::gil_scoped_release release;
             return e.multiply_plain(x, values);
           })
      .def("linear",
           [](const Evaluator& e, const TensorPtr& x, const ckks::Matrix& matrix, bool transpose) {
             const py::gil_scoped_release release;
             return e.linear(x, matrix, transpose ? gemm::Operand::transpose : gemm::Operand::plain);
           })
      .def("linear_combination",
           [](const Evaluator& e, const std::vector<TensorPtr>& tensors,
              const std::vector<std::vector<double>>& weights, const std::vector<double>& constants) {
             const py::gil_scoped_release release;
             return e.linear_combination(tensors, weights, constants);
           })
      .def("polynomial",
           [](const Evaluator& e, const TensorPtr& x, const std::string& basis, const Doubles& coefficients, double low,
              double high) {
             const circuits::Polynomial polynomial = polynomial_of(basis, coefficients, low, high);
             const py::gil_scoped_release release;
             return circuits::evaluate(e, x, polynomial);
           })
      .def("polynomials",
           [](const Evaluator& e, const TensorPtr& x, const std::string& basis,
              const std::vector<Doubles>& coefficients, double low, double high) {
             std::vector<circuits::Polynomial> polynomials;
             for (const Doubles& each : coefficients) polynomials.push_back(polynomial_of(basis, each, low, high));
             const py::gil_scoped_release release;
             return circuits::evaluate_all(e, x, polynomials);
           })
      .def("planned",
           [](const Evaluator& e, std::size_t tokens, std::size_t features, int level, double bound,
              const Doubles& scale, bool with_public_key, std::optional<double> noise) {
             const TensorPtr planned = ckks::planned_tensor(e.parameters(), tokens, features,
                                                            fresh_of(*e.parameters(), level, bound, scale, features),
                                                            with_public_key, e.ledger());
             if (!noise) return planned;
             if (!std::isfinite(*noise) || *noise < 0)
               throw std::invalid_argument("noise must be finite, not negative");
             const std::vector<double> all(features, *noise);  // of one source, as far as anybody knows
             return e.with_noise(planned, all, all);
           })
      .def("planned_packed",
           [](const Evaluator& e, const Doubles& numbers, int level, double bound, const Doubles& scale) {
             const ckks::Values values = values_of(numbers, std::nullopt);
             require_packed(values, e.parameters()->n());
             ckks::check_numbers(values.re, values.tokens * values.features, bound);
             return ckks::planned_coefficients(e.parameters(), values.features,
                                               fresh_of(*e.parameters(), level, bound, scale, values.features),
                                               e.ledger());
           })
      .def("work",
           [](const Evaluator& e) {
             std::vector<std::tuple<std::string, std::size_t, double>> rows;
             for (const auto& [key, amount] : e.trace().work()) {
               rows.emplace_back(ckks::work_name(key.first), key.second, amount);
             }
             return rows;
           })
      .def("refreshes",
           [](const Evaluator& e) {
             std::vector<std::pair<std::size_t, int>> rows;
             for (const auto& [ciphertexts, level] : e.trace().refreshes()) rows.emplace_back(ciphertexts, level);
             return rows;
           })
      .def("needs_relinearisation", [](const Evaluator& e) { return e.trace().relinearisation(); })
      .def("needed_elements",
           [](const Evaluator& e) {
             const auto elements = e.trace().galois();
             return std::vector<std::uint32_t>(elements.begin(), elements.end());
           })
      .def("clear_trace",
           [](const Evaluator& e) {
             e.trace().clear();
             e.ledger()->reset_peak();
           })
      .def_property_readonly("live_bytes", [](const Evaluator& e) { return e.ledger()->live(); })
      .def_property_readonly("peak_bytes", [](const Evaluator& e) { return e.ledger()->peak(); });
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

  py::class_<ckks::PublicKey, std::shared_ptr<ckks::PublicKey>>(module, "CkksPublicKey")
      .def("encrypt",
           [](const ckks::PublicKey& key, const Doubles& re, const std::optional<Doubles>& im, int level, double bound,
              const Doubles& scale) {
             const ckks::Values values = values_of(re, im);
             const ckks::Fresh fresh = fresh_of(*key.parameters, level, bound, scale, values.features);
             const py::gil_scoped_release release;
             return ckks::encrypt(key, values, fresh);
           })
      .def("to_bytes", &message<ckks::PublicKey>)
      .def_static("from_bytes", [](const ParametersPtr& parameters, const py::buffer& buffer, const Common& common) {
        const Bytes bytes(buffer);
        const auto shared = common_of(common);
        return std::const_pointer_cast<ckks::PublicKey>(
            ckks::read_public_key(parameters, pointer_to(shared), bytes.data(), bytes.size()));
      });

  py::class_<ckks::EvaluationKeys, std::shared_ptr<ckks::EvaluationKeys>>(module, "CkksEvaluationKeys")
      .def_property_readonly("relinearisation",
                             [](const ckks::EvaluationKeys& keys) { return keys.relinearisation != nullptr; })
      .def_property_readonly("elements",
                             [](const ckks::EvaluationKeys& keys) {
                               std::vector<std::uint32_t> elements;
                               for (const auto& entry : keys.galois) elements.push_back(entry.first);
                               return elements;
                             })
      .def_property_readonly("nbytes", &ckks::EvaluationKeys::bytes)
      .def("words", &key_words, py::arg("element").none(true))
      .def("to_bytes", &message<ckks::EvaluationKeys>)
      .def_static("from_bytes", [](const ParametersPtr& parameters, const py::buffer& buffer, const Common& common) {
        const Bytes bytes(buffer);
        const auto shared = common_of(common);
        const py::gil_scoped_release release;
        return std::const_pointer_cast<ckks::EvaluationKeys>(
            ckks::read_keys(parameters, pointer_to(shared), bytes.data(), bytes.size()));
      });

  py::class_<ckks::SecretKey, std::shared_ptr<ckks::SecretKey>>(module, "CkksSecretKey")
      .def(py::init([](const ParametersPtr& parameters, const std::optional<py::bytes>& given) {
        if (!given) return std::make_shared<ckks::SecretKey>(parameters);
        ring::Seed seed;
        seed.bytes = fixed<32>(*given, "a seed");
        return std::make_shared<ckks::SecretKey>(parameters, seed);
      }))
      .def("encrypt",
           [](const ckks::SecretKey& key, const Doubles& re, const std::optional<Doubles>& im, int level, double bound,
              const Doubles& scale) {
             const ckks::Values values = values_of(re, im);
             const ckks::Fresh fresh = fresh_of(*key.parameters(), level, bound, scale, values.features);
             const py::gil_scoped_release release;
             return key.encrypt(values, fresh);
           })
      .def("encrypt_packed", &encrypt_packed)
      .def("decrypt", &decrypt, py::arg("tensor"), py::arg("complex"))
      .def("decrypt_sums",
           [](const ckks::SecretKey& key, const Tensor& tensor, std::size_t count) {
             const std::size_t n = key.parameters()->n();
             if (count < 1 || (count + n - 1) / n != tensor.features) {
               throw std::invalid_argument(std::to_string(count) + " packed sums do not make " +
                                           std::to_string(tensor.features) + " features");
             }
             math::SecretBuffer<double> coefficients(tensor.features * n);
             py::array_t<double> sums(static_cast<py::ssize_t>(count));
             double* out = sums.mutable_data();
             const py::gil_scoped_release release;
             key.decrypt_coefficients(tensor, coefficients.data());
             for (std::size_t f = 0; f < count; ++f) {
               const circuits::PackedPlace place = circuits::packed_place(n, count, f);
               out[f] = coefficients[place.feature * n + place.coefficient];
             }
             return sums;
           })
      .def("decrypt_packed",
           [](const ckks::SecretKey& key, const Tensor& tensor, std::size_t count) {
             const std::size_t n = key.parameters()->n(), features = tensor.features;
             if (count < 1 || count > n) {
               throw std::invalid_argument(std::to_string(count) + " numbers do not fit the " + std::to_string(n) +
                                           " coefficients of a ciphertext");
             }
             math::SecretBuffer<double> coefficients(features * n);
             py::array_t<double> numbers({count, features});
             double* out = numbers.mutable_data();
             const py::gil_scoped_release release;
             key.decrypt_coefficients(tensor, coefficients.data());
             for (std::size_t i = 0; i < count; ++i) {
               const std::size_t place = circuits::packed_place(n, count, i).coefficient;
               for (std::size_t f = 0; f < features; ++f) out[i * features + f] = coefficients[f * n + place];
             }
             return numbers;
           })
      .def("open",
           [](const ckks::SecretKey& key, const Tensor& masked, std::size_t count) {
             math::SecretBuffer<std::uint64_t> coefficients(masked.features * key.parameters()->n());
             key.open(masked, coefficients.data());
             return packed_words(*key.parameters(), coefficients.data(), masked.features, count);
           })
      .def("public_key",
           [](const ckks::SecretKey& key, const Common& common) {
             const auto shared = common_of(common);
             const py::gil_scoped_release release;
             return std::const_pointer_cast<ckks::PublicKey>(key.public_key(pointer_to(shared)));
           })
      .def("evaluation_keys",
           [](const ckks::SecretKey& key, bool relinearisation, const std::vector<std::uint32_t>& elements,
              const Common& common) {
             const auto shared = common_of(common);
             const py::gil_scoped_release release;
             auto keys = std::make_shared<ckks::EvaluationKeys>();
             keys->parameters = key.parameters();
             if (relinearisation) keys->relinearisation = key.relinearisation_key(pointer_to(shared));
             for (const std::uint32_t element : elements) {
               if (element != 1) keys->galois.emplace(element, key.galois_key(element, pointer_to(shared)));
             }
             return keys;
           })
      .def("refresh", [](const ckks::SecretKey& key, const py::buffer& message, std::size_t count, int level) {
        const Bytes bytes(message);
        if (count < 1 || count > ckks::kMaxRefreshBatch) {
          throw std::invalid_argument(std::to_string(count) + " ciphertexts in a message of a refresh");
        }
        ckks::check_refresh_levels(*key.parameters(), ckks::kRefreshLevel, level);
        std::uint8_t* out = nullptr;
        py::bytes answer = new_bytes(ckks::refreshed_bytes(*key.parameters(), count, level), out);
        const py::gil_scoped_release release;
        key.refresh(bytes.data(), bytes.size(), count, level, out);
        return answer;
      });

  py::class_<ckks::Matrix, std::shared_ptr<ckks::Matrix>>(module, "CkksMatrix")
      .def(py::init(&matrix_of), py::arg("weights"), py::arg("delta"))
      .def_property_readonly("rows", &ckks::Matrix::rows)
      .def_property_readonly("cols", &ckks::Matrix::cols)
      .def_property_readonly("bytes_per_weight", [](const ckks::Matrix& m) { return m.weights().bytes_per_weight(); })
      .def_property_readonly("scale", [](const ckks::Matrix& m) { return array_of(m.delta()); });

  using ckks::MaskedRefresh;
  py::class_<MaskedRefresh, std::shared_ptr<MaskedRefresh>>(module, "CkksMaskedRefresh")
      .def(py::init([](const std::shared_ptr<ckks::PublicKey>& key, const TensorPtr& x,
                       const std::shared_ptr<Tensor>& fresh, const py::bytes& session, std::uint64_t first) {
        return std::make_shared<MaskedRefresh>(key, x, fresh, fixed<16>(session, "a session"), first);
      }))
      .def_property_readonly("messages", &MaskedRefresh::messages)
      .def("mask",
           [](MaskedRefresh& refresh, std::size_t i) {
             if (i >= refresh.messages()) throw std::invalid_argument("no such message");
             std::uint8_t* out = nullptr;
             py::bytes message = new_bytes(refresh.message_bytes(i), out);
             const py::gil_scoped_release release;
             refresh.mask(i, out);
             return message;
           })
      .def("unmask",
           [](MaskedRefresh& refresh, std::size_t i, const py::buffer& answer) {
             if (i >= refresh.messages()) throw std::invalid_argument("no such message");
             const Bytes bytes(answer);
             const py::gil_scoped_release release;
             refresh.unmask(i, bytes.data(), bytes.size());
           })
      .def("result", &MaskedRefresh::result);
  module.attr("CKKS_REFRESH_LEVEL") = ckks::kRefreshLevel;
  module.attr("CKKS_REFRESHES") = std::uint64_t{1} << ckks::kLogRefreshes;
  module.def(
      "ckks_reveal",
      [](const ckks::PublicKey& key, const TensorPtr& x, int flood_bits, bool packed,
         const std::shared_ptr<Tensor>& revealed) {
        ckks::reveal(key, *x, flood_bits, packed, *revealed);
        return revealed;
      },
      Release());
  module.def("ckks_mask_opening", [](const ckks::PublicKey& key, const TensorPtr& x, std::size_t count) {
    const auto masked = std::make_shared<Tensor>(x->with_room());
    math::SecretBuffer<std::uint64_t> mask(x->features * x->parameters->n());
    ckks::mask_opening(key, *x, *masked, mask.data());
    return py::make_tuple(masked, packed_words(*x->parameters, mask.data(), x->features, count));
  });
  register_evaluator(module);
}

}  // namespace privtuner::bindings
