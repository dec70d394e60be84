// AVX-512 VNNI: byte digits, four products and their sum a lane by vpdpbusd.
#include "bytes_avx512.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kRows = 8;
constexpr std::size_t kUnit = 4;

// Panel: [unit][byte][row] dwords of four weights.
template <int Bytes>
void pack_panel(const PanelSource& source, std::size_t row, std::uint8_t* panel) {
  for (std::size_t j = 0; j < (source.depth + kUnit - 1) / kUnit; ++j) {
    for (int byte = 0; byte < Bytes; ++byte) {
      for (std::size_t i = 0; i < kRows / 4; ++i) {
        load_block(source, byte, row / 4 + i, j, reinterpret_cast<std::int8_t*>(panel));
        panel += 16;
      }
    }
  }
}

// Block: [unit][digit][16 columns] dwords of four digits.
template <class Word, int Digits>
void pack_blocks(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* blocks,
                 std::size_t block_bytes) {
  for (std::size_t k = 0; k < depth; k += kUnit) {
    const std::size_t rows = depth - k < kUnit ? depth - k : kUnit;
    std::uint8_t* out = blocks + k / kUnit * (Digits * 64);
    for (std::size_t j = 0; j < columns; j += kTileColumns, out += block_bytes) {
      const std::size_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
      pack_four_depths<Digits>(c + k * stride + j, stride, rows, width, out, 64);
    }
  }
}

// sums[digit][row][16 columns] for Count of the Digits digits, over `units`, for one weight byte.
template <int Digits, int Count, int Bytes>
void accumulate(const std::uint8_t* panel, const std::uint8_t* block, std::size_t units, std::int32_t* sums) {
  __m512i acc[Count][kRows];
#pragma GCC unroll 3
  for (int d = 0; d < Count; ++d) {
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) acc[d][r] = _mm512_setzero_si512();
  }
  for (std::size_t u = 0; u < units; ++u) {
    const auto* weights = reinterpret_cast<const std::int32_t*>(panel + u * kRows * 4 * Bytes);
    const std::uint8_t* digits = block + u * (Digits * 64);
    __m512i x[Count];
#pragma GCC unroll 3
    for (int d = 0; d < Count; ++d) x[d] = _mm512_load_si512(digits + d * 64);
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) {
      const __m512i w = _mm512_set1_epi32(weights[r]);
#pragma GCC unroll 3
      for (int d = 0; d < Count; ++d) acc[d][r] = _mm512_dpbusd_epi32(acc[d][r], x[d], w);
    }
  }
#pragma GCC unroll 3
  for (int d = 0; d < Count; ++d) {
#pragma GCC unroll 8
    for (std::size_t r = 0; r < kRows; ++r) {
      _mm512_store_si512(sums + (static_cast<std::size_t>(d) * kRows + r) * kTileColumns, acc[d][r]);
    }
  }
}

// Digits first, first + 1, ... in passes of at most three: 24 registers of sums.
template <int Digits, int Bytes, int First = 0>
void accumulate_all(const std::uint8_t* panel, const std::uint8_t* block, std::size_t units, std::int32_t* sums) {
  constexpr int kLeft = Digits - First, kCount = kLeft == 4 ? 2 : (kLeft < 3 ? kLeft : 3);
  accumulate<Digits, kCount, Bytes>(panel, block + First * 64, units, sums + First * kRows * kTileColumns);
  if constexpr (kLeft > kCount) accumulate_all<Digits, Bytes, First + kCount>(panel, block, units, sums);
}

template <class Word, int Digits, int Bytes>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* out, std::size_t stride) {
  alignas(64) std::int32_t sums[Bytes][Digits][kRows][kTileColumns];
  for (std::size_t b = 0; b < blocks; ++b) {
    // The rows of the result are far apart and often in memory: ask for their lines a whole product ahead.
    for (std::size_t r = 0; r < kRows; ++r) {
      const char* row = reinterpret_cast<const char*>(out + r * stride + b * kTileColumns);
      for (std::size_t line = 0; line < kTileColumns * sizeof(Word); line += 64) _mm_prefetch(row + line, _MM_HINT_T0);
    }
    for (std::size_t byte = 0; byte < Bytes; ++byte) {
      accumulate_all<Digits, Bytes>(panel + byte * kRows * 4, block + b * block_bytes, units, &sums[byte][0][0][0]);
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      finish_row<Digits, Bytes>(sums[0][0][r], sums[Bytes - 1][0][r], kRows * kTileColumns, reducer,
                                out + r * stride + b * kTileColumns);
    }
  }
}

template <class Word, int Digits, int Bytes>
struct Path {
  static constexpr Kernel<Word> kKernel = {kRows,
                                           kUnit,
                                           kMaxDepth,
                                           Bytes * kRows * 4,
                                           Digits * 64,
                                           &pack_panel<Bytes>,
                                           &pack_blocks<Word, Digits>,
                                           &multiply_tiles<Word, Digits, Bytes>};
};

}  // namespace

template <class Word>
const Kernel<Word>& kernel_avx512(int bytes_per_weight, int bits) {
  return kernel_of<Path, Word>(bytes_per_weight, bits);
}
template const Kernel<std::uint32_t>& kernel_avx512(int, int);
template const Kernel<std::uint64_t>& kernel_avx512(int, int);

}  // namespace privtuner::gemm
