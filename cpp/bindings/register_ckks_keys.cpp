// CKKS: keys and what the owner of the secret one does: encryption, decryption, refreshes.
#include <algorithm>
#include <complex>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ckks_arguments.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/refresh.hpp"

namespace privtuner::bindings {
namespace {

using ckks::ParametersPtr;
using ckks::Tensor;
using ckks::TensorPtr;

// The words of one key, [digit][component][prime][N], where they lie.
py::array_t<std::uint64_t> key_words(const std::shared_ptr<ckks::EvaluationKeys>& keys,
                                     std::optional<std::uint32_t> element) {
  if (element == ckks::kRelinearisation) throw std::invalid_argument("0 is no automorphism; None: relinearisation");
  const ckks::Parameters& p = *keys->parameters;
  const ckks::SwitchingKey& key = ckks::require_key(p, keys.get(), element.value_or(ckks::kRelinearisation));
  return view_of<std::uint64_t, ckks::EvaluationKeys>(keys, key.row(0, 0, 0),
                                                      shape_of({key.digits(), 2, p.prime_count(), p.n()}));
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

}  // namespace

void register_ckks_keys(py::module_& module) {
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
}

}  // namespace privtuner::bindings
