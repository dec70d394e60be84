// AVX2 and FMA: 4 words of 64 bits or 4 doubles in a register.
#include <immintrin.h>

#include "residues_real.hpp"

namespace privtuner::ring::kernels {
namespace {

struct ResidueWords256 {
  using Vec = __m256i;
  using Real = __m256d;
  static constexpr std::size_t kLanes = 4;

  static PRIVTUNER_INLINE Vec load(const std::uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const Vec*>(p));
  }
  static PRIVTUNER_INLINE void store(std::uint64_t* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<Vec*>(p), x); }
  static PRIVTUNER_INLINE Vec all(std::uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static PRIVTUNER_INLINE Vec add(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
  static PRIVTUNER_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_epi64(a, b); }
  // From [-q, q): x + q where x has its sign bit set.
  static PRIVTUNER_INLINE Vec add_if_negative(Vec x, Vec q) {
    const Real plain = _mm256_castsi256_pd(x), raised = _mm256_castsi256_pd(add(x, q));
    return _mm256_castpd_si256(_mm256_blendv_pd(plain, raised, plain));
  }

  static PRIVTUNER_INLINE Real all_real(double x) { return _mm256_set1_pd(x); }
  // A word below 2^52 as the low bits of a double is that word above 2^52.
  static PRIVTUNER_INLINE Real real(Vec x) {
    const Real two52 = all_real(kTwo52);
    return sub(_mm256_or_pd(_mm256_castsi256_pd(x), two52), two52);
  }
  // Integers, |x| < 2^51.
  static PRIVTUNER_INLINE Vec signed_words(Real x) {
    const Real shift = all_real(kRoundingShift);
    return sub(_mm256_castpd_si256(add(x, shift)), _mm256_castpd_si256(shift));
  }
  static PRIVTUNER_INLINE Vec floor_words(Real x) { return signed_words(_mm256_floor_pd(x)); }
  static PRIVTUNER_INLINE Real add(Real a, Real b) { return _mm256_add_pd(a, b); }
  static PRIVTUNER_INLINE Real sub(Real a, Real b) { return _mm256_sub_pd(a, b); }
  static PRIVTUNER_INLINE Real mul(Real a, Real b) { return _mm256_mul_pd(a, b); }
  static PRIVTUNER_INLINE Real fma(Real a, Real b, Real c) { return _mm256_fmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fms(Real a, Real b, Real c) { return _mm256_fmsub_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fnma(Real a, Real b, Real c) { return _mm256_fnmadd_pd(a, b, c); }
};

}  // namespace

const ResidueKernels& residues_avx2() { return ResidueLoops<RealLanes<ResidueWords256>>::kKernels; }

}  // namespace privtuner::ring::kernels
