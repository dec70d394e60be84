// Clear values as ring elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/ckks/parameters.hpp"

namespace privtuner::ckks {

// A view of clear values (tokens, features), doubles; im may be null. Strides in doubles.
struct Values {
  const double* re = nullptr;
  const double* im = nullptr;
  std::size_t tokens = 0, features = 0;
  std::ptrdiff_t token_stride = 0, feature_stride = 0;
};

// N coefficients of feature `feature`, slots beyond the tokens zero, rounded after scaling. Throws Error if a
// coefficient reaches 2^62.
void encode(const Parameters& parameters, const Values& values, std::size_t feature, double scale,
            std::int64_t* coefficients);

// Throws Error where encode would, for any feature; scale: one a feature.
void check_encoding(const Parameters& parameters, const Values& values, const std::vector<double>& scale);

// value modulo q; value a whole number of any size a double holds.
std::uint64_t residue_of(double value, const math::Modulus& q);

// Coefficients modulo prime `i`, NTT domain.
void to_row(const Parameters& parameters, std::size_t i, const std::int64_t* coefficients, std::uint64_t* out);

// The same of small ones, |c| < 2^7: as they are, and in the NTT domain.
void small_residues(const Parameters& parameters, std::size_t i, const std::int8_t* coefficients, std::uint64_t* out);
void small_to_row(const Parameters& parameters, std::size_t i, const std::int8_t* coefficients, std::uint64_t* out);

}  // namespace privtuner::ckks
