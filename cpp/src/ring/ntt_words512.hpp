// Eight words of 64 bits in an AVX-512 register: what the lanes of both NTT files for such words share. Included by the
// kernels' files alone; internal linkage.
#pragma once

#include <immintrin.h>

#include "ntt_passes.hpp"

namespace privtuner::ring::kernels {
namespace {

struct Words512 {
  using Word = std::uint64_t;
  using Vec = __m512i;
  static constexpr std::size_t kLanes = 8;
  static constexpr int kPairStages = 4;

  static PRIVTUNER_INLINE Vec load(const Word* p) { return _mm512_loadu_si512(p); }
  static PRIVTUNER_INLINE void store(Word* p, Vec x) { _mm512_storeu_si512(p, x); }
  static PRIVTUNER_INLINE Vec all(Word x) { return _mm512_set1_epi64(static_cast<long long>(x)); }

  // 8 >> stage words, repeated.
  template <int stage>
  static PRIVTUNER_INLINE Vec repeat(const Word* p) {
    if constexpr (stage == 0) return _mm512_loadu_si512(p);
    if constexpr (stage == 1) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (stage == 2) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if constexpr (stage == 3) return all(*p);
  }

  // The same perfect shuffle before each of the four stages: a butterfly of stage s joins words whose numbers differ in
  // bit s, the shuffle moves bit s to the register, and after four the numbers are back in order.
  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    if constexpr (stage == kPairStages) return;
    const Vec u = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
    const Vec v = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
    a = u;
    b = v;
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& u, Vec& v) {
    if constexpr (stage == kPairStages) return;
    const Vec a = _mm512_permutex2var_epi64(u, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), v);
    const Vec b = _mm512_permutex2var_epi64(u, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), v);
    u = a;
    v = b;
  }

  // [0, 2 bound) to [0, bound): the smaller of x and x - bound as unsigned words.
  static PRIVTUNER_INLINE Vec subtract_once(Vec x, Vec bound) {
    return _mm512_min_epu64(x, _mm512_sub_epi64(x, bound));
  }
};

}  // namespace
}  // namespace privtuner::ring::kernels
