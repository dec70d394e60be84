// Byte digits with AVX-512: the layout of packed residues and the recombination that the VNNI and AMX kernels share.
// Internal linkage throughout: included only by files compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

template <class Word>
constexpr int kByteDigits = sizeof(Word) == 4 ? 4 : 7;

// Four depths of one byte digit for 16 columns: dword c holds the digit of rows k .. k + 3 at column c. Writes dword
// rows `digit_step` bytes apart, one a digit.
template <class Word>
void pack_four_depths(const Word* c, std::size_t stride, std::size_t rows, std::size_t columns, std::uint8_t* out,
                      std::size_t digit_step) {
  alignas(64) Word words[4][kTileColumns] = {};
  for (std::size_t i = 0; i < rows; ++i) {
    for (std::size_t j = 0; j < columns; ++j) words[i][j] = c[i * stride + j];
  }
  for (int d = 0; d < kByteDigits<Word>; ++d) {
    auto* digits = reinterpret_cast<std::uint32_t*>(out + static_cast<std::size_t>(d) * digit_step);
    for (std::size_t j = 0; j < kTileColumns; ++j) {
      const auto byte = [&](int i) { return static_cast<std::uint32_t>(words[i][j] >> (8 * d)) & 0xff; };
      digits[j] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
    }
  }
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
    halves[half] =
        _mm512_cvtepi64_epi32(recombine_8(_mm512_add_epi64(low, _mm512_slli_epi64(high, 16)), q, inverse));
  }
  _mm512_storeu_si512(out, _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1));
}

// One row of a tile from its digit sums; high is null for one-byte weights.
template <class Word>
void finish_row(const std::int32_t* low, const std::int32_t* high, std::size_t step, const Reducer& reducer, Word* out) {
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
