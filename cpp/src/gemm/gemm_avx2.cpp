// AVX2: digits of 11 bits, products and pair sums by vpmaddwd. Only intrinsics and internal linkage in this file: an
// inline function shared with others could be linked into code that runs on older processors.
#include <immintrin.h>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kRows = 4;
constexpr std::size_t kUnit = 4;
constexpr std::size_t kMaxSum = 8192;  // 128 * 2047 * 8192 < 2^31
constexpr int kDigitBits = 11;

template <class Word>
constexpr int kDigits = sizeof(Word) == 4 ? 3 : 5;  // 33 and 55 bits

// Panel: [depth pair][byte][row] pairs of 16-bit weights.
template <int Bytes>
void pack_panel(const PanelSource& source, std::size_t row, std::uint8_t* panel) {
  auto* out = reinterpret_cast<std::int16_t*>(panel);
  for (std::size_t j = 0; j < (source.depth + kUnit - 1) / kUnit; ++j) {
    std::int8_t blocks[Bytes][16];
    for (int byte = 0; byte < Bytes; ++byte) load_block(source, byte, row / 4, j, blocks[byte]);
    for (int pair = 0; pair < 2; ++pair) {
      for (const auto& block : blocks) {
        for (int r = 0; r < 4; ++r) {
          *out++ = block[4 * r + 2 * pair];
          *out++ = block[4 * r + 2 * pair + 1];
        }
      }
    }
  }
}

// Block: [depth pair][digit][16 columns] pairs of 16-bit digits.
template <class Word>
void pack_block(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* block) {
  auto* out = reinterpret_cast<std::uint32_t*>(block);
  for (std::size_t k = 0; k < (depth + kUnit - 1) / kUnit * kUnit; k += 2) {
    Word rows[2][kTileColumns] = {};
    for (std::size_t i = 0; i < 2 && k + i < depth; ++i) {
      for (std::size_t j = 0; j < columns; ++j) rows[i][j] = c[(k + i) * stride + j];
    }
    for (int d = 0; d < kDigits<Word>; ++d) {
      for (std::size_t j = 0; j < kTileColumns; ++j) {
        const auto first = static_cast<std::uint32_t>(rows[0][j] >> (kDigitBits * d)) & 0x7ff;
        const auto second = static_cast<std::uint32_t>(rows[1][j] >> (kDigitBits * d)) & 0x7ff;
        *out++ = first | second << 16;
      }
    }
  }
}

// sums[digit][row][8 of 16 columns] over `pairs` depth pairs, for Rows rows and one weight byte.
template <int Digits, int Rows, int Bytes>
void accumulate(const std::int32_t* panel, const std::uint8_t* block, std::size_t pairs, std::int32_t* sums) {
  __m256i acc[Digits][Rows];
  for (int d = 0; d < Digits; ++d) {
    for (int r = 0; r < Rows; ++r) acc[d][r] = _mm256_setzero_si256();
  }
  // Not unrolled: gcc would then regroup the sums and spill them.
#pragma GCC unroll 1
  for (std::size_t p = 0; p < pairs; ++p) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m256i w = _mm256_set1_epi32(panel[r]);
#pragma GCC unroll 5
      for (int d = 0; d < Digits; ++d) {
        const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(block + d * 64));
        acc[d][r] = _mm256_add_epi32(acc[d][r], _mm256_madd_epi16(x, w));
      }
    }
    panel += 4 * Bytes;
    block += Digits * 64;
  }
  for (int d = 0; d < Digits; ++d) {
    for (int r = 0; r < Rows; ++r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + (d * 4 + r) * 16), acc[d][r]);
    }
  }
}

// One row of 16 sums of 3 digits modulo q < 2^32, in doubles: |a0 + 2^11 a1 + 2^22 a2| < 2^53 since the top digit has
// 10 bits, and quotient * q is that small too, so every step but the quotient is exact.
void recombine_row(const std::int32_t* sums, double q, double inverse, std::uint32_t* out) {
  const __m256d modulus = _mm256_set1_pd(q), inv = _mm256_set1_pd(inverse);
  for (int c = 0; c < 16; c += 4) {
    const auto digit = [&](int d) {
      return _mm256_cvtepi32_pd(_mm_load_si128(reinterpret_cast<const __m128i*>(sums + d * 64 + c)));
    };
    const __m256d v = _mm256_add_pd(digit(0), _mm256_add_pd(_mm256_mul_pd(digit(1), _mm256_set1_pd(2048.0)),
                                                            _mm256_mul_pd(digit(2), _mm256_set1_pd(4194304.0))));
    const __m256d quotient = _mm256_round_pd(_mm256_mul_pd(v, inv), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256d rest = _mm256_sub_pd(v, _mm256_mul_pd(quotient, modulus));  // [-q/2 - 1, q/2 + 1]
    rest = _mm256_add_pd(rest, _mm256_and_pd(_mm256_cmp_pd(rest, _mm256_setzero_pd(), _CMP_LT_OQ), modulus));
    const __m128i shifted = _mm256_cvtpd_epi32(_mm256_sub_pd(rest, _mm256_set1_pd(2147483648.0)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c),
                     _mm_xor_si128(shifted, _mm_set1_epi32(static_cast<int>(0x80000000u))));
  }
}

template <class Word, int Bytes>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* tiles) {
  constexpr int kD = kDigits<Word>;
  constexpr int kRowsAtOnce = kD == 3 ? 4 : 2;  // 12 or 10 of the 16 registers hold sums
  alignas(64) std::int32_t sums[Bytes][kD][kRows][kTileColumns];
  const auto* weights = reinterpret_cast<const std::int32_t*>(panel);
  for (std::size_t b = 0; b < blocks; ++b) {
    const std::uint8_t* digits = block + b * block_bytes;
    for (int byte = 0; byte < Bytes; ++byte) {
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; r += kRowsAtOnce) {
          accumulate<kD, kRowsAtOnce, Bytes>(weights + byte * 4 + r, digits + half * 32, 2 * units,
                                             &sums[byte][0][r][half * 8]);
        }
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      Word* out = tiles + (b * kRows + r) * kTileColumns;
      if constexpr (sizeof(Word) == 4 && Bytes == 1) {
        recombine_row(sums[0][0][r], static_cast<double>(reducer.modulus.q), reducer.inverse, out);
      } else {
        std::uint64_t words[kTileColumns];
        recombine_11(sums[0][0][r], Bytes == 2 ? sums[Bytes - 1][0][r] : nullptr, kRows * kTileColumns, kD, reducer,
                     words);
        for (std::size_t c = 0; c < kTileColumns; ++c) out[c] = static_cast<Word>(words[c]);
      }
    }
  }
}

template <class Word, int Bytes>
constexpr Kernel<Word> kKernel = {kRows,
                                  kUnit,
                                  kMaxSum,
                                  Bytes * 16 * sizeof(std::int16_t),
                                  2 * kDigits<Word> * 64,
                                  &pack_panel<Bytes>,
                                  &pack_block<Word>,
                                  &multiply_tiles<Word, Bytes>};

}  // namespace

template <class Word>
const Kernel<Word>& avx2_kernel(int bytes_per_weight) {
  return bytes_per_weight == 1 ? kKernel<Word, 1> : kKernel<Word, 2>;
}
template const Kernel<std::uint32_t>& avx2_kernel(int);
template const Kernel<std::uint64_t>& avx2_kernel(int);

}  // namespace privtuner::gemm
