#include "privtuner/gemm/gemm.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernel.hpp"
#include "privtuner/math/kernel_table.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::gemm {
namespace {

constexpr std::size_t kBlocksPerVisit = 4;
constexpr std::size_t kGroupBytes = std::size_t{512} << 10;  // packed residues one task keeps in its L2

std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

template <class Word>
const Kernel<Word>& kernel_for(math::Isa isa, int bytes_per_weight, int bits) {
  static constexpr math::KernelTable<const Kernel<Word>& (*)(int, int)> kTable("gemm",
                                                                               PRIVTUNER_KERNEL_ENTRIES(kernel));
  return kTable.at(isa)(bytes_per_weight, bits);
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
          throw std::invalid_argument("the 16-bit weight at (" + std::to_string(r) + ", " + std::to_string(c) +
                                      ") is outside [-" + std::to_string(kMaxWeight16) + ", " +
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

template <class Word>
void PackedResidues<Word>::assign(const Word* c, std::size_t depth, std::size_t columns, std::size_t stride,
                                  math::Isa isa, int bits) {
  if (depth < 1 || depth > kMaxDepth || stride < columns) {
    throw std::invalid_argument("residues of depth " + std::to_string(depth) + ", " + std::to_string(columns) +
                                " columns, stride " + std::to_string(stride) + ": depth must be in [1, " +
                                std::to_string(kMaxDepth) + "] and the stride at least the columns");
  }
  if (bits < 1 || bits > kMaxBits<Word>) {
    throw std::invalid_argument("residues of " + std::to_string(bits) + " bits: must be in [1, " +
                                std::to_string(kMaxBits<Word>) + "]");
  }
  // The layout of residues does not depend on the width of the weights.
  const Kernel<Word>& kernel = kernel_for<Word>(isa, 1, bits);
  block_bytes_ = ceil_div(depth, kernel.depth_unit) * kernel.block_bytes_per_unit;
  const std::size_t blocks = ceil_div(columns, kTileColumns);
  columns_ = 0;   // should the memory run out
  data_.clear();  // growing would copy
  data_.resize(blocks * block_bytes_);
  depth_ = depth;
  columns_ = columns;
  bits_ = bits;
  isa_ = isa;
  // A visit to a far-away row packs the words of several blocks.
  math::parallel_for(blocks, kBlocksPerVisit, [&](std::size_t begin, std::size_t end) {
    const std::size_t first = begin * kTileColumns;
    kernel.pack_blocks(c + first, stride, depth, std::min(end * kTileColumns, columns) - first,
                       data_.data() + begin * block_bytes_, block_bytes_);
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
  if (q.bits() > residues.bits()) {
    throw std::invalid_argument("modulus " + std::to_string(q.q) + " has " + std::to_string(q.bits()) +
                                " bits, the residues were packed for " + std::to_string(residues.bits()));
  }
  const std::size_t columns = residues.columns();
  if (stride < columns) {
    throw std::invalid_argument("output stride " + std::to_string(stride) + " is below the " + std::to_string(columns) +
                                " columns");
  }
  if (row_count == 0 || columns == 0) return;

  const Kernel<Word>& kernel = kernel_for<Word>(residues.isa(), weights.bytes_per_weight(), residues.bits());
  const Reducer reducer{q.q, 1.0 / static_cast<double>(q.q)};
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
    const std::size_t tile_stride = group * kTileColumns, tile_words = kernel.rows * tile_stride;
    math::AlignedVector<Word> tiles(tile_words), partial(units > max_units ? tile_words : 0);
    for (std::size_t task = begin; task < end; ++task) {
      const std::size_t first_block = (task / runs) * group, count = std::min(group, blocks - first_block);
      const std::size_t first_column = first_block * kTileColumns;
      const std::size_t width = std::min(count * kTileColumns, columns - first_column);
      const std::size_t last_panel = std::min(panels, (task % runs + 1) * run);
      for (std::size_t p = (task % runs) * run; p < last_panel; ++p) {
        const std::size_t rows = std::min(kernel.rows, row_count - p * kernel.rows);
        Word* const result = out + p * kernel.rows * stride + first_column;
        const bool direct = rows == kernel.rows && width == count * kTileColumns;
        Word* const target = direct ? result : tiles.data();
        const std::size_t target_stride = direct ? stride : tile_stride;
        for (std::size_t unit = 0; unit < units; unit += max_units) {
          const auto product = [&](Word* to, std::size_t to_stride) {
            kernel.multiply(packed.data() + p * panel_bytes + unit * kernel.panel_bytes_per_unit,
                            residues.block(first_block) + unit * kernel.block_bytes_per_unit, residues.block_bytes(),
                            count, std::min(max_units, units - unit), reducer, to, to_stride);
          };
          if (unit == 0) {
            product(target, target_stride);
            continue;
          }
          product(partial.data(), tile_stride);
          for (std::size_t r = 0; r < rows; ++r) {
            for (std::size_t c = 0; c < width; ++c) {
              Word& sum = target[r * target_stride + c];
              sum = static_cast<Word>(q.add(sum, partial[r * tile_stride + c]));
            }
          }
        }
        if (direct) continue;
        for (std::size_t r = 0; r < rows; ++r) {
          std::memcpy(result + r * stride, tiles.data() + r * tile_stride, width * sizeof(Word));
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
