// Sixteen blocks side by side: register i holds word i of each (RFC 8439, section 2.3, on every lane).
#include <immintrin.h>

#include "chacha20_kernels.hpp"

#define PRIVTUNER_INLINE inline __attribute__((always_inline))

namespace privtuner::ring::kernels {
namespace {

PRIVTUNER_INLINE void quarter_round(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
  a = _mm512_add_epi32(a, b);
  d = _mm512_rol_epi32(_mm512_xor_si512(d, a), 16);
  c = _mm512_add_epi32(c, d);
  b = _mm512_rol_epi32(_mm512_xor_si512(b, c), 12);
  a = _mm512_add_epi32(a, b);
  d = _mm512_rol_epi32(_mm512_xor_si512(d, a), 8);
  c = _mm512_add_epi32(c, d);
  b = _mm512_rol_epi32(_mm512_xor_si512(b, c), 7);
}

// Words 4 i to 4 i + 3 of all blocks: x[j] becomes four 128-bit pieces, those of blocks j, 4 + j, 8 + j and 12 + j.
PRIVTUNER_INLINE void transpose_quarters(__m512i x[4]) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm512_unpacklo_epi64(a, c);
  x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d);
  x[3] = _mm512_unpackhi_epi64(b, d);
}

}  // namespace

void chacha20_avx512(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::uint32_t counter = state[12]; batches != 0; --batches, counter += 16, out += 16 * 64) {
    const __m512i counters = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(counter)), lanes);
    __m512i x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm512_set1_epi32(static_cast<int>(state[i]));
    x[12] = counters;
    for (int round = 0; round < 20; round += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      x[i] = _mm512_add_epi32(x[i], i == 12 ? counters : _mm512_set1_epi32(static_cast<int>(state[i])));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transpose_quarters(x + 4 * i);
    // x[4 i + j] now holds piece i of blocks j, 4 + j, 8 + j, 12 + j: gather the four pieces of a block.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i a = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x44), b = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xee);
      const __m512i c = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xee);
      _mm512_storeu_si512(out + 64 * j, _mm512_shuffle_i32x4(a, c, 0x88));
      _mm512_storeu_si512(out + 64 * (4 + j), _mm512_shuffle_i32x4(a, c, 0xdd));
      _mm512_storeu_si512(out + 64 * (8 + j), _mm512_shuffle_i32x4(b, d, 0x88));
      _mm512_storeu_si512(out + 64 * (12 + j), _mm512_shuffle_i32x4(b, d, 0xdd));
    }
  }
}

}  // namespace privtuner::ring::kernels
