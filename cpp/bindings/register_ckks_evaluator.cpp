// CKKS: what computes on ciphertexts without the secret key.
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ckks_arguments.hpp"
#include "privtuner/circuits/expansion.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/circuits/polynomial.hpp"
#include "privtuner/circuits/refreshing.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/ckks/refresh.hpp"

namespace privtuner::bindings {
namespace {

using ckks::Evaluator;
using ckks::MaskedRefresh;
using ckks::ParametersPtr;
using ckks::Tensor;
using ckks::TensorPtr;

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

}  // namespace

void register_ckks_evaluator(py::module_& module) {
  py::class_<ckks::Matrix, std::shared_ptr<ckks::Matrix>>(module, "CkksMatrix")
      .def(py::init(&matrix_of), py::arg("weights"), py::arg("delta"))
      .def_property_readonly("rows", &ckks::Matrix::rows)
      .def_property_readonly("cols", &ckks::Matrix::cols)
      .def_property_readonly("bytes_per_weight", [](const ckks::Matrix& m) { return m.weights().bytes_per_weight(); })
      .def_property_readonly("scale", [](const ckks::Matrix& m) { return array_of(m.delta()); });

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

}  // namespace privtuner::bindings
