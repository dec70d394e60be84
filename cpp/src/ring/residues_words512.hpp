// Eight words or doubles in an AVX-512 register (F, DQ). Included by the kernels' files alone; internal linkage.
#pragma once

#include <immintrin.h>

#include "residues_loops.hpp"

namespace privtuner::ring::kernels {
namespace {

struct ResidueWords512 {
  using Vec = __m512i;
  using Real = __m512d;
  static constexpr std::size_t kLanes = 8;

  static PRIVTUNER_INLINE Vec load(const std::uint64_t* p) { return _mm512_loadu_si512(p); }
  static PRIVTUNER_INLINE void store(std::uint64_t* p, Vec x) { _mm512_storeu_si512(p, x); }
  static PRIVTUNER_INLINE Vec all(std::uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static PRIVTUNER_INLINE Vec add(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
  static PRIVTUNER_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_epi64(a, b); }
  // From [-q, q): of x and x + q the smaller as unsigned words.
  static PRIVTUNER_INLINE Vec add_if_negative(Vec x, Vec q) { return _mm512_min_epu64(x, _mm512_add_epi64(x, q)); }

  static PRIVTUNER_INLINE Real all_real(double x) { return _mm512_set1_pd(x); }
  static PRIVTUNER_INLINE Real real(Vec x) { return _mm512_cvtepu64_pd(x); }
  static PRIVTUNER_INLINE Vec signed_words(Real x) { return _mm512_cvtpd_epi64(x); }
  static PRIVTUNER_INLINE Vec floor_words(Real x) { return _mm512_cvttpd_epi64(x); }  // x >= 0
  static PRIVTUNER_INLINE Real add(Real a, Real b) { return _mm512_add_pd(a, b); }
  static PRIVTUNER_INLINE Real sub(Real a, Real b) { return _mm512_sub_pd(a, b); }
  static PRIVTUNER_INLINE Real mul(Real a, Real b) { return _mm512_mul_pd(a, b); }
  static PRIVTUNER_INLINE Real fma(Real a, Real b, Real c) { return _mm512_fmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fms(Real a, Real b, Real c) { return _mm512_fmsub_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fnma(Real a, Real b, Real c) { return _mm512_fnmadd_pd(a, b, c); }
};

}  // namespace
}  // namespace privtuner::ring::kernels
