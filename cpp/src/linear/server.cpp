#include "privtuner/linear/server.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "elements.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {

QuantisedWeight::QuantisedWeight(const Preset& preset, const LayerId& id, gemm::Weights weights, const double* delta)
    : weights_(std::move(weights)) {
  if (weights_.bytes_per_weight() != preset.weight_bytes) {
    throw std::invalid_argument(std::string(preset.name) + " takes weights of " + std::to_string(preset.weight_bytes) +
                                " bytes, got " + std::to_string(weights_.bytes_per_weight()));
  }
  spec_.preset = &preset;
  spec_.id = id;
  spec_.d_out = static_cast<std::uint32_t>(weights_.rows());
  spec_.d_in = static_cast<std::uint32_t>(weights_.cols());
  spec_.delta.assign(delta, delta + spec_.d_out);
  for (std::uint32_t k = 0; k < spec_.d_out; ++k) {
    if (!(delta[k] >= 0 && delta[k] <= kMaxScale)) {
      throw std::invalid_argument("the scale of row " + std::to_string(k) + " is no float32 from 0 on");
    }
  }
  std::vector<std::int64_t> columns(spec_.d_in, 0);
  std::int64_t largest_row = 0;
  for (std::uint32_t k = 0; k < spec_.d_out; ++k) {
    std::int64_t row = 0;
    for (std::uint32_t j = 0; j < spec_.d_in; ++j) {
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
  spec_.norm_forward = std::sqrt(static_cast<double>(largest_row));
  spec_.norm_backward = std::sqrt(static_cast<double>(*std::max_element(columns.begin(), columns.end())));
}

// What is multiplied, whatever the word.
class Job::Operands {
 public:
  virtual ~Operands() = default;
  // The body of a block: rows of the reply, and of the product of the mask if the request wants it.
  virtual void write(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* body) const = 0;
};

template <class Word>
class Job::WordOperands final : public Operands {
 public:
  // body: of the request.
  WordOperands(const QuantisedWeight& prepared, const RequestHeader& header, const std::uint8_t* body)
      : weights_(prepared.weights()),
        preset_(*prepared.spec().preset),
        q_(preset_.q),
        operand_(header.direction == Direction::forward ? gemm::Operand::plain : gemm::Operand::transpose),
        isa_(math::active_isa()),
        tokens_(header.tokens) {
    const std::size_t features = header.features, n = preset_.n;
    math::AlignedVector<Word> aligned;
    if (reinterpret_cast<std::uintptr_t>(body) % alignof(Word) != 0) {
      aligned.resize(features * tokens_);
      std::memcpy(aligned.data(), body, aligned.size() * sizeof(Word));
      body = reinterpret_cast<const std::uint8_t*>(aligned.data());
    }
    data_ = pack(reinterpret_cast<const Word*>(body), features, tokens_);
    if (!header.mask_wanted) return;
    ring::Seed seed;
    seed.bytes = header.seed;
    math::AlignedVector<Word> mask(features * n);
    math::parallel_for(features, 16, [&](std::size_t begin, std::size_t end) {
      for (std::size_t j = begin; j < end; ++j) {
        ring::sample_uniform(seed, {ring::Domain::mask, static_cast<std::uint32_t>(j), 0}, static_cast<Word>(preset_.q),
                             mask.data() + j * n, n, isa_);
      }
    });
    mask_ = pack(mask.data(), features, n);
  }

  void write(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* body) const override {
    const std::size_t n = preset_.n, row_bytes = tokens_ * static_cast<std::size_t>(preset_.reply_bytes);
    math::AlignedVector<Word> products(row_count * std::max(tokens_, mask_ != nullptr ? n : 0));
    gemm::multiply(weights_, operand_, *data_, q_, row_begin, row_count, products.data(), tokens_);
    const Elements<Word>& loops = elements<Word>(isa_);
    math::parallel_for(row_count, 16, [&](std::size_t begin, std::size_t end) {
      for (std::size_t r = begin; r < end; ++r) {
        loops.shorten(preset_, products.data() + r * tokens_, tokens_, body + r * row_bytes);
      }
    });
    if (mask_ == nullptr) return;
    gemm::multiply(weights_, operand_, *mask_, q_, row_begin, row_count, products.data(), n);
    std::memcpy(body + row_count * row_bytes, products.data(), row_count * n * sizeof(Word));
  }

 private:
  using Packed = gemm::PackedResidues<Word>;

  std::unique_ptr<const Packed> pack(const Word* words, std::size_t features, std::size_t columns) const {
    return std::make_unique<const Packed>(words, features, columns, columns, isa_, q_.bits());
  }

  const gemm::Weights& weights_;
  const Preset& preset_;
  const math::Modulus q_;
  const gemm::Operand operand_;
  const math::Isa isa_;
  const std::size_t tokens_;
  std::unique_ptr<const Packed> data_, mask_;  // mask_: null unless asked for
};

Job::~Job() = default;

Job::Job(const QuantisedWeight& prepared, const std::uint8_t* message, std::size_t size)
    : prepared_(prepared), header_(open_request(*prepared.spec().preset, message, size)) {
  const LayerSpec& layer = prepared.spec();
  if (header_.layer != layer.id) throw MessageError("request: meant for another layer, or other weights of this one");
  const std::uint32_t wanted = layer.features_in(header_.direction);
  if (header_.features != wanted) {
    throw MessageError("request: " + std::to_string(header_.features) + " features, this layer takes " +
                       std::to_string(wanted) + " in the " + direction_name(header_.direction) + " direction");
  }
  operands_ = with_word(*layer.preset, [&](auto word) -> std::unique_ptr<const Operands> {
    return std::make_unique<const WordOperands<decltype(word)>>(prepared, header_, message + kRequestPrefix);
  });
}

std::size_t Job::block_size(std::uint32_t row_count) const {
  return block_bytes(*prepared_.spec().preset, row_count, header_.tokens, header_.mask_wanted);
}

void Job::rows(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* out) const {
  if (row_count < 1 || row_begin % gemm::kRowStep != 0 || row_begin > features_out() ||
      row_count > features_out() - row_begin) {
    throw std::invalid_argument("rows [" + std::to_string(row_begin) + ", " + std::to_string(row_begin + row_count) +
                                ") must start at a multiple of " + std::to_string(gemm::kRowStep) + " and end by " +
                                std::to_string(features_out()));
  }
  operands_->write(row_begin, row_count, out + kBlockPrefix);
  const BlockHeader block{header_.direction, header_.layer, header_.request, header_.tokens,
                          features_out(),    row_begin,     row_count,       header_.mask_wanted};
  seal_block(*prepared_.spec().preset, block, out, block_size(row_count));
}

}  // namespace privtuner::linear
