// AVX2 and FMA: 8 words of 32 bits, 4 of 64 bits or 4 doubles in a register. See simd.hpp.
#pragma once

#include <immintrin.h>

#include "privtuner/math/simd.hpp"

namespace privtuner::simd {
namespace {

template <class Word>
struct Pairs256;

struct Simd256 {
  using Vec = __m256i;
  using Real = __m256d;
  static constexpr std::size_t kBytes = 32, kRegisters = 16;

  static PRIVTUNER_INLINE Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
  static PRIVTUNER_INLINE void store(void* p, Vec x) { _mm256_storeu_si256(static_cast<Vec*>(p), x); }
  static PRIVTUNER_INLINE Vec all32(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static PRIVTUNER_INLINE Vec all64(std::uint64_t x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static PRIVTUNER_INLINE Vec bit_and(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static PRIVTUNER_INLINE Vec bit_xor(Vec a, Vec b) { return _mm256_xor_si256(a, b); }

  static PRIVTUNER_INLINE Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  static PRIVTUNER_INLINE Vec sub32(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
  static PRIVTUNER_INLINE Vec multiply32(Vec a, Vec b) { return _mm256_mullo_epi32(a, b); }
  static PRIVTUNER_INLINE Vec subtract_modulo32(Vec a, Vec b, Vec q) {
    const Vec no_borrow = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);  // a >= b
    return add32(sub32(a, b), _mm256_andnot_si256(no_borrow, q));
  }
  static PRIVTUNER_INLINE Vec odd32(Vec x) { return _mm256_srli_epi64(x, 32); }
  static PRIVTUNER_INLINE Vec multiply_even(Vec a, Vec b) { return _mm256_mul_epu32(a, b); }
  static PRIVTUNER_INLINE Vec high_halves(Vec even, Vec odd) {
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
  template <int bits>
  static PRIVTUNER_INLINE Vec rotate_left32(Vec x) {
    if constexpr (bits == 16 || bits == 8) {  // whole bytes: one permutation
      const Vec bytes = bits == 16 ? _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0, 1,
                                                      6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                                   : _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3, 0, 1, 2,
                                                      7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
      return _mm256_shuffle_epi8(x, bytes);
    }
    return _mm256_or_si256(_mm256_slli_epi32(x, bits), _mm256_srli_epi32(x, 32 - bits));
  }
  static PRIVTUNER_INLINE void transpose_quads(Vec x[4]) {
    const Vec a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
    const Vec c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm256_unpacklo_epi64(a, c);
    x[1] = _mm256_unpackhi_epi64(a, c);
    x[2] = _mm256_unpacklo_epi64(b, d);
    x[3] = _mm256_unpackhi_epi64(b, d);
  }
  static PRIVTUNER_INLINE Vec permute32(Vec x, Vec places) { return _mm256_permutevar8x32_epi32(x, places); }
  static PRIVTUNER_INLINE void store_quads(std::uint8_t* out, std::size_t step, Vec a, Vec b, Vec c, Vec d) {
    store(out, _mm256_permute2x128_si256(a, b, 0x20));
    store(out + 32, _mm256_permute2x128_si256(c, d, 0x20));
    store(out + step, _mm256_permute2x128_si256(a, b, 0x31));
    store(out + step + 32, _mm256_permute2x128_si256(c, d, 0x31));
  }
  static PRIVTUNER_INLINE Vec add8(Vec a, Vec b) { return _mm256_add_epi8(a, b); }
  // Two halves looked up in a register, in constant time.
  static PRIVTUNER_INLINE Vec byte_counts(Vec x) {
    const Vec counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const Vec low = _mm256_set1_epi8(15);
    return add8(_mm256_shuffle_epi8(counts, bit_and(x, low)),
                _mm256_shuffle_epi8(counts, bit_and(_mm256_srli_epi32(x, 4), low)));
  }
  static PRIVTUNER_INLINE Vec add_bytes(Vec sums, Vec x) {
    const Vec pairs = _mm256_maddubs_epi16(x, _mm256_set1_epi8(1));
    return add32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static PRIVTUNER_INLINE void store_low_bytes(std::int8_t* out, const Vec x[2]) {
    // Words 0-3, 8-11, 4-7, 12-15 as 16 bits; then in order; then as bytes.
    const Vec halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(x[0], x[1]), _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  }
  static PRIVTUNER_INLINE unsigned not_below(std::uint32_t, Vec x, Vec bound) {
    return static_cast<unsigned>(
        _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(x, bound), x))));
  }

  static PRIVTUNER_INLINE Vec add64(Vec a, Vec b) { return _mm256_add_epi64(a, b); }
  static PRIVTUNER_INLINE Vec sub64(Vec a, Vec b) { return _mm256_sub_epi64(a, b); }
  template <int bits>
  static PRIVTUNER_INLINE Vec shift_right64(Vec x) {
    return _mm256_srli_epi64(x, bits);
  }
  // Keeps x where x - bound has its sign bit set.
  static PRIVTUNER_INLINE Vec subtract_once64(Vec x, Vec bound) {
    const Real less = _mm256_castsi256_pd(sub64(x, bound));
    return _mm256_castpd_si256(_mm256_blendv_pd(less, _mm256_castsi256_pd(x), less));
  }
  static PRIVTUNER_INLINE Vec add_if_negative64(Vec x, Vec q) {
    const Real plain = _mm256_castsi256_pd(x), raised = _mm256_castsi256_pd(add64(x, q));
    return _mm256_castpd_si256(_mm256_blendv_pd(plain, raised, plain));
  }
  struct Multiplier {
    Vec w, swapped;  // as it is, and with its halves swapped
  };
  static PRIVTUNER_INLINE Vec swap_halves(Vec x) { return _mm256_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1)); }
  static PRIVTUNER_INLINE Multiplier multiplier(Vec w) { return {w, swap_halves(w)}; }
  // The low products in full, of the cross products the low halves.
  static PRIVTUNER_INLINE Vec products_difference(Vec x, const Multiplier& w, Vec y, const Multiplier& v) {
    const Vec low = sub64(multiply_even(x, w.w), multiply_even(y, v.w));
    const Vec cross = sub32(multiply32(x, w.swapped), multiply32(y, v.swapped));
    const Vec cross_sum = add32(cross, swap_halves(cross));  // the same in both halves
    return add64(low, _mm256_slli_epi64(cross_sum, 32));
  }
  static PRIVTUNER_INLINE unsigned not_below(std::uint64_t, Vec x, Vec bound) {
    const Vec sign = all64(std::uint64_t{1} << 63);  // to compare as unsigned
    const Vec below = _mm256_cmpgt_epi64(bit_xor(bound, sign), bit_xor(x, sign));
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(below))) ^ 15u;
  }

  static PRIVTUNER_INLINE Real all_real(double x) { return _mm256_set1_pd(x); }
  static PRIVTUNER_INLINE Real add(Real a, Real b) { return _mm256_add_pd(a, b); }
  static PRIVTUNER_INLINE Real sub(Real a, Real b) { return _mm256_sub_pd(a, b); }
  static PRIVTUNER_INLINE Real mul(Real a, Real b) { return _mm256_mul_pd(a, b); }
  static PRIVTUNER_INLINE Real fma(Real a, Real b, Real c) { return _mm256_fmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fms(Real a, Real b, Real c) { return _mm256_fmsub_pd(a, b, c); }
  static PRIVTUNER_INLINE Real fnma(Real a, Real b, Real c) { return _mm256_fnmadd_pd(a, b, c); }
  static PRIVTUNER_INLINE Vec bits_of(Real x) { return _mm256_castpd_si256(x); }
  static PRIVTUNER_INLINE Real from_bits(Vec x) { return _mm256_castsi256_pd(x); }
  // A word below 2^52 as the low bits of a double is that word above 2^52.
  static PRIVTUNER_INLINE Real real(Vec x) {
    const Real two52 = all_real(kTwo52);
    return sub(_mm256_or_pd(_mm256_castsi256_pd(x), two52), two52);
  }
  static PRIVTUNER_INLINE Vec signed_words(Real x) {
    const Real shift = all_real(kRoundingShift);
    return sub64(_mm256_castpd_si256(add(x, shift)), _mm256_castpd_si256(shift));
  }
  static PRIVTUNER_INLINE Vec floor_words(Real x) { return signed_words(_mm256_floor_pd(x)); }

  template <class Word>
  using Pairs = Pairs256<Word>;
};

// No perfect shuffle: crossing the halves of a register in every stage would cost a permutation more.
//
// A word's number in its pair is b3 b2 b1 b0; a place is a register and a lane. In order: register b3, lane b2 b1 b0.
// The splits lead to register b0, lane b2 b3 b1; register b1, lane b2 b0 b3; register b2, lane b1 b0 b3; register b3,
// lane b1 b2 b0; and back to order. The factor of a butterfly has the number formed by the bits above the register's.
template <>
struct Pairs256<std::uint32_t> {
  using Vec = __m256i;
  static constexpr int kStages = 4;

  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    const Vec x = a, y = b;
    if constexpr (stage == 0 || stage == 1 || stage == 3) {
      const __m256 x_ps = _mm256_castsi256_ps(x), y_ps = _mm256_castsi256_ps(y);
      a = _mm256_castps_si256(_mm256_shuffle_ps(x_ps, y_ps, _MM_SHUFFLE(2, 0, 2, 0)));
      b = _mm256_castps_si256(_mm256_shuffle_ps(x_ps, y_ps, _MM_SHUFFLE(3, 1, 3, 1)));
    } else if constexpr (stage == 2) {
      a = _mm256_permute2x128_si256(x, y, 0x20);
      b = _mm256_permute2x128_si256(x, y, 0x31);
    } else {
      a = _mm256_permute4x64_epi64(x, _MM_SHUFFLE(3, 1, 2, 0));
      b = _mm256_permute4x64_epi64(y, _MM_SHUFFLE(3, 1, 2, 0));
    }
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& a, Vec& b) {
    const Vec x = a, y = b;
    if constexpr (stage == 0 || stage == 1 || stage == 3) {
      a = _mm256_unpacklo_epi32(x, y);
      b = _mm256_unpackhi_epi32(x, y);
    } else {
      split<stage>(a, b);  // its own inverse
    }
  }
  template <int stage>
  static PRIVTUNER_INLINE Vec arrange(const std::uint32_t* p) {
    if constexpr (stage == 0) return _mm256_permute4x64_epi64(Simd256::load(p), _MM_SHUFFLE(3, 1, 2, 0));
    if constexpr (stage == 1) {
      const Vec four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3));
    }
    if constexpr (stage == 2) return _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if constexpr (stage == 3) return Simd256::all32(*p);
  }
};

// In order: register b2, lane b1 b0. The splits lead to register b0, lane b1 b2; register b1, lane b0 b2; register b2,
// lane b0 b1; and back to order.
template <>
struct Pairs256<std::uint64_t> {
  using Vec = __m256i;
  static constexpr int kStages = 3;

  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    const Vec x = a, y = b;
    if constexpr (stage == 0 || stage == 2) {
      a = _mm256_unpacklo_epi64(x, y);
      b = _mm256_unpackhi_epi64(x, y);
    } else if constexpr (stage == 1) {
      a = _mm256_permute2x128_si256(x, y, 0x20);
      b = _mm256_permute2x128_si256(x, y, 0x31);
    } else {
      a = _mm256_permute4x64_epi64(x, _MM_SHUFFLE(3, 1, 2, 0));
      b = _mm256_permute4x64_epi64(y, _MM_SHUFFLE(3, 1, 2, 0));
    }
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& a, Vec& b) {
    split<stage>(a, b);  // each its own inverse
  }
  template <int stage>
  static PRIVTUNER_INLINE Vec arrange(const std::uint64_t* p) {
    if constexpr (stage == 0) return _mm256_permute4x64_epi64(Simd256::load(p), _MM_SHUFFLE(3, 1, 2, 0));
    if constexpr (stage == 1) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    if constexpr (stage == 2) return Simd256::all64(*p);
  }
};

}  // namespace
}  // namespace privtuner::simd
