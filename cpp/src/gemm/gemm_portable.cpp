// The oracle: products in wide integers, no digit planes.
#include <cstring>
#include <type_traits>

#include "kernel.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kRows = 4;

// Panel: [depth / 4][row][4] 32-bit weights.
void pack_panel(const PanelSource& source, std::size_t row, std::uint8_t* panel) {
  const bool wide = source.weights->bytes_per_weight() == 2;
  for (std::size_t j = 0; j < (source.depth + 3) / 4; ++j) {
    std::int8_t low[16], high[16] = {};
    std::int32_t values[16];
    load_block(source, 0, row / 4, j, low);
    if (wide) load_block(source, 1, row / 4, j, high);
    for (int i = 0; i < 16; ++i) values[i] = low[i] + 256 * high[i];
    std::memcpy(panel + j * sizeof(values), values, sizeof(values));
  }
}

// Block: [depth][16] words.
template <class Word>
void pack_blocks(const Word* c, std::size_t stride, std::size_t depth, std::size_t columns, std::uint8_t* blocks,
                 std::size_t block_bytes) {
  for (std::size_t j = 0; j < columns; j += kTileColumns, blocks += block_bytes) {
    const std::size_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
    for (std::size_t k = 0; k < (depth + 3) / 4 * 4; ++k) {
      Word row[kTileColumns] = {};
      if (k < depth) std::memcpy(row, c + k * stride + j, width * sizeof(Word));
      std::memcpy(blocks + k * sizeof(row), row, sizeof(row));
    }
  }
}

template <class Word>
void multiply_tiles(const std::uint8_t* panel, const std::uint8_t* block, std::size_t block_bytes, std::size_t blocks,
                    std::size_t units, const Reducer& reducer, Word* out, std::size_t stride) {
  // |sum| < 2^16 * 2^32 * 2^15 in the first case, < 2^16 * 2^60 * 2^15 in the second.
  using Sum = std::conditional_t<sizeof(Word) == 4, std::int64_t, __int128>;
  const Sum q = static_cast<Sum>(reducer.q);
  for (std::size_t b = 0; b < blocks; ++b) {
    const Word* words = reinterpret_cast<const Word*>(block + b * block_bytes);
    for (std::size_t r = 0; r < kRows; ++r) {
      Sum sums[kTileColumns] = {};
      for (std::size_t k = 0; k < 4 * units; ++k) {
        const std::int32_t w = reinterpret_cast<const std::int32_t*>(panel)[k / 4 * 16 + r * 4 + k % 4];
        for (std::size_t c = 0; c < kTileColumns; ++c) {
          sums[c] += static_cast<Sum>(w) * static_cast<Sum>(words[k * kTileColumns + c]);
        }
      }
      Word* to = out + r * stride + b * kTileColumns;
      for (std::size_t c = 0; c < kTileColumns; ++c) {
        const Sum rest = sums[c] % q;
        to[c] = static_cast<Word>(rest < 0 ? rest + q : rest);
      }
    }
  }
}

template <class Word>
constexpr Kernel<Word> kKernel = {kRows,
                                  4,
                                  kMaxDepth,
                                  16 * sizeof(std::int32_t),
                                  4 * kTileColumns * sizeof(Word),
                                  &pack_panel,
                                  &pack_blocks<Word>,
                                  &multiply_tiles<Word>};

}  // namespace

template <class Word>
const Kernel<Word>& kernel_portable(int, int) {
  return kKernel<Word>;
}
template const Kernel<std::uint32_t>& kernel_portable(int, int);
template const Kernel<std::uint64_t>& kernel_portable(int, int);

}  // namespace privtuner::gemm
