// What the kernels of residue rows share. Plain data and declarations alone: their files are compiled with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace privtuner::math {
struct Modulus;
}

namespace privtuner::ring::kernels {

struct Row {
  std::uint64_t q;
  double inverse;                // 1 / q rounded
  const math::Modulus* modulus;  // for the portable kernels
};

// See ResidueRow and the functions beside it.
struct ResidueKernels {
  void (*add)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*subtract)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*negate)(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n);
  void (*multiply)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*multiply_scalar)(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n);
  void (*subtract_multiply)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t w,
                            std::uint64_t* out, std::size_t n);
  void (*add_scalar)(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n);
  void (*reduce)(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n);
  void (*inner_product)(const Row& row, const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                        std::uint64_t* out, std::size_t n);
  void (*linear_combination)(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                             std::uint64_t* out, std::size_t n);
  void (*quotient)(const std::uint64_t* const* a, const double* inverse, std::size_t terms, std::uint64_t* out,
                   std::size_t n);
  void (*permute)(const std::uint64_t* a, const std::uint32_t* index, std::uint64_t* out, std::size_t n);
};

const ResidueKernels& residues_portable();
const ResidueKernels& residues_avx2();
const ResidueKernels& residues_avx512();
const ResidueKernels& residues_avx512ifma();

}  // namespace privtuner::ring::kernels
