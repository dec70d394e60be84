// AVX2: digits of 11 to 15 bits, products and pair sums by vpmaddwd. Only intrinsics and internal linkage in this file:
// an inline function shared with others could be linked into code that runs on older processors.
#include <immintrin.h>

#include <cstring>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kRows = 4;
constexpr std::size_t kUnit = 4;
// Longest depth of digits of Width bits: 128 * (2^Width - 1) * 2^(24 - Width) < 2^31. Wide digits are fewer, and a
// depth beyond theirs is summed in parts.
template <int Width>
constexpr std::size_t kMaxSum = std::size_t{1} << (24 - Width);

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

// Block: [depth pair][half][digit][8 columns] pairs of 16-bit digits: what a pass reads lies together.
template <class Word, int Digits, int Width>
void pack_blocks(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* blocks,
                 std::size_t block_bytes) {
  for (std::size_t j = 0; j < columns; j += kTileColumns, blocks += block_bytes) {
    auto* const out = reinterpret_cast<std::uint32_t*>(blocks);
    const std::size_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
    for (std::size_t k = 0; k < (depth + kUnit - 1) / kUnit * kUnit; k += 2) {
      Word rows[2][kTileColumns] = {};
      for (std::size_t i = 0; i < 2 && k + i < depth; ++i) {
        const Word* from = c + (k + i) * stride + j;
        if (width == kTileColumns) {  // moves of known length
          std::memcpy(rows[i], from, sizeof(rows[i]));
        } else {
          std::memcpy(rows[i], from, width * sizeof(Word));
        }
      }
      std::uint32_t* const pair = out + k / 2 * (Digits * 16);
      for (std::size_t d = 0; d < Digits; ++d) {
        for (std::size_t x = 0; x < kTileColumns; ++x) {
          constexpr std::uint32_t kMask = (1u << Width) - 1;
          const auto first = static_cast<std::uint32_t>(rows[0][x] >> (Width * d)) & kMask;
          const auto second = static_cast<std::uint32_t>(rows[1][x] >> (Width * d)) & kMask;
          pair[x / 8 * (Digits * 8) + d * 8 + x % 8] = first | second << 16;
        }
      }
    }
  }
}

// sums[digit][row][8 of 16 columns] for Count of the Digits digits, over `pairs` depth pairs, for one weight byte.
template <int Digits, int Count, int Bytes>
void accumulate(const std::int32_t* panel, const std::uint8_t* block, std::size_t pairs, std::int32_t* sums) {
  __m256i acc[Count][kRows];
#pragma GCC unroll 3
  for (int d = 0; d < Count; ++d) {
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r) acc[d][r] = _mm256_setzero_si256();
  }
  // Not unrolled: gcc would then regroup the sums and spill them.
#pragma GCC unroll 1
  for (std::size_t p = 0; p < pairs; ++p) {
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r) {
      const __m256i w = _mm256_set1_epi32(panel[r]);
#pragma GCC unroll 3
      for (int d = 0; d < Count; ++d) {
        const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(block + d * 32));
        acc[d][r] = _mm256_add_epi32(acc[d][r], _mm256_madd_epi16(x, w));
      }
    }
    panel += kRows * Bytes;
    block += Digits * 64;
  }
#pragma GCC unroll 3
  for (int d = 0; d < Count; ++d) {
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + (static_cast<std::size_t>(d) * kRows + r) * kTileColumns),
                         acc[d][r]);
    }
  }
}

// Digits first, first + 1, ... in passes of at most three: 12 of the 16 registers hold sums.
template <int Digits, int Bytes, int First = 0>
void accumulate_all(const std::int32_t* panel, const std::uint8_t* block, std::size_t pairs, std::int32_t* sums) {
  constexpr int kLeft = Digits - First, kCount = kLeft == 4 ? 2 : (kLeft < 3 ? kLeft : 3);
  accumulate<Digits, kCount, Bytes>(panel, block + First * 32, pairs, sums + First * kRows * kTileColumns);
  if constexpr (kLeft > kCount) accumulate_all<Digits, Bytes, First + kCount>(panel, block, pairs, sums);
}

// V = sum_d 2^(Width d) * (low[d][c] + 2^8 high[d][c]) modulo q, in [0, q), for 4 columns; high is ignored for one-byte
// weights.
//
// V = sum w x over at most 2^13 depths with |w| < 2^15 and 0 <= x < q < 2^60: |V| < 2^28 q, and so is each of its at
// most eight terms in the double estimate. Less than 16 roundings of sums below 2^31 q put the estimate of V / q off by
// less than 2^-18, and the rest, exact in words that wrap, is within (1/2 + 2^-18) q of zero: one correction.
template <int Digits, int Width, int Bytes>
__m256i recombine_4(const std::int32_t* low, const std::int32_t* high, const Reducer& reducer) {
  constexpr std::size_t kStep = kRows * kTileColumns;
  __m256i v = _mm256_setzero_si256();
  __m256d estimate = _mm256_setzero_pd();
  for (std::size_t d = Digits; d-- > 0;) {
    const __m128i sums = _mm_load_si128(reinterpret_cast<const __m128i*>(low + d * kStep));
    __m256i wide = _mm256_cvtepi32_epi64(sums);
    __m256d real = _mm256_cvtepi32_pd(sums);
    if constexpr (Bytes == 2) {
      const __m128i tops = _mm_load_si128(reinterpret_cast<const __m128i*>(high + d * kStep));
      wide = _mm256_add_epi64(wide, _mm256_slli_epi64(_mm256_cvtepi32_epi64(tops), 8));
      real = _mm256_add_pd(real, _mm256_mul_pd(_mm256_cvtepi32_pd(tops), _mm256_set1_pd(256.0)));
    }
    v = _mm256_add_epi64(_mm256_slli_epi64(v, Width), wide);
    estimate = _mm256_add_pd(_mm256_mul_pd(estimate, _mm256_set1_pd(1 << Width)), real);
  }
  const __m256i quotient =
      _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(_mm256_mul_pd(estimate, _mm256_set1_pd(reducer.inverse))));
  // Signed 32-bit multiplications by the 30-bit halves of q.
  const auto times = [quotient](std::uint64_t half) {
    return _mm256_mul_epi32(quotient, _mm256_set1_epi64x(static_cast<long long>(half)));
  };
  const __m256i product =
      _mm256_add_epi64(times(reducer.q & 0x3fffffff), _mm256_slli_epi64(times(reducer.q >> 30), 30));
  const __m256i rest = _mm256_sub_epi64(v, product);
  const __m256i negative = _mm256_cmpgt_epi64(_mm256_setzero_si256(), rest);
  return _mm256_add_epi64(rest, _mm256_and_si256(negative, _mm256_set1_epi64x(static_cast<long long>(reducer.q))));
}

template <class Word, int Digits, int Width, int Bytes>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* out, std::size_t stride) {
  alignas(64) std::int32_t sums[Bytes][Digits][kRows][kTileColumns];
  const auto* weights = reinterpret_cast<const std::int32_t*>(panel);
  for (std::size_t b = 0; b < blocks; ++b) {
    const std::uint8_t* digits = block + b * block_bytes;
    for (std::size_t byte = 0; byte < Bytes; ++byte) {
      for (std::size_t half = 0; half < 2; ++half) {
        accumulate_all<Digits, Bytes>(weights + byte * kRows, digits + half * (Digits * 32), 2 * units,
                                      &sums[byte][0][0][half * 8]);
      }
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      for (std::size_t c = 0; c < kTileColumns; c += 4) {
        const __m256i words = recombine_4<Digits, Width, Bytes>(sums[0][0][r] + c, sums[Bytes - 1][0][r] + c, reducer);
        Word* to = out + r * stride + b * kTileColumns + c;
        if constexpr (sizeof(Word) == 8) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
        } else {
          const __m256i even = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(even));
        }
      }
    }
  }
}

template <class Word, int Digits, int Width, int Bytes>
constexpr Kernel<Word> kKernel = {kRows,
                                  kUnit,
                                  kMaxSum<Width>,
                                  Bytes * 16 * sizeof(std::int16_t),
                                  2 * Digits * 64,
                                  &pack_panel<Bytes>,
                                  &pack_blocks<Word, Digits, Width>,
                                  &multiply_tiles<Word, Digits, Width, Bytes>};

// The fewest digits, as narrow as they may be.
template <class Word, int Bytes>
const Kernel<Word>& kernel_of(int bits) {
  if constexpr (sizeof(Word) == 8) {
    if (bits > 52) return kKernel<Word, 4, 15, Bytes>;
    if (bits > 45) return kKernel<Word, 4, 13, Bytes>;
    if (bits > 42) return kKernel<Word, 3, 15, Bytes>;
    if (bits > 39) return kKernel<Word, 3, 14, Bytes>;
    if (bits > 33) return kKernel<Word, 3, 13, Bytes>;
  }
  return kKernel<Word, 3, 11, Bytes>;
}

}  // namespace

template <class Word>
const Kernel<Word>& kernel_avx2(int bytes_per_weight, int bits) {
  return bytes_per_weight == 1 ? kernel_of<Word, 1>(bits) : kernel_of<Word, 2>(bits);
}
template const Kernel<std::uint32_t>& kernel_avx2(int, int);
template const Kernel<std::uint64_t>& kernel_avx2(int, int);

}  // namespace privtuner::gemm
