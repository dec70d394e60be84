// Byte digits with AVX-512: the layout of packed residues and the recombination that the VNNI and AMX kernels share.
// Internal linkage throughout: included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

template <class Word>
constexpr int kByteDigits = sizeof(Word) == 4 ? 4 : 7;

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
inline void pack_four_depths(const std::uint32_t* c, std::size_t stride, std::size_t rows, std::size_t columns,
                             std::uint8_t* out, std::size_t digit_step) {
  const auto present = static_cast<__mmask16>((1u << columns) - 1);
  __m512i words[4], digits[4];
  for (std::size_t i = 0; i < 4; ++i) {
    words[i] = i < rows ? _mm512_maskz_loadu_epi32(present, c + i * stride) : _mm512_setzero_si512();
  }
  interleave_bytes(words, digits);
  for (std::size_t d = 0; d < 4; ++d) _mm512_store_si512(out + d * digit_step, digits[d]);
}

inline void pack_four_depths(const std::uint64_t* c, std::size_t stride, std::size_t rows, std::size_t columns,
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
    high[i] = join(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  }
  interleave_bytes(low, digits);
  interleave_bytes(high, digits + 4);
  for (std::size_t d = 0; d < 7; ++d) _mm512_store_si512(out + d * digit_step, digits[d]);
}

// (s0 + 2^8 s1 + 2^16 s2 + 2^24 s3) mod q for 8 columns of int64 sums; |v| < 2^56, q < 2^32.
inline __m512i recombine_8(__m512i v, __m512i q, __m512d inverse) {
  // The rounded quotient is within 1/2 + 2^-20 of v / q, so the rest is within [-q/2 - 1, q/2 + 1]: one correction.
  const __m512i quotient = _mm512_cvtpd_epi64(_mm512_mul_pd(_mm512_cvtepi64_pd(v), inverse));
  const __m512i rest = _mm512_sub_epi64(v, _mm512_mullo_epi64(quotient, q));
  return _mm512_mask_add_epi64(rest, _mm512_movepi64_mask(rest), rest, q);
}

// One row of 16 columns: sums[digit * step + column] -> out[column].
inline void recombine_row(const std::int32_t* sums, std::size_t step, const Reducer& reducer, std::uint32_t* out) {
  const __m512i q = _mm512_set1_epi64(static_cast<long long>(reducer.modulus.q));
  const __m512d inverse = _mm512_set1_pd(reducer.inverse);
  __m256i halves[2];
  for (int half = 0; half < 2; ++half) {
    const auto digit = [&](std::size_t d) {
      return _mm512_cvtepi32_epi64(
          _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + d * step + static_cast<std::size_t>(half) * 8)));
    };
    const __m512i low = _mm512_add_epi64(digit(0), _mm512_slli_epi64(digit(1), 8));
    const __m512i high = _mm512_add_epi64(digit(2), _mm512_slli_epi64(digit(3), 8));
    halves[half] = _mm512_cvtepi64_epi32(recombine_8(_mm512_add_epi64(low, _mm512_slli_epi64(high, 16)), q, inverse));
  }
  _mm512_storeu_si512(out, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
}

// One row of a tile from its digit sums; high is null for one-byte weights.
template <class Word>
void finish_row(const std::int32_t* low, const std::int32_t* high, std::size_t step, const Reducer& reducer,
                Word* out) {
  if constexpr (sizeof(Word) == 8) {
    recombine_bytes(low, high, step, reducer, out);
  } else if (high == nullptr) {
    recombine_row(low, step, reducer, out);
  } else {
    std::uint32_t top[kTileColumns];
    recombine_row(low, step, reducer, out);
    recombine_row(high, step, reducer, top);
    const math::Modulus& q = reducer.modulus;
    for (std::size_t c = 0; c < kTileColumns; ++c) {
      out[c] = static_cast<std::uint32_t>((out[c] + (std::uint64_t{top[c]} << 8)) % q.q);
    }
  }
}

}  // namespace
}  // namespace privtuner::gemm
