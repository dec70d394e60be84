#include "privtuner/ckks/plaintext.hpp"

#include <cmath>
#include <string>

namespace privtuner::ckks {

void encode(const Parameters& parameters, const Values& values, std::size_t feature, double scale,
            std::int64_t* coefficients) {
  const std::size_t slots = parameters.slots();
  math::SecretBuffer<double> buffer(2 * slots);  // clear values are as secret as keys
  double *re = buffer.data(), *im = re + slots;
  const auto column = static_cast<std::ptrdiff_t>(feature) * values.feature_stride;
  for (std::size_t t = 0; t < slots; ++t) {
    const auto at = static_cast<std::ptrdiff_t>(t) * values.token_stride + column;
    re[t] = t < values.tokens ? values.re[at] : 0;
    im[t] = t < values.tokens && values.im != nullptr ? values.im[at] : 0;
  }
  parameters.encoder().to_coefficients(re, im);
  double largest = 0;
  for (std::size_t i = 0; i < 2 * slots; ++i) {
    const double x = re[i] * scale;  // im follows re
    largest = std::fmax(largest, std::fabs(x));
    coefficients[i] = std::fabs(x) < 0x1p62 ? static_cast<std::int64_t>(std::nearbyint(x)) : 0;
  }
  if (!(largest < 0x1p62)) {
    throw Error("values times the scale 2^" + std::to_string(std::log2(scale)) +
                " pass 2^62; encrypt smaller values or choose a smaller scale");
  }
}

void check_encoding(const Parameters& parameters, const Values& values, const std::vector<double>& scale) {
  math::SecretBuffer<std::int64_t> coefficients(parameters.n());
  for (std::size_t f = 0; f < values.features; ++f) encode(parameters, values, f, scale[f], coefficients.data());
}

std::uint64_t residue_of(double value, const math::Modulus& q) {
  int exponent = 0;
  const auto mantissa = static_cast<std::int64_t>(std::ldexp(std::frexp(value, &exponent), 53));
  exponent -= 53;
  const std::uint64_t residue = q.reduce_signed(mantissa);
  if (exponent >= 0) return q.mul(residue, q.pow(2, static_cast<std::uint64_t>(exponent)));
  return q.reduce_signed(static_cast<std::int64_t>(value));  // below 2^53: exact as it is
}

void to_row(const Parameters& parameters, std::size_t i, const std::int64_t* coefficients, std::uint64_t* out) {
  const math::Modulus& q = parameters.prime(i).row.modulus();
  for (std::size_t k = 0; k < parameters.n(); ++k) out[k] = q.reduce_signed(coefficients[k]);
  parameters.prime(i).ntt.forward(out, math::active_isa());
}

void small_residues(const Parameters& parameters, std::size_t i, const std::int8_t* coefficients, std::uint64_t* out) {
  const math::Modulus& q = parameters.prime(i).row.modulus();
  for (std::size_t k = 0; k < parameters.n(); ++k) {
    out[k] = q.add_if_negative(static_cast<std::uint64_t>(std::int64_t{coefficients[k]}));
  }
}

void small_to_row(const Parameters& parameters, std::size_t i, const std::int8_t* coefficients, std::uint64_t* out) {
  small_residues(parameters, i, coefficients, out);
  parameters.prime(i).ntt.forward(out, math::active_isa());
}

}  // namespace privtuner::ckks
