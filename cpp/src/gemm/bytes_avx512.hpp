// Byte digits with AVX-512: the layout of packed residues and the recombination that the VNNI and AMX kernels share.
// Internal linkage throughout: included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

// Byte digit d of four rows of 16 dwords, interleaved: dword c of the result holds byte d of rows 0 .. 3 at column c.
inline void interleave_bytes(const __m512i rows[4], __m512i digits[4]) {
  constexpr __mmask64 kOddBytes = 0xaaaaaaaaaaaaaaaau;
  constexpr __mmask32 kOddWords = 0xaaaaaaaau;
  __m512i even[2], odd[2];  // bytes 0 and 2, bytes 1 and 3 of a pair of rows
  for (int i = 0; i < 2; ++i) {
    even[i] = _mm512_mask_blend_epi8(kOddBytes, rows[2 * i], _mm512_slli_epi32(rows[2 * i + 1], 8));
    odd[i] = _mm512_mask_blend_epi8(kOddBytes, _mm512_srli_epi32(rows[2 * i], 8), rows[2 * i + 1]);
  }
  digits[0] = _mm512_mask_blend_epi16(kOddWords, even[0], _mm512_slli_epi32(even[1], 16));
  digits[1] = _mm512_mask_blend_epi16(kOddWords, odd[0], _mm512_slli_epi32(odd[1], 16));
  digits[2] = _mm512_mask_blend_epi16(kOddWords, _mm512_srli_epi32(even[0], 16), even[1]);
  digits[3] = _mm512_mask_blend_epi16(kOddWords, _mm512_srli_epi32(odd[0], 16), odd[1]);
}

// The byte digits of rows k .. k + 3 (`rows` of them exist) for 16 columns (`columns` of them exist, the others are
// zero). Digit d goes to out + d * digit_step, one dword a column.
template <int Digits>
void pack_four_depths(const std::uint32_t* c, std::size_t stride, std::size_t rows, std::size_t columns,
                      std::uint8_t* out, std::size_t digit_step) {
  const auto present = static_cast<__mmask16>((1u << columns) - 1);
  __m512i words[4], digits[4];
  for (std::size_t i = 0; i < 4; ++i) {
    words[i] = i < rows ? _mm512_maskz_loadu_epi32(present, c + i * stride) : _mm512_setzero_si512();
  }
  interleave_bytes(words, digits);
  for (std::size_t d = 0; d < Digits; ++d) _mm512_store_si512(out + d * digit_step, digits[d]);
}

template <int Digits>
void pack_four_depths(const std::uint64_t* c, std::size_t stride, std::size_t rows, std::size_t columns,
                      std::uint8_t* out, std::size_t digit_step) {
  const auto first = static_cast<__mmask8>(columns >= 8 ? 0xff : (1u << columns) - 1);
  const auto second = static_cast<__mmask8>(columns <= 8 ? 0 : (1u << (columns - 8)) - 1);
  __m512i low[4], high[4], digits[8];
  for (std::size_t i = 0; i < 4; ++i) {
    low[i] = high[i] = _mm512_setzero_si512();
    if (i >= rows) continue;
    const __m512i a = _mm512_maskz_loadu_epi64(first, c + i * stride);
    // No pointer past the end of c is formed for absent columns.
    const __m512i b = second == 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi64(second, c + i * stride + 8);
    const auto join = [](__m512i x, __m512i y) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(x)), _mm512_cvtepi64_epi32(y), 1);
    };
    low[i] = join(a, b);
    if (Digits > 4) high[i] = join(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  }
  interleave_bytes(low, digits);
  if (Digits > 4) interleave_bytes(high, digits + 4);
  for (std::size_t d = 0; d < Digits; ++d) _mm512_store_si512(out + d * digit_step, digits[d]);
}

// V = sum_d 2^(8 d) * (low[d][c] + 2^8 high[d][c]) modulo q for 8 columns, in [0, q); rows of `low` and `high` are
// `step` ints apart.
//
// V = sum w x over at most 2^16 depths, w = l + 2^8 h with |w| < 2^15 and |l|, |h| <= 2^7, 0 <= x < q < 2^60. So
// |V| < 2^31 q. In V = bottom + 2^32 top, bottom = sum (l (x mod 2^32) + 2^8 h (x mod 2^24)): |bottom| <= 2^56, and
// |bottom| < 2^32 q; so |top| < 2^59 + 2^24, a signed word, and 2^32 |top| < 2^33 q. top, bottom, the sum, q, 1 / q and
// the product are rounded by 2^-53 of themselves at most, less than 2^-20 + 2^-21 + 4 * 2^-22 in V / q. So the estimate
// is off by less than 2^-18 and the rest, exact in words that wrap, is within (1/2 + 2^-18) q of zero: one correction.
template <int Digits, int Bytes>
__m512i recombine_8(const std::int32_t* low, const std::int32_t* high, std::size_t step, __m512i q, __m512d inverse) {
  constexpr int kSums = Digits + Bytes - 1;
  const auto load = [step](const std::int32_t* sums, int d) {
    return _mm512_cvtepi32_epi64(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + static_cast<std::size_t>(d) * step)));
  };
  // Horner over the sums of weight 2^(8 i), first <= i < last.
  const auto join = [&](int first, int last) {
    __m512i v = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = last - 1; i >= first; --i) {
      v = _mm512_slli_epi64(v, 8);
      if (i < Digits) v = _mm512_add_epi64(v, load(low, i));
      if (Bytes == 2 && i > 0) v = _mm512_add_epi64(v, load(high, i - 1));
    }
    return v;
  };
  __m512i v;
  __m512d estimate;
  if constexpr (Digits + Bytes <= 6) {  // |V| < 2^(8 Bytes - 1 + 16 + 8 Digits) <= 2^63
    v = join(0, kSums);
    estimate = _mm512_cvtepi64_pd(v);
  } else {
    const __m512i bottom = join(0, 4), top = join(4, kSums);
    v = _mm512_add_epi64(bottom, _mm512_slli_epi64(top, 32));
    estimate = _mm512_fmadd_pd(_mm512_cvtepi64_pd(top), _mm512_set1_pd(4294967296.0), _mm512_cvtepi64_pd(bottom));
  }
  const __m512i quotient = _mm512_cvtpd_epi64(_mm512_mul_pd(estimate, inverse));
  const __m512i rest = _mm512_sub_epi64(v, _mm512_mullo_epi64(quotient, q));
  return _mm512_mask_add_epi64(rest, _mm512_movepi64_mask(rest), rest, q);
}

// One row of a tile, 16 columns, from its digit sums; high is ignored for one-byte weights.
template <int Digits, int Bytes, class Word>
void finish_row(const std::int32_t* low, const std::int32_t* high, std::size_t step, const Reducer& reducer,
                Word* out) {
  const __m512i q = _mm512_set1_epi64(static_cast<long long>(reducer.q));
  const __m512d inverse = _mm512_set1_pd(reducer.inverse);
  const __m512i first = recombine_8<Digits, Bytes>(low, high, step, q, inverse);
  const __m512i second = recombine_8<Digits, Bytes>(low + 8, Bytes == 2 ? high + 8 : nullptr, step, q, inverse);
  if constexpr (sizeof(Word) == 8) {
    _mm512_storeu_si512(out, first);
    _mm512_storeu_si512(out + 8, second);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(first));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm512_cvtepi64_epi32(second));
  }
}

// The Path<Word, Digits, Bytes>::kKernel for residues below 2^bits.
template <template <class, int, int> class Path, class Word, int Bytes>
const Kernel<Word>& kernel_of(int bits) {
  if constexpr (sizeof(Word) == 8) {
    if (bits > 56) return Path<Word, 8, Bytes>::kKernel;
    if (bits > 48) return Path<Word, 7, Bytes>::kKernel;
    if (bits > 40) return Path<Word, 6, Bytes>::kKernel;
    if (bits > 32) return Path<Word, 5, Bytes>::kKernel;
  }
  return Path<Word, 4, Bytes>::kKernel;
}

template <template <class, int, int> class Path, class Word>
const Kernel<Word>& kernel_of(int bytes_per_weight, int bits) {
  return bytes_per_weight == 1 ? kernel_of<Path, Word, 1>(bits) : kernel_of<Path, Word, 2>(bits);
}

}  // namespace
}  // namespace privtuner::gemm
