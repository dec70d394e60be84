#include "privtuner/ring/residues.hpp"

#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace privtuner::ring {
namespace {

constexpr std::size_t kRowUnit = 16;  // words

std::uint64_t checked_prime(std::uint64_t q) {
  if (q <= (std::uint64_t{1} << 16) || (q >> 50) != 0 || !math::is_prime(q)) {
    throw std::invalid_argument("no residue rows modulo " + std::to_string(q) +
                                ": choose a prime between 2^16 and 2^50");
  }
  return q;
}

void check_length(std::size_t n) {
  if (n % kRowUnit != 0) {
    throw std::invalid_argument("a row of " + std::to_string(n) + " words: pass a multiple of " +
                                std::to_string(kRowUnit));
  }
}

void check_terms(std::size_t terms) {
  if (terms < 1 || terms > kMaxTerms) {
    throw std::invalid_argument("a sum of " + std::to_string(terms) + " terms: pass 1 to " + std::to_string(kMaxTerms));
  }
}

const kernels::ResidueKernels& kernels_for(math::Isa isa) { return kernels::kernels_of(isa).residues; }

}  // namespace

ResidueRow::ResidueRow(std::uint64_t q) : modulus_(checked_prime(q)), inverse_(1.0 / static_cast<double>(q)) {}

void ResidueRow::add(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                     math::Isa isa) const {
  check_length(n);
  kernels_for(isa).add({modulus_.q, inverse_, &modulus_}, a, b, out, n);
}

void ResidueRow::subtract(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                          math::Isa isa) const {
  check_length(n);
  kernels_for(isa).subtract({modulus_.q, inverse_, &modulus_}, a, b, out, n);
}

void ResidueRow::negate(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  kernels_for(isa).negate({modulus_.q, inverse_, &modulus_}, a, out, n);
}

void ResidueRow::multiply(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                          math::Isa isa) const {
  check_length(n);
  kernels_for(isa).multiply({modulus_.q, inverse_, &modulus_}, a, b, out, n);
}

void ResidueRow::multiply_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n,
                                 math::Isa isa) const {
  check_length(n);
  kernels_for(isa).multiply_scalar({modulus_.q, inverse_, &modulus_}, a, w, out, n);
}

void ResidueRow::subtract_multiply(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t w, std::uint64_t* out,
                                   std::size_t n, math::Isa isa) const {
  check_length(n);
  kernels_for(isa).subtract_multiply({modulus_.q, inverse_, &modulus_}, a, b, w, out, n);
}

void ResidueRow::add_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n,
                            math::Isa isa) const {
  check_length(n);
  kernels_for(isa).add_scalar({modulus_.q, inverse_, &modulus_}, a, w, out, n);
}

void ResidueRow::reduce(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  kernels_for(isa).reduce({modulus_.q, inverse_, &modulus_}, a, out, n);
}

void ResidueRow::inner_product(const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                               std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  check_terms(terms);
  kernels_for(isa).inner_product({modulus_.q, inverse_, &modulus_}, a, b, terms, out, n);
}

void ResidueRow::linear_combination(const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                                    std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  check_terms(terms);
  kernels_for(isa).linear_combination({modulus_.q, inverse_, &modulus_}, a, w, terms, out, n);
}

void quotient_row(const std::uint64_t* const* a, const double* inverse, std::size_t terms, std::uint64_t* out,
                  std::size_t n, math::Isa isa) {
  check_length(n);
  check_terms(terms);
  kernels_for(isa).quotient(a, inverse, terms, out, n);
}

void permute_row(const std::uint64_t* a, const std::uint32_t* index, std::uint64_t* out, std::size_t n, math::Isa isa) {
  check_length(n);
  kernels_for(isa).permute(a, index, out, n);
}

}  // namespace privtuner::ring
