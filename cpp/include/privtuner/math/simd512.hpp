// AVX-512 (F, BW, DQ, VL, VNNI): 16 words of 32 bits, 8 of 64 bits or 8 doubles in a register. See simd.hpp.
#pragma once

#include <immintrin.h>

#include "privtuner/math/simd.hpp"

namespace privtuner::simd {
namespace {

struct Simd512 {
  using Vec = __m512i;
  using Real = __m512d;
  static constexpr std::size_t kBytes = 64, kRegisters = 32;

  static PRIVTUNER_INLINE Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static PRIVTUNER_INLINE void store(void* p, Vec x) { _mm512_storeu_si512(p, x); }
  static PRIVTUNER_INLINE Vec all32(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static PRIVTUNER_INLINE Vec all64(std::uint64_t x) { return _mm512_set1_epi64(static_cast<long long>(x)); }
  static PRIVTUNER_INLINE Vec bit_and(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  static PRIVTUNER_INLINE Vec bit_xor(Vec a, Vec b) { return _mm512_xor_si512(a, b); }

  static PRIVTUNER_INLINE Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  static PRIVTUNER_INLINE Vec sub32(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
  static PRIVTUNER_INLINE Vec multiply32(Vec a, Vec b) { return _mm512_mullo_epi32(a, b); }
  static PRIVTUNER_INLINE Vec subtract_modulo32(Vec a, Vec b, Vec q) {
    const Vec difference = sub32(a, b);
    return _mm512_mask_add_epi32(difference, _mm512_cmplt_epu32_mask(a, b), difference, q);
  }
  // A permutation where a shift would do: it runs on twice as many ports of Zen 4.
  static PRIVTUNER_INLINE Vec odd32(Vec x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }
  static PRIVTUNER_INLINE Vec multiply_even(Vec a, Vec b) { return _mm512_mul_epu32(a, b); }
  static PRIVTUNER_INLINE Vec high_halves(Vec even, Vec odd) {
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  }
  template <int bits>
  static PRIVTUNER_INLINE Vec rotate_left32(Vec x) {
    return _mm512_rol_epi32(x, bits);
  }
  static PRIVTUNER_INLINE void transpose_quads(Vec x[4]) {
    const Vec a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const Vec c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
  }
  static PRIVTUNER_INLINE Vec permute32(Vec x, Vec places) { return _mm512_permutexvar_epi32(places, x); }
  static PRIVTUNER_INLINE void store_quads(std::uint8_t* out, std::size_t step, Vec x0, Vec x1, Vec x2, Vec x3) {
    const Vec a = _mm512_shuffle_i32x4(x0, x1, 0x44), b = _mm512_shuffle_i32x4(x0, x1, 0xee);
    const Vec c = _mm512_shuffle_i32x4(x2, x3, 0x44), d = _mm512_shuffle_i32x4(x2, x3, 0xee);
    store(out, _mm512_shuffle_i32x4(a, c, 0x88));
    store(out + step, _mm512_shuffle_i32x4(a, c, 0xdd));
    store(out + 2 * step, _mm512_shuffle_i32x4(b, d, 0x88));
    store(out + 3 * step, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
  static PRIVTUNER_INLINE Vec add8(Vec a, Vec b) { return _mm512_add_epi8(a, b); }
  // Two halves looked up in a register, in constant time.
  static PRIVTUNER_INLINE Vec byte_counts(Vec x) {
    const Vec counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const Vec low = _mm512_set1_epi8(15);
    return add8(_mm512_shuffle_epi8(counts, bit_and(x, low)),
                _mm512_shuffle_epi8(counts, bit_and(_mm512_srli_epi32(x, 4), low)));
  }
  static PRIVTUNER_INLINE Vec add_bytes(Vec sums, Vec x) { return _mm512_dpbusd_epi32(sums, x, _mm512_set1_epi8(1)); }
  static PRIVTUNER_INLINE void store_low_bytes(std::int8_t* out, const Vec x[1]) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x[0]));
  }
  static PRIVTUNER_INLINE unsigned not_below(std::uint32_t, Vec x, Vec bound) {
    return _mm512_cmpge_epu32_mask(x, bound);
  }

  static PRIVTUNER_INLINE Vec add64(Vec a, Vec b) { return _mm512_add_epi64(a, b); }
  static PRIVTUNER_INLINE Vec sub64(Vec a, Vec b) { return _mm512_sub_epi64(a, b); }
  template <int bits>
  static PRIVTUNER_INLINE Vec shift_right64(Vec x) {
    return _mm512_srli_epi64(x, bits);
  }
  // The smaller of the two as unsigned words.
  static PRIVTUNER_INLINE Vec subtract_once64(Vec x, Vec bound) { return _mm512_min_epu64(x, sub64(x, bound)); }
  static PRIVTUNER_INLINE Vec add_if_negative64(Vec x, Vec q) { return _mm512_min_epu64(x, add64(x, q)); }
  using Multiplier = Vec;
  static PRIVTUNER_INLINE Multiplier multiplier(Vec w) { return w; }
  static PRIVTUNER_INLINE Vec products_difference(Vec x, Multiplier w, Vec y, Multiplier v) {
    return sub64(_mm512_mullo_epi64(x, w), _mm512_mullo_epi64(y, v));
  }
  static PRIVTUNER_INLINE unsigned not_below(std::uint64_t, Vec x, Vec bound) {
    return _mm512_cmpge_epu64_mask(x, bound);
  }

  static PRIVTUNER_INLINE Real all_real(double x) { return _mm512_set1_pd(x); }
  static PRIVTUNER_INLINE Real add(Real a, Real b) { return _mm512_add_pd(a, b); }
  static PRIVTUNER_INLINE Real sub(Real a, Real b) { return _mm512_sub_pd(a, b); }
  static PRIVTUNER_INLINE Real mul(Real a, Real b) { return _mm512_mul_pd(a, b); }
  static PRIVTUNER_INLINE Real fma(Real a, Real b, Real c) { return _mm512_fmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fms(Real a, Real b, Real c) { return _mm512_fmsub_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fnma(Real a, Real b, Real c) { return _mm512_fnmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Vec bits_of(Real x) { return _mm512_castpd_si512(x); }
  static PRIVTUNER_INLINE Real from_bits(Vec x) { return _mm512_castsi512_pd(x); }
  static PRIVTUNER_INLINE Real real(Vec x) { return _mm512_cvtepu64_pd(x); }
  static PRIVTUNER_INLINE Vec signed_words(Real x) { return _mm512_cvtpd_epi64(x); }
  static PRIVTUNER_INLINE Vec floor_words(Real x) { return _mm512_cvttpd_epi64(x); }

  static PRIVTUNER_INLINE Vec even_words(std::uint32_t, Vec a, Vec b) {
    const Vec even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(a, even, b);
  }
  static PRIVTUNER_INLINE Vec odd_words(std::uint32_t, Vec a, Vec b) {
    const Vec odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_epi32(a, odd, b);
  }
  static PRIVTUNER_INLINE Vec low_mixed(std::uint32_t, Vec a, Vec b) {
    const Vec low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_epi32(a, low, b);
  }
  static PRIVTUNER_INLINE Vec high_mixed(std::uint32_t, Vec a, Vec b) {
    const Vec high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_epi32(a, high, b);
  }
  static PRIVTUNER_INLINE Vec even_words(std::uint64_t, Vec a, Vec b) {
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), b);
  }
  static PRIVTUNER_INLINE Vec odd_words(std::uint64_t, Vec a, Vec b) {
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15), b);
  }
  static PRIVTUNER_INLINE Vec low_mixed(std::uint64_t, Vec a, Vec b) {
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  }
  static PRIVTUNER_INLINE Vec high_mixed(std::uint64_t, Vec a, Vec b) {
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  }
  template <std::size_t bytes>
  static PRIVTUNER_INLINE Vec repeat(const void* p) {
    if constexpr (bytes == 64) return load(p);
    if constexpr (bytes == 32) return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    if constexpr (bytes == 16) return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    if constexpr (bytes == 8) return _mm512_broadcastq_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    if constexpr (bytes == 4) return all32(*static_cast<const std::uint32_t*>(p));
  }
  template <class Word>
  using Pairs = PerfectShuffle<Simd512, Word>;
};

}  // namespace
}  // namespace privtuner::simd
