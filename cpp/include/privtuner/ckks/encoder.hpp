// The canonical embedding: N/2 slots to N coefficients and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "privtuner/math/memory.hpp"

namespace privtuner::ckks {

// Slot j holds m(zeta^(5^j)), zeta = exp(i pi / N) (Cheon, Kim, Kim, Song, "Homomorphic Encryption for Arithmetic of
// Approximate Numbers", 2017; the transform of its section 3 as an iterative FFT over the orbit of 5). In double
// precision, without fused steps.
class Encoder {
 public:
  // n: ring dimension, a power of two from 4 on.
  explicit Encoder(std::size_t n);
  std::size_t slots() const { return slots_; }

  // Slots to coefficients: re, im of N/2 words in, coefficients 0 .. N/2 - 1 in re and N/2 .. N - 1 in im out, real.
  void to_coefficients(double* re, double* im) const;
  // The inverse.
  void to_slots(double* re, double* im) const;

 private:
  void bit_reverse(double* re, double* im) const;
  std::size_t slots_;
  std::vector<std::uint32_t> reversed_;
  math::AlignedVector<double> cos_, sin_;  // stage of half-length h at [h, 2h)
};

}  // namespace privtuner::ckks
