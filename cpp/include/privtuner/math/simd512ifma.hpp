// AVX-512 with IFMA: the operations of simd512.hpp and products of 52-bit words.
#pragma once

#include "privtuner/math/simd512.hpp"

namespace privtuner::simd {
namespace {

struct Simd512Ifma : Simd512 {
  // The low and the high 52 bits of the product of two words' low 52 bits, added to a sum.
  static PRIVTUNER_INLINE Vec add_low52(Vec sum, Vec a, Vec b) { return _mm512_madd52lo_epu64(sum, a, b); }
  static PRIVTUNER_INLINE Vec add_high52(Vec sum, Vec a, Vec b) { return _mm512_madd52hi_epu64(sum, a, b); }
  static PRIVTUNER_INLINE Vec shift_left64(Vec x, Vec bits) { return _mm512_sllv_epi64(x, bits); }
};

}  // namespace
}  // namespace privtuner::simd
