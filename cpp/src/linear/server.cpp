#include "privtuner/linear/server.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "elements.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {

Prepared::Prepared(const Preset& preset, const LayerId& id, const std::int8_t* weights, std::uint32_t d_out,
                   std::uint32_t d_in, const double* delta)
    : weights_(weights, d_out, d_in) {
  public_.preset = &preset;
  public_.id = id;
  finish(delta);
}

Prepared::Prepared(const Preset& preset, const LayerId& id, const std::int16_t* weights, std::uint32_t d_out,
                   std::uint32_t d_in, const double* delta)
    : weights_(weights, d_out, d_in) {
  public_.preset = &preset;
  public_.id = id;
  finish(delta);
}

void Prepared::finish(const double* delta) {
  const Preset& preset = *public_.preset;
  if (weights_.bytes_per_weight() != preset.weight_bytes) {
    throw std::invalid_argument(std::string(preset.name) + " takes weights of " + std::to_string(preset.weight_bytes) +
                                " bytes, got " + std::to_string(weights_.bytes_per_weight()));
  }
  public_.d_out = static_cast<std::uint32_t>(weights_.rows());
  public_.d_in = static_cast<std::uint32_t>(weights_.cols());
  public_.delta.assign(delta, delta + public_.d_out);
  for (std::uint32_t k = 0; k < public_.d_out; ++k) {
    if (!(delta[k] >= 0 && delta[k] <= kMaxScale)) {
      throw std::invalid_argument("the scale of row " + std::to_string(k) + " is no float32 from 0 on");
    }
  }
  std::vector<std::int64_t> columns(public_.d_in, 0);
  std::int64_t largest_row = 0;
  for (std::uint32_t k = 0; k < public_.d_out; ++k) {
    std::int64_t row = 0;
    for (std::uint32_t j = 0; j < public_.d_in; ++j) {
      const std::int64_t w = weights_.at(k, j);
      if (w > preset.max_weight || w < -preset.max_weight) {
        throw std::invalid_argument("the weight at (" + std::to_string(k) + ", " + std::to_string(j) + ") is beyond " +
                                    std::to_string(preset.max_weight));
      }
      row += w * w;
      columns[j] += w * w;
    }
    if (row != 0 && delta[k] == 0) {
      throw std::invalid_argument("scale of row " + std::to_string(k) + " is 0, its weights are not");
    }
    largest_row = std::max(largest_row, row);
  }
  public_.norm_forward = std::sqrt(static_cast<double>(largest_row));
  public_.norm_backward = std::sqrt(static_cast<double>(*std::max_element(columns.begin(), columns.end())));
}

template <class Word>
struct Job::Operands {
  gemm::PackedResidues<Word> data;
  std::unique_ptr<gemm::PackedResidues<Word>> mask;  // null unless asked for
};

Job::~Job() = default;

Job::Job(const Prepared& prepared, const std::uint8_t* message, std::size_t size)
    : prepared_(prepared), header_(open_request(*prepared.public_part().preset, message, size)) {
  const Public& layer = prepared.public_part();
  if (header_.layer != layer.id) throw MessageError("request: meant for another layer, or other weights of this one");
  const std::uint32_t wanted = layer.features_in(header_.direction);
  if (header_.features != wanted) {
    throw MessageError("request: " + std::to_string(header_.features) + " features, this layer takes " +
                       std::to_string(wanted) + " in the " + direction_name(header_.direction) + " direction");
  }
  if (layer.preset->word_bytes == 4) {
    load<std::uint32_t>(message + kRequestPrefix);
  } else {
    load<std::uint64_t>(message + kRequestPrefix);
  }
}

template <class Word>
void Job::load(const std::uint8_t* body) {
  const Preset& preset = *prepared_.public_part().preset;
  const math::Isa isa = math::active_isa();
  const int bits = math::Modulus(preset.q).bits();
  const std::size_t features = header_.features, tokens = header_.tokens;
  math::AlignedVector<Word> aligned;
  if (reinterpret_cast<std::uintptr_t>(body) % alignof(Word) != 0) {
    aligned.resize(features * tokens);
    std::memcpy(aligned.data(), body, aligned.size() * sizeof(Word));
    body = reinterpret_cast<const std::uint8_t*>(aligned.data());
  }
  auto operands = std::unique_ptr<Operands<Word>>(new Operands<Word>{
      gemm::PackedResidues<Word>(reinterpret_cast<const Word*>(body), features, tokens, tokens, isa, bits), nullptr});
  if (header_.mask_wanted) {
    ring::Seed seed;
    seed.bytes = header_.seed;
    math::AlignedVector<Word> mask(features * preset.n);
    math::parallel_for(features, 16, [&](std::size_t begin, std::size_t end) {
      for (std::size_t j = begin; j < end; ++j) {
        ring::sample_uniform(seed, {ring::Domain::mask, static_cast<std::uint32_t>(j), 0}, static_cast<Word>(preset.q),
                             mask.data() + j * preset.n, preset.n, isa);
      }
    });
    operands->mask = std::make_unique<gemm::PackedResidues<Word>>(mask.data(), features, preset.n, preset.n, isa, bits);
  }
  if constexpr (std::is_same_v<Word, std::uint32_t>) {
    words32_ = std::move(operands);
  } else {
    words64_ = std::move(operands);
  }
}

std::size_t Job::block_size(std::uint32_t row_count) const {
  return block_bytes(*prepared_.public_part().preset, row_count, header_.tokens, header_.mask_wanted);
}

void Job::rows(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* out) const {
  if (row_count < 1 || row_begin % gemm::kRowStep != 0 || row_begin > features_out() ||
      row_count > features_out() - row_begin) {
    throw std::invalid_argument("rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + row_count) +
                                ") must start at a multiple of " + std::to_string(gemm::kRowStep) + " and end by " +
                                std::to_string(features_out()));
  }
  if (words32_ != nullptr) {
    write_rows<std::uint32_t>(row_begin, row_count, out);
  } else {
    write_rows<std::uint64_t>(row_begin, row_count, out);
  }
}

template <class Word>
void Job::write_rows(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* out) const {
  const Public& layer = prepared_.public_part();
  const Preset& preset = *layer.preset;
  const math::Modulus q(preset.q);
  const gemm::Operand operand =
      header_.direction == Direction::forward ? gemm::Operand::plain : gemm::Operand::transpose;
  const Operands<Word>* operands;
  if constexpr (std::is_same_v<Word, std::uint32_t>) {
    operands = words32_.get();
  } else {
    operands = words64_.get();
  }
  const std::size_t tokens = header_.tokens, row_bytes = tokens * static_cast<std::size_t>(preset.reply_bytes);
  math::AlignedVector<Word> products(row_count * std::max(tokens, header_.mask_wanted ? preset.n : 0));

  gemm::multiply(prepared_.weights(), operand, operands->data, q, row_begin, row_count, products.data(), tokens);
  const Elements& loops = elements(operands->data.isa());
  std::uint8_t* rows = out + kBlockPrefix;
  math::parallel_for(row_count, 16, [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      if constexpr (std::is_same_v<Word, std::uint32_t>) {
        loops.shorten32(products.data() + r * tokens, tokens, preset.dropped_bits, rows + r * row_bytes);
      } else {
        loops.shorten64(products.data() + r * tokens, tokens, preset.dropped_bits, rows + r * row_bytes);
      }
    }
  });
  if (header_.mask_wanted) {
    gemm::multiply(prepared_.weights(), operand, *operands->mask, q, row_begin, row_count, products.data(), preset.n);
    std::memcpy(rows + row_count * row_bytes, products.data(), row_count * preset.n * sizeof(Word));
  }
  const BlockHeader block{header_.direction, header_.layer, header_.request, header_.tokens,
                          features_out(),    row_begin,     row_count,       header_.mask_wanted};
  seal_block(preset, block, out, block_size(row_count));
}

}  // namespace privtuner::linear
