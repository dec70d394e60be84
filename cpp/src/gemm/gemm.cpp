#include "privtuner/gemm/gemm.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kGroupBytes = std::size_t{512} << 10;  // packed residues one task keeps in its L2

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

template <class Word>
const Kernel<Word>& kernel_for(math::Isa isa, int bytes_per_weight) {
  switch (isa) {
#ifdef PRIVTUNER_HAVE_AMX
    case math::Isa::amx:
      return amx_kernel<Word>(bytes_per_weight);
#endif
#ifdef PRIVTUNER_HAVE_AVX512
    case math::Isa::avx512:
      return avx512_kernel<Word>(bytes_per_weight);
#endif
#ifdef PRIVTUNER_HAVE_AVX2
    case math::Isa::avx2:
      return avx2_kernel<Word>(bytes_per_weight);
#endif
    case math::Isa::portable:
      return portable_kernel<Word>(bytes_per_weight);
    default:
      throw std::invalid_argument(std::string("gemm: path ") + math::isa_name(isa) + " is not in this build");
  }
}

}  // namespace

Weights::Weights(const std::int8_t* w, std::size_t rows, std::size_t cols) : rows_(rows), cols_(cols), bytes_(1) {
  fill(w);
}

Weights::Weights(const std::int16_t* w, std::size_t rows, std::size_t cols) : rows_(rows), cols_(cols), bytes_(2) {
  fill(w);
}

template <class T>
void Weights::fill(const T* w) {
  if (rows_ < 1 || cols_ < 1 || rows_ > kMaxDepth || cols_ > kMaxDepth) {
    throw std::invalid_argument("weights of shape (" + std::to_string(rows_) + ", " + std::to_string(cols_) +
                                "): both dimensions must be in [1, " + std::to_string(kMaxDepth) + "]");
  }
  row_blocks_ = ceil_div(rows_, 4);
  col_blocks_ = ceil_div(cols_, 4);
  data_.resize(static_cast<std::size_t>(bytes_) * row_blocks_ * col_blocks_ * 16);
  std::memset(data_.data(), 0, data_.size());
  const std::size_t plane = row_blocks_ * col_blocks_ * 16;
  for (std::size_t r = 0; r < rows_; ++r) {
    for (std::size_t c = 0; c < cols_; ++c) {
      const int value = w[r * cols_ + c];
      const std::size_t at = ((r / 4) * col_blocks_ + c / 4) * 16 + (r % 4) * 4 + c % 4;
      if constexpr (sizeof(T) == 1) {
        data_[at] = static_cast<std::int8_t>(value);
      } else {
        if (value > kMaxWeight16 || value < -kMaxWeight16) {
          throw std::invalid_argument("16-bit weight " + std::to_string(value) + " at (" + std::to_string(r) + ", " +
                                      std::to_string(c) + ") is outside [-" + std::to_string(kMaxWeight16) + ", " +
                                      std::to_string(kMaxWeight16) + "]");
        }
        const auto low = static_cast<std::int8_t>(value & 0xff);  // signed low byte; the high byte takes the carry
        data_[at] = low;
        data_[plane + at] = static_cast<std::int8_t>((value - low) / 256);
      }
    }
  }
}

int Weights::at(std::size_t row, std::size_t col) const {
  const std::size_t inside = (row % 4) * 4 + col % 4;
  const int low = block(0, row / 4, col / 4)[inside];
  return bytes_ == 1 ? low : low + 256 * block(1, row / 4, col / 4)[inside];
}

void load_block(const PanelSource& source, int byte, std::size_t i, std::size_t j, std::int8_t out[16]) {
  const Weights& w = *source.weights;
  const bool plain = source.operand == Operand::plain;
  const std::size_t row_block = plain ? i : j, col_block = plain ? j : i;
  if (row_block >= w.row_blocks() || col_block >= w.col_blocks()) {
    std::memset(out, 0, 16);
    return;
  }
  const std::int8_t* block = w.block(byte, row_block, col_block);
  if (plain) {
    std::memcpy(out, block, 16);
  } else {
    for (int r = 0; r < 4; ++r) {
      for (int k = 0; k < 4; ++k) out[4 * r + k] = block[4 * k + r];
    }
  }
}

Reducer::Reducer(const math::Modulus& q)
    : modulus(q),
      inverse(1.0 / static_cast<double>(q.q)),
      two32(q.reduce(std::uint64_t{1} << 32)),
      two32_shoup(q.shoup(two32)) {}

void recombine_bytes(const std::int32_t* low, const std::int32_t* high, std::size_t step, const Reducer& reducer,
                     std::uint64_t* out) {
  constexpr int kDigits = 7;
  const math::Modulus& q = reducer.modulus;
  for (std::size_t c = 0; c < kTileColumns; ++c) {
    std::int64_t sums[kDigits + 1];  // of equal weight 2^(8 d); |sum| < 2^32
    for (int d = 0; d < kDigits; ++d) sums[d] = low[static_cast<std::size_t>(d) * step + c];
    sums[kDigits] = 0;
    if (high != nullptr) {
      for (int d = 0; d < kDigits; ++d) sums[d + 1] += high[static_cast<std::size_t>(d) * step + c];
    }
    std::int64_t bottom = 0, top = 0;  // |.| < 2^57
    for (int d = 3; d >= 0; --d) {
      bottom = bottom * 256 + sums[d];
      top = top * 256 + sums[d + 4];
    }
    out[c] = q.add(q.reduce_signed(bottom), q.mul_shoup(q.reduce_signed(top), reducer.two32, reducer.two32_shoup));
  }
}

void recombine_11(const std::int32_t* low, const std::int32_t* high, std::size_t step, int digits,
                  const Reducer& reducer, std::uint64_t* out) {
  const math::Modulus& q = reducer.modulus;
  const auto count = static_cast<std::size_t>(digits);
  for (std::size_t c = 0; c < kTileColumns; ++c) {
    // |sum| < 2^31, or 2^40 with the high byte; so |bottom| < 2^62 and, above 2^33, |top| < 2^51.
    std::int64_t bottom = 0, top = 0;
    for (std::size_t d = count; d-- > 0;) {
      const std::int64_t sum = low[d * step + c] + (high == nullptr ? 0 : std::int64_t{256} * high[d * step + c]);
      if (d >= 3) {
        top = top * 2048 + sum;
      } else {
        bottom = bottom * 2048 + sum;
      }
    }
    const std::uint64_t rest = q.reduce_signed(bottom);
    if (digits <= 3) {
      out[c] = rest;
    } else {
      const std::uint64_t shifted = q.mul_shoup(q.reduce_signed(top), reducer.two32, reducer.two32_shoup);
      out[c] = q.add(rest, q.add(shifted, shifted));  // 2^33 = 2 * 2^32
    }
  }
}

template <class Word>
PackedResidues<Word>::PackedResidues(const Word* c, std::size_t depth, std::size_t columns, std::size_t stride,
                                     math::Isa isa)
    : depth_(depth), columns_(columns), isa_(isa) {
  if (depth < 1 || depth > kMaxDepth || stride < columns) {
    throw std::invalid_argument("residues of depth " + std::to_string(depth) + ", " + std::to_string(columns) +
                                " columns, stride " + std::to_string(stride) + ": depth must be in [1, " +
                                std::to_string(kMaxDepth) + "] and the stride at least the columns");
  }
  // The layout of residues does not depend on the width of the weights.
  const Kernel<Word>& kernel = kernel_for<Word>(isa, 1);
  block_bytes_ = ceil_div(depth, kernel.depth_unit) * kernel.block_bytes_per_unit;
  const std::size_t blocks = ceil_div(columns, kTileColumns);
  data_.resize(blocks * block_bytes_);
  math::parallel_for(blocks, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t b = begin; b < end; ++b) {
      const std::size_t first = b * kTileColumns;
      kernel.pack_block(c + first, stride, depth, std::min(kTileColumns, columns - first),
                        data_.data() + b * block_bytes_);
    }
  });
}

template <class Word>
void multiply(const Weights& weights, Operand operand, const PackedResidues<Word>& residues, const math::Modulus& q,
              std::size_t row_begin, std::size_t row_count, Word* out, std::size_t stride) {
  const bool plain = operand == Operand::plain;
  const PanelSource source{&weights, operand, plain ? weights.cols() : weights.rows(),
                           plain ? weights.rows() : weights.cols()};
  if (residues.depth() != source.depth) {
    throw std::invalid_argument("residues have depth " + std::to_string(residues.depth()) + ", the weights " +
                                std::to_string(source.depth));
  }
  if (row_begin % kRowStep != 0 || row_begin + row_count > source.rows || row_begin + row_count < row_begin) {
    throw std::invalid_argument("rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + row_count) +
                                ") must start at a multiple of " + std::to_string(kRowStep) + " and end by " +
                                std::to_string(source.rows));
  }
  if (q.q >> (sizeof(Word) == 4 ? 32 : 52) != 0) {
    throw std::invalid_argument("modulus " + std::to_string(q.q) + " is too large for this product");
  }
  const std::size_t columns = residues.columns();
  if (stride < columns) {
    throw std::invalid_argument("output stride " + std::to_string(stride) + " is below the " + std::to_string(columns) +
                                " columns");
  }
  if (row_count == 0 || columns == 0) return;

  const Kernel<Word>& kernel = kernel_for<Word>(residues.isa(), weights.bytes_per_weight());
  const Reducer reducer(q);
  const std::size_t units = ceil_div(source.depth, kernel.depth_unit);
  const std::size_t panel_bytes = units * kernel.panel_bytes_per_unit;
  const std::size_t panels = ceil_div(row_count, kernel.rows);
  math::AlignedVector<std::uint8_t> packed(panels * panel_bytes);
  math::parallel_for(panels, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t p = begin; p < end; ++p) {
      kernel.pack_panel(source, row_begin + p * kernel.rows, packed.data() + p * panel_bytes);
    }
  });

  // Tasks are rectangles: a group of residue blocks that fits the L2, times a run of panels.
  const std::size_t blocks = ceil_div(columns, kTileColumns);
  const std::size_t group = std::clamp<std::size_t>(kGroupBytes / residues.block_bytes(), 1, 16);
  const std::size_t groups = ceil_div(blocks, group);
  const std::size_t wanted_tasks = 8 * static_cast<std::size_t>(math::num_threads());
  const std::size_t runs = std::clamp<std::size_t>(ceil_div(wanted_tasks, groups), 1, panels);
  const std::size_t run = ceil_div(panels, runs);
  const std::size_t max_units = kernel.max_depth / kernel.depth_unit;
  math::parallel_for(groups * runs, 1, [&](std::size_t begin, std::size_t end) {
    const std::size_t tile_words = kernel.rows * kTileColumns;
    math::AlignedVector<Word> tiles(group * tile_words), partial(units > max_units ? group * tile_words : 0);
    for (std::size_t task = begin; task < end; ++task) {
      const std::size_t first_block = (task / runs) * group, count = std::min(group, blocks - first_block);
      const std::size_t last_panel = std::min(panels, (task % runs + 1) * run);
      for (std::size_t p = (task % runs) * run; p < last_panel; ++p) {
        for (std::size_t unit = 0; unit < units; unit += max_units) {
          Word* target = unit == 0 ? tiles.data() : partial.data();
          kernel.multiply(packed.data() + p * panel_bytes + unit * kernel.panel_bytes_per_unit,
                          residues.block(first_block) + unit * kernel.block_bytes_per_unit, residues.block_bytes(),
                          count, std::min(max_units, units - unit), reducer, target);
          if (unit == 0) continue;
          for (std::size_t i = 0; i < count * tile_words; ++i) {
            tiles[i] = static_cast<Word>(q.add(tiles[i], partial[i]));
          }
        }
        const std::size_t rows = std::min(kernel.rows, row_count - p * kernel.rows);
        for (std::size_t b = 0; b < count; ++b) {
          const std::size_t column = (first_block + b) * kTileColumns;
          const std::size_t width = std::min(kTileColumns, columns - column);
          for (std::size_t r = 0; r < rows; ++r) {
            std::memcpy(out + (p * kernel.rows + r) * stride + column, tiles.data() + b * tile_words + r * kTileColumns,
                        width * sizeof(Word));
          }
        }
      }
    }
  });
}

template class PackedResidues<std::uint32_t>;
template class PackedResidues<std::uint64_t>;
template void multiply(const Weights&, Operand, const PackedResidues<std::uint32_t>&, const math::Modulus&, std::size_t,
                       std::size_t, std::uint32_t*, std::size_t);
template void multiply(const Weights&, Operand, const PackedResidues<std::uint64_t>&, const math::Modulus&, std::size_t,
                       std::size_t, std::uint64_t*, std::size_t);

}  // namespace privtuner::gemm
