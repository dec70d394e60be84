#include <immintrin.h>

#include "sampling_kernels.hpp"

namespace privtuner::ring::kernels {
namespace {

// The number of set bits of every byte: two halves looked up in a register, in constant time.
inline __attribute__((always_inline)) __m512i byte_counts(__m512i x) {
  const __m512i counts = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_set1_epi8(15);
  return _mm512_add_epi8(_mm512_shuffle_epi8(counts, _mm512_and_si512(x, low)),
                         _mm512_shuffle_epi8(counts, _mm512_and_si512(_mm512_srli_epi32(x, 4), low)));
}

}  // namespace

std::size_t first_rejected_avx512(std::uint32_t* words, std::size_t begin, std::size_t n, std::uint32_t mask,
                                  std::uint32_t q) {
  const __m512i masks = _mm512_set1_epi32(static_cast<int>(mask)), bound = _mm512_set1_epi32(static_cast<int>(q));
  for (std::size_t i = begin; i < n; i += 16) {
    const __mmask16 present = static_cast<__mmask16>(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
    const __m512i x = _mm512_and_si512(_mm512_maskz_loadu_epi32(present, words + i), masks);
    _mm512_mask_storeu_epi32(words + i, present, x);
    const __mmask16 rejected = _mm512_mask_cmpge_epu32_mask(present, x, bound);
    if (rejected != 0) return i + static_cast<std::size_t>(__builtin_ctz(rejected));
  }
  return n;
}

std::size_t first_rejected_avx512(std::uint64_t* words, std::size_t begin, std::size_t n, std::uint64_t mask,
                                  std::uint64_t q) {
  const __m512i masks = _mm512_set1_epi64(static_cast<long long>(mask));
  const __m512i bound = _mm512_set1_epi64(static_cast<long long>(q));
  for (std::size_t i = begin; i < n; i += 8) {
    const __mmask8 present = static_cast<__mmask8>(n - i >= 8 ? 0xff : (1 << (n - i)) - 1);
    const __m512i x = _mm512_and_si512(_mm512_maskz_loadu_epi64(present, words + i), masks);
    _mm512_mask_storeu_epi64(words + i, present, x);
    const __mmask8 rejected = _mm512_mask_cmpge_epu64_mask(present, x, bound);
    if (rejected != 0) return i + static_cast<std::size_t>(__builtin_ctz(rejected));
  }
  return n;
}

void binomial_avx512(const std::uint32_t* words, std::int8_t* out, std::size_t groups) {
  const __m512i ones = _mm512_set1_epi8(1), minus_eta = _mm512_set1_epi32(-21);
  for (; groups != 0; --groups, words += kBinomialWords, out += kBinomialGroup) {
    const __m512i shared = _mm512_loadu_si512(words + 48);
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const __m512i ten_bits = _mm512_and_si512(shared, _mm512_set1_epi32(0x3ff << (10 * part)));
      const __m512i counts = _mm512_add_epi8(byte_counts(_mm512_loadu_si512(words + 16 * part)), byte_counts(ten_bits));
      // The sum of the four bytes of each word, less 21.
      const __m512i values = _mm512_dpbusd_epi32(minus_eta, counts, ones);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * part), _mm512_cvtepi32_epi8(values));
    }
  }
}

}  // namespace privtuner::ring::kernels
