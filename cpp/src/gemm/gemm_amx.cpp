// AMX: byte digits, 16 x 16 x 64 products by tdpbsud. Two weight tiles times two digit tiles fill the eight registers:
// the two weight tiles are 32 rows of one-byte weights, or the low and the high bytes of 16 rows of two-byte weights.
#include "amx_tiles.hpp"
#include "bytes_avx512.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kUnit = 64;
constexpr std::size_t kTileBytes = 1024;
constexpr std::size_t kUnitsInL1 = 16;  // 1,024 depths: two weight tiles each, 32 KB

template <int Bytes>
constexpr std::size_t kRows = Bytes == 1 ? 32 : 16;

// Panel: [unit][2 tiles][16 rows][64 depths] bytes.
template <int Bytes>
void pack_panel(const PanelSource& source, std::size_t row, std::uint8_t* panel) {
  for (std::size_t j = 0; j < (source.depth + kUnit - 1) / kUnit * (kUnit / 4); ++j) {
    for (std::size_t tile = 0; tile < 2; ++tile) {
      for (std::size_t i = 0; i < 4; ++i) {
        std::int8_t block[16];
        const std::size_t first_row = Bytes == 1 ? row + 16 * tile : row;
        load_block(source, Bytes == 1 ? 0 : static_cast<int>(tile), first_row / 4 + i, j, block);
        for (std::size_t r = 0; r < 4; ++r) {
          std::uint8_t* out = panel + ((j / 16) * 2 + tile) * kTileBytes + (4 * i + r) * 64 + (j % 16) * 4;
          for (std::size_t k = 0; k < 4; ++k) out[k] = static_cast<std::uint8_t>(block[4 * r + k]);
        }
      }
    }
  }
}

// Block: [unit][digit][16 depth quads][16 columns] dwords of four digits.
template <class Word, int Digits>
void pack_blocks(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* blocks,
                 std::size_t block_bytes) {
  for (std::size_t k = 0; k < (depth + kUnit - 1) / kUnit * kUnit; k += 4) {
    const std::size_t rows = k >= depth ? 0 : (depth - k < 4 ? depth - k : 4);
    std::uint8_t* out = blocks + k / kUnit * (Digits * kTileBytes) + (k % kUnit) / 4 * 64;
    for (std::size_t j = 0; j < columns; j += kTileColumns, out += block_bytes) {
      const std::size_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
      // No pointer past the end of c is formed for the padding.
      pack_four_depths<Digits>(rows == 0 ? c : c + k * stride + j, stride, rows, width, out, kTileBytes);
    }
  }
}

// sums[tile][digit][16 rows][16 columns] += products over `units` depth units of one residue block.
template <int Digits>
void accumulate(const std::uint8_t* panel, const std::uint8_t* block, std::size_t units, bool first,
                std::int32_t* sums) {
  constexpr std::size_t kSums = kTileBytes / sizeof(std::int32_t);
  constexpr std::size_t kBlockStep = Digits * kTileBytes;
  for (std::size_t d = 0; d < Digits; d += 2) {
    const bool pair = d + 1 < Digits;
    std::int32_t* low = sums + d * kSums;
    std::int32_t* high = sums + (Digits + d) * kSums;
    if (first) {
      PRIVTUNER_TILE_ZERO(0);
      PRIVTUNER_TILE_ZERO(1);
      PRIVTUNER_TILE_ZERO(2);
      PRIVTUNER_TILE_ZERO(3);
    } else {
      PRIVTUNER_TILE_LOAD(0, low, 64);
      PRIVTUNER_TILE_LOAD(2, high, 64);
      if (pair) {
        PRIVTUNER_TILE_LOAD(1, low + kSums, 64);
        PRIVTUNER_TILE_LOAD(3, high + kSums, 64);
      }
    }
    for (std::size_t u = 0; u < units; ++u) {
      const std::uint8_t* weights = panel + u * 2 * kTileBytes;
      const std::uint8_t* digits = block + u * kBlockStep + d * kTileBytes;
      // The next digit tiles come from the L2: ask for them while this unit multiplies.
      for (std::size_t line = 0; line < 32; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(digits + kBlockStep + line * 64), _MM_HINT_T0);
      }
      PRIVTUNER_TILE_LOAD(4, weights, 64);
      PRIVTUNER_TILE_LOAD(6, digits, 64);
      PRIVTUNER_TILE_DPBSUD(0, 4, 6);
      PRIVTUNER_TILE_LOAD(5, weights + kTileBytes, 64);
      PRIVTUNER_TILE_DPBSUD(2, 5, 6);
      if (pair) {
        PRIVTUNER_TILE_LOAD(7, digits + kTileBytes, 64);
        PRIVTUNER_TILE_DPBSUD(1, 4, 7);
        PRIVTUNER_TILE_DPBSUD(3, 5, 7);
      }
    }
    PRIVTUNER_TILE_STORE(0, low, 64);
    PRIVTUNER_TILE_STORE(2, high, 64);
    if (pair) {
      PRIVTUNER_TILE_STORE(1, low + kSums, 64);
      PRIVTUNER_TILE_STORE(3, high + kSums, 64);
    }
  }
}

template <class Word, int Digits, int Bytes>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* out, std::size_t stride) {
  constexpr std::size_t kDigitSums = std::size_t{Digits} * 256, kBlockSums = 2 * kDigitSums;
  constexpr std::size_t kBlocksAtOnce = 4;  // their sums, 32 to 64 KB, wait in the L2 between depth chunks
  alignas(64) std::int32_t sums[kBlocksAtOnce * kBlockSums];
  amx_configure();
  for (std::size_t b = 0; b < blocks; b += kBlocksAtOnce) {
    const std::size_t count = blocks - b < kBlocksAtOnce ? blocks - b : kBlocksAtOnce;
    for (std::size_t u = 0; u < units; u += kUnitsInL1) {
      for (std::size_t i = 0; i < count; ++i) {
        accumulate<Digits>(panel + u * 2 * kTileBytes, block + (b + i) * block_bytes + u * (Digits * kTileBytes),
                           units - u < kUnitsInL1 ? units - u : kUnitsInL1, u == 0, sums + i * kBlockSums);
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      for (std::size_t r = 0; r < kRows<Bytes>; ++r) {
        // One-byte weights: row r is in weight tile r / 16. Two-byte weights: low bytes in tile 0, high bytes in
        // tile 1.
        const std::int32_t* row = sums + i * kBlockSums + (r / 16) * kDigitSums + (r % 16) * 16;
        finish_row<Digits, Bytes>(row, Bytes == 2 ? row + kDigitSums : nullptr, 256, reducer,
                                  out + r * stride + (b + i) * kTileColumns);
      }
    }
  }
  amx_release();
}

template <class Word, int Digits, int Bytes>
struct Path {
  static constexpr Kernel<Word> kKernel = {kRows<Bytes>,
                                           kUnit,
                                           kMaxDepth,
                                           2 * kTileBytes,
                                           Digits * kTileBytes,
                                           &pack_panel<Bytes>,
                                           &pack_blocks<Word, Digits>,
                                           &multiply_tiles<Word, Digits, Bytes>};
};

}  // namespace

template <class Word>
const Kernel<Word>& kernel_amx(int bytes_per_weight, int bits) {
  return kernel_of<Path, Word>(bytes_per_weight, bits);
}
template const Kernel<std::uint32_t>& kernel_amx(int, int);
template const Kernel<std::uint64_t>& kernel_amx(int, int);

}  // namespace privtuner::gemm
