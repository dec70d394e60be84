// The model owner's side: a prepared weight matrix answers requests.
#pragma once

#include <cstdint>
#include <memory>

#include "privtuner/gemm/gemm.hpp"
#include "privtuner/linear/messages.hpp"

namespace privtuner::linear {

class QuantisedWeight {
 public:
  // weights: (d_out, d_in), of the preset's bytes, |w| <= preset.max_weight; delta: d_out scales in (0, kMaxScale], or
  // 0 for a row of zeros. Throws std::invalid_argument.
  QuantisedWeight(const Preset& preset, const LayerId& id, gemm::Weights weights, const double* delta);

  const LayerSpec& spec() const { return spec_; }
  const gemm::Weights& weights() const { return weights_; }

 private:
  LayerSpec spec_;
  gemm::Weights weights_;
};

// One request, checked and laid out for the products. Refers to the prepared layer, which must outlive it.
class Job {
 public:
  // Throws MessageError. The message is not needed afterwards.
  Job(const QuantisedWeight& prepared, const std::uint8_t* message, std::size_t size);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  const RequestHeader& header() const { return header_; }
  std::uint32_t features_out() const { return prepared_.spec().features_out(header_.direction); }

  std::size_t block_size(std::uint32_t row_count) const;
  // Writes the reply block of rows [row_begin, row_begin + row_count) into out, block_size(row_count) bytes. row_begin
  // must be a multiple of gemm::kRowStep and the range inside the outputs (std::invalid_argument).
  void rows(std::uint32_t row_begin, std::uint32_t row_count, std::uint8_t* out) const;

 private:
  class Operands;
  template <class Word>
  class WordOperands;

  const QuantisedWeight& prepared_;
  RequestHeader header_;
  std::unique_ptr<const Operands> operands_;
};

}  // namespace privtuner::linear
