// Arguments and results that the bindings of CKKS share.
#pragma once

#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/ckks/messages.hpp"
#include "privtuner/ckks/secret.hpp"

namespace privtuner::bindings {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

inline std::vector<double> vector_of(const Doubles& array) {
  if (array.ndim() > 1) throw std::invalid_argument("expected one number or a vector of numbers");
  return std::vector<double>(array.data(), array.data() + array.size());
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// (tokens, features) values that live as long as the arrays do.
inline ckks::Values values_of(const Doubles& re, const std::optional<Doubles>& im) {
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

template <class T>
py::bytes message(const T& object) {
  std::uint8_t* out = nullptr;
  py::bytes bytes = new_bytes(ckks::message_bytes(object), out);
  const py::gil_scoped_release release;
  ckks::write(object, out);
  return bytes;
}

inline ckks::Fresh fresh_of(const ckks::Parameters& parameters, int level, double bound, const Doubles& scale,
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

using Common = std::optional<py::bytes>;

// The randomness that both sides have a part in, if there is any.
inline std::optional<ckks::SeedBytes> common_of(const Common& common) {
  if (!common) return std::nullopt;
  return fixed<32>(*common, "common randomness");
}

inline const ckks::SeedBytes* pointer_to(const std::optional<ckks::SeedBytes>& common) {
  return common ? &*common : nullptr;
}

inline void require_packed(const ckks::Values& numbers, std::size_t n) {
  if (numbers.tokens < 1 || numbers.tokens > n) {
    throw std::invalid_argument(std::to_string(numbers.tokens) + " numbers do not fit the " + std::to_string(n) +
                                " coefficients of a ciphertext");
  }
}

using Release = py::call_guard<py::gil_scoped_release>;

// Those of the coefficients [feature][N] where `count` numbers are packed, as uint64 (count, features).
inline py::array packed_words(const ckks::Parameters& parameters, const std::uint64_t* coefficients,
                              std::size_t features, std::size_t count) {
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

// The parts of register_ckks.
void register_ckks_keys(py::module_& module);
void register_ckks_evaluator(py::module_& module);

}  // namespace privtuner::bindings
