#include "privtuner/ckks/encoder.hpp"

#include <cmath>
#include <cstdint>
#include <utility>

namespace privtuner::ckks {

Encoder::Encoder(std::size_t n) : slots_(n / 2), reversed_(n / 2), cos_(n / 2), sin_(n / 2) {
  for (std::size_t i = 1; i < slots_; ++i) {
    reversed_[i] = static_cast<std::uint32_t>(reversed_[i / 2] / 2 + (i % 2) * (slots_ / 2));
  }
  // Stage of half-length h: the 8h-th root of unity to the power 5^j, j < h.
  for (std::size_t half = 1; half < slots_; half *= 2) {
    const std::size_t order = 8 * half;
    std::size_t power = 1;
    for (std::size_t j = 0; j < half; ++j) {
      const double angle = 2 * M_PI * static_cast<double>(power) / static_cast<double>(order);
      cos_[half + j] = std::cos(angle);
      sin_[half + j] = std::sin(angle);
      power = power * 5 % order;
    }
  }
}

void Encoder::bit_reverse(double* re, double* im) const {
  for (std::size_t i = 0; i < slots_; ++i) {
    const std::size_t j = reversed_[i];
    if (i < j) {
      std::swap(re[i], re[j]);
      std::swap(im[i], im[j]);
    }
  }
}

void Encoder::to_slots(double* __restrict re, double* __restrict im) const {
  bit_reverse(re, im);
  for (std::size_t half = 1; half < slots_; half *= 2) {
    const double* c = cos_.data() + half;
    const double* s = sin_.data() + half;
    for (std::size_t block = 0; block < slots_; block += 2 * half) {
      double *r0 = re + block, *i0 = im + block, *r1 = r0 + half, *i1 = i0 + half;
#pragma GCC ivdep
      for (std::size_t j = 0; j < half; ++j) {
        const double r = r1[j] * c[j] - i1[j] * s[j], i = r1[j] * s[j] + i1[j] * c[j];
        r1[j] = r0[j] - r;
        i1[j] = i0[j] - i;
        r0[j] += r;
        i0[j] += i;
      }
    }
  }
}

void Encoder::to_coefficients(double* __restrict re, double* __restrict im) const {
  for (std::size_t half = slots_ / 2; half >= 1; half /= 2) {
    const double* c = cos_.data() + half;
    const double* s = sin_.data() + half;
    for (std::size_t block = 0; block < slots_; block += 2 * half) {
      double *r0 = re + block, *i0 = im + block, *r1 = r0 + half, *i1 = i0 + half;
#pragma GCC ivdep
      for (std::size_t j = 0; j < half; ++j) {
        const double r = r0[j] - r1[j], i = i0[j] - i1[j];
        r0[j] += r1[j];
        i0[j] += i1[j];
        r1[j] = r * c[j] + i * s[j];
        i1[j] = i * c[j] - r * s[j];
      }
    }
  }
  bit_reverse(re, im);
  const double inverse = 1.0 / static_cast<double>(slots_);
  for (std::size_t i = 0; i < slots_; ++i) {
    re[i] *= inverse;
    im[i] *= inverse;
  }
}

}  // namespace privtuner::ckks
