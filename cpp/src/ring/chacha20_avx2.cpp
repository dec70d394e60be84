// Eight blocks side by side: register i holds word i of each (RFC 8439, section 2.3, on every lane).
#include <immintrin.h>

#include "chacha20_kernels.hpp"

#define PRIVTUNER_INLINE inline __attribute__((always_inline))

namespace privtuner::ring::kernels {
namespace {

template <int bits>
PRIVTUNER_INLINE __m256i rotate_left(__m256i x) {
  if constexpr (bits == 16 || bits == 8) {  // whole bytes: one permutation
    const __m256i bytes = bits == 16 ? _mm256_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13, 2, 3, 0,
                                                        1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                                     : _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14, 3, 0, 1,
                                                        2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    return _mm256_shuffle_epi8(x, bytes);
  }
  return _mm256_or_si256(_mm256_slli_epi32(x, bits), _mm256_srli_epi32(x, 32 - bits));
}

PRIVTUNER_INLINE void quarter_round(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
  a = _mm256_add_epi32(a, b);
  d = rotate_left<16>(_mm256_xor_si256(d, a));
  c = _mm256_add_epi32(c, d);
  b = rotate_left<12>(_mm256_xor_si256(b, c));
  a = _mm256_add_epi32(a, b);
  d = rotate_left<8>(_mm256_xor_si256(d, a));
  c = _mm256_add_epi32(c, d);
  b = rotate_left<7>(_mm256_xor_si256(b, c));
}

// Words 4 i to 4 i + 3 of all blocks: x[j] becomes two 128-bit pieces, those of blocks j and 4 + j.
PRIVTUNER_INLINE void transpose_quarters(__m256i x[4]) {
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  x[0] = _mm256_unpacklo_epi64(a, c);
  x[1] = _mm256_unpackhi_epi64(a, c);
  x[2] = _mm256_unpacklo_epi64(b, d);
  x[3] = _mm256_unpackhi_epi64(b, d);
}

PRIVTUNER_INLINE void store(std::uint8_t* out, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), x); }

}  // namespace

void chacha20_avx2(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (std::uint32_t counter = state[12]; batches != 0; --batches, counter += 8, out += 8 * 64) {
    const __m256i counters = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(counter)), lanes);
    __m256i x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = _mm256_set1_epi32(static_cast<int>(state[i]));
    x[12] = counters;
    for (int round = 0; round < 20; round += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      x[i] = _mm256_add_epi32(x[i], i == 12 ? counters : _mm256_set1_epi32(static_cast<int>(state[i])));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) transpose_quarters(x + 4 * i);
    // x[4 i + j] now holds piece i of blocks j and 4 + j: gather the four pieces of a block.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      store(out + 64 * j, _mm256_permute2x128_si256(x[j], x[4 + j], 0x20));
      store(out + 64 * j + 32, _mm256_permute2x128_si256(x[8 + j], x[12 + j], 0x20));
      store(out + 64 * (4 + j), _mm256_permute2x128_si256(x[j], x[4 + j], 0x31));
      store(out + 64 * (4 + j) + 32, _mm256_permute2x128_si256(x[8 + j], x[12 + j], 0x31));
    }
  }
}

}  // namespace privtuner::ring::kernels
