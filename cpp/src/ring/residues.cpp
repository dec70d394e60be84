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

ResidueRow::ResidueRow(std::uint64_t q) : modulus_(checked_prime(q)), inverse_(1.0 / static_cast<double>(q)) {
  const auto companion = [q](std::uint64_t w) { return static_cast<std::uint64_t>((math::Uint128{w} << 52) / q); };
  int bits = 17;
  while ((q >> bits) != 0) ++bits;
  words52_.reciprocal = static_cast<std::uint64_t>((math::Uint128{1} << (2 * bits)) / q);
  words52_.one_companion = companion(1);
  words52_.two52 = (std::uint64_t{1} << 52) % q;
  words52_.two52_companion = companion(words52_.two52);
  words52_.two104 = static_cast<std::uint64_t>((math::Uint128{1} << 104) % q);
  words52_.two104_companion = companion(words52_.two104);
}

void ResidueRow::add(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                     math::Isa isa) const {
  check_length(n);
  kernels_for(isa).add(kernel_row(), a, b, out, n);
}

void ResidueRow::subtract(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                          math::Isa isa) const {
  check_length(n);
  kernels_for(isa).subtract(kernel_row(), a, b, out, n);
}

void ResidueRow::negate(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  kernels_for(isa).negate(kernel_row(), a, out, n);
}

void ResidueRow::multiply(const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n,
                          math::Isa isa) const {
  check_length(n);
  kernels_for(isa).multiply(kernel_row(), a, b, out, n);
}

void ResidueRow::multiply_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n,
                                 math::Isa isa) const {
  check_length(n);
  kernels_for(isa).multiply_scalar(kernel_row(), a, w, out, n);
}

void ResidueRow::add_scalar(const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n,
                            math::Isa isa) const {
  check_length(n);
  kernels_for(isa).add_scalar(kernel_row(), a, w, out, n);
}

void ResidueRow::reduce(const std::uint64_t* a, std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  kernels_for(isa).reduce(kernel_row(), a, out, n);
}

void ResidueRow::inner_product(const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                               std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  check_terms(terms);
  kernels_for(isa).inner_product(kernel_row(), a, b, terms, out, n);
}

void ResidueRow::linear_combination(const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                                    std::uint64_t* out, std::size_t n, math::Isa isa) const {
  check_length(n);
  check_terms(terms);
  kernels_for(isa).linear_combination(kernel_row(), a, w, terms, out, n);
}

void convert_rows(const std::uint64_t* const* a, const double* inverse, std::size_t terms,
                  const kernels::ConversionTarget* targets, std::size_t count, std::size_t begin, std::size_t end,
                  math::Isa isa) {
  check_length(begin);
  check_length(end);
  if (terms < 1 || terms > kMaxConverted) {
    throw std::invalid_argument("a base conversion of " + std::to_string(terms) + " rows: pass 1 to " +
                                std::to_string(kMaxConverted));
  }
  kernels_for(isa).convert(a, inverse, terms, targets, count, begin, end);
}

Automorphism::Automorphism(std::size_t n, std::uint32_t element) : element_(element) {
  if (n < 16 || (n & (n - 1)) != 0 || element % 2 == 0 || element >= 2 * n) {
    throw std::invalid_argument("no automorphism X -> X^" + std::to_string(element) + " of " + std::to_string(n) +
                                " coefficients: pass a power of two and an odd number below twice that");
  }
  const std::size_t groups = n / kernels::kGroupWords;
  const auto reverse = [groups](std::size_t k) {
    std::size_t result = 0;
    for (std::size_t bit = 1; bit < groups; bit *= 2, k /= 2) result = 2 * result + (k & 1);
    return result;
  };
  // Word i is the value at psi^(2 e + 1), e = brv(i), and becomes that at the element-th power of it: e' = e element +
  // (element - 1) / 2. The words of a group share the low bits of e, so those of e' too; what passes them is the carry.
  for (std::size_t g = 0; g < groups; ++g) {
    const std::size_t e = reverse(g) * element + (element - 1) / 2;
    sources_.push_back(
        static_cast<std::uint32_t>(reverse(e % groups) * kernels::kGroupWords + e / groups % kernels::kGroupWords));
  }
}

void Automorphism::check_block(std::size_t begin, std::size_t words) const {
  const std::size_t n = sources_.size() * kernels::kGroupWords;
  if (words < kernels::kGroupWords || (words & (words - 1)) != 0 || begin % words != 0 || begin >= n || words > n) {
    throw std::invalid_argument("words " + std::to_string(begin) + " to " + std::to_string(begin + words) +
                                " are no block of a row of " + std::to_string(n) +
                                ": pass a power of two of words from 8 on, and a multiple of it");
  }
}

std::size_t Automorphism::source(std::size_t begin, std::size_t words) const {
  check_block(begin, words);
  return sources_[begin / kernels::kGroupWords] / words * words;
}

void Automorphism::permute(const std::uint64_t* block, std::size_t begin, std::size_t words, std::uint64_t* out,
                           math::Isa isa) const {
  check_block(begin, words);
  kernels_for(isa).permute({sources_.data(), element_}, block, source(begin, words) / kernels::kGroupWords,
                           begin / kernels::kGroupWords, words / kernels::kGroupWords, out);
}

}  // namespace privtuner::ring
