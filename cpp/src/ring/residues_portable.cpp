// The oracle: sums of products in 128 bits, reduced once.
#include <cmath>

#include "privtuner/math/modular.hpp"
#include "residues_kernels.hpp"

namespace privtuner::ring::kernels {
namespace {

using math::Modulus;
using math::Uint128;

std::uint64_t reduce_wide(Uint128 x, const Modulus& modulus) {
  const auto high = static_cast<std::uint64_t>(x >> 64), low = static_cast<std::uint64_t>(x);
  return modulus.add(modulus.mul_shoup(high, modulus.two64, modulus.two64_shoup), modulus.reduce(low));
}

void add(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.add(a[i], b[i]);
}

void subtract(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.sub(a[i], b[i]);
}

void negate(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.neg(a[i]);
}

void multiply(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.mul(a[i], b[i]);
}

void multiply_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  const std::uint64_t w_shoup = modulus.shoup(w);
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.mul_shoup(a[i], w, w_shoup);
}

void subtract_multiply(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t w,
                       std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  const std::uint64_t w_shoup = modulus.shoup(w);
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = modulus.mul_shoup(modulus.sub(a[i], modulus.reduce(b[i])), w, w_shoup);
  }
}

void add_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.add(a[i], w);
}

void reduce(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.reduce(a[i]);
}

void inner_product(const Row& row, const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                   std::uint64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    Uint128 sum = 0;
    for (std::size_t t = 0; t < terms; ++t) sum += static_cast<Uint128>(a[t][i]) * b[t][i];
    out[i] = reduce_wide(sum, *row.modulus);
  }
}

void linear_combination(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                        std::uint64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    Uint128 sum = 0;
    for (std::size_t t = 0; t < terms; ++t) sum += static_cast<Uint128>(a[t][i]) * w[t];
    out[i] = reduce_wide(sum, *row.modulus);
  }
}

void quotient(const std::uint64_t* const* a, const double* inverse, std::size_t terms, std::uint64_t* out,
              std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    double sum = 0;
    for (std::size_t t = 0; t < terms; ++t) sum += static_cast<double>(a[t][i]) * inverse[t];
    out[i] = static_cast<std::uint64_t>(std::floor(0.5 + sum));
  }
}

void permute(const std::uint64_t* a, const std::uint32_t* index, std::uint64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) out[i] = a[index[i]];
}

constexpr ResidueKernels kKernels = {
    &add,        &subtract, &negate,        &multiply,           &multiply_scalar, &subtract_multiply,
    &add_scalar, &reduce,   &inner_product, &linear_combination, &quotient,        &permute};

}  // namespace

const ResidueKernels& residues_portable() { return kKernels; }

}  // namespace privtuner::ring::kernels
