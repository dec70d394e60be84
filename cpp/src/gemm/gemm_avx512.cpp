// AVX-512 VNNI: byte digits, four products and their sum a lane by vpdpbusd.
#include "bytes_avx512.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kRows = 4;
constexpr std::size_t kUnit = 4;

// Panel: [unit][byte][row] dwords of four weights.
template <int Bytes>
void pack_panel(const PanelSource& source, std::size_t row, std::uint8_t* panel) {
  for (std::size_t j = 0; j < (source.depth + kUnit - 1) / kUnit; ++j) {
    for (int byte = 0; byte < Bytes; ++byte) {
      load_block(source, byte, row / 4, j, reinterpret_cast<std::int8_t*>(panel));
      panel += 16;
    }
  }
}

// Block: [unit][digit][16 columns] dwords of four digits.
template <class Word>
void pack_block(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* block) {
  for (std::size_t k = 0; k < depth; k += kUnit) {
    pack_four_depths(c + k * stride, stride, depth - k < kUnit ? depth - k : kUnit, columns, block, 64);
    block += static_cast<std::size_t>(kByteDigits<Word>) * 64;
  }
}

// sums[digit][row][16 columns] over `units`, for one weight byte.
template <int Digits, int Bytes>
void accumulate(const std::uint8_t* panel, const std::uint8_t* block, std::size_t units, std::int32_t* sums) {
  __m512i acc[Digits][4];
  for (int d = 0; d < Digits; ++d) {
    for (int r = 0; r < 4; ++r) acc[d][r] = _mm512_setzero_si512();
  }
  for (std::size_t u = 0; u < units; ++u) {
    const auto* weights = reinterpret_cast<const std::int32_t*>(panel + u * 16 * Bytes);
    const std::uint8_t* digits = block + u * static_cast<std::size_t>(Digits) * 64;
#pragma GCC unroll 7
    for (int d = 0; d < Digits; ++d) {
      const __m512i x = _mm512_load_si512(digits + d * 64);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[d][r] = _mm512_dpbusd_epi32(acc[d][r], x, _mm512_set1_epi32(weights[r]));
    }
  }
  for (int d = 0; d < Digits; ++d) {
    for (int r = 0; r < 4; ++r) _mm512_store_si512(sums + (d * 4 + r) * 16, acc[d][r]);
  }
}

template <class Word, int Bytes>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* tiles) {
  constexpr int kD = kByteDigits<Word>;
  alignas(64) std::int32_t sums[Bytes][kD][kRows][kTileColumns];
  for (std::size_t b = 0; b < blocks; ++b) {
    for (int byte = 0; byte < Bytes; ++byte) {
      accumulate<kD, Bytes>(panel + byte * 16, block + b * block_bytes, units, &sums[byte][0][0][0]);
    }
    for (std::size_t r = 0; r < kRows; ++r) {
      finish_row(sums[0][0][r], Bytes == 2 ? sums[Bytes - 1][0][r] : nullptr, kRows * kTileColumns, reducer,
                 tiles + (b * kRows + r) * kTileColumns);
    }
  }
}

template <class Word, int Bytes>
constexpr Kernel<Word> kKernel = {kRows,
                                  kUnit,
                                  kMaxDepth,
                                  Bytes * 16,
                                  static_cast<std::size_t>(kByteDigits<Word>) * 64,
                                  &pack_panel<Bytes>,
                                  &pack_block<Word>,
                                  &multiply_tiles<Word, Bytes>};

}  // namespace

template <class Word>
const Kernel<Word>& avx512_kernel(int bytes_per_weight) {
  return bytes_per_weight == 1 ? kKernel<Word, 1> : kKernel<Word, 2>;
}
template const Kernel<std::uint32_t>& avx512_kernel(int);
template const Kernel<std::uint64_t>& avx512_kernel(int);

}  // namespace privtuner::gemm
