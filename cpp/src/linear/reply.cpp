#include "privtuner/linear/reply.hpp"

#include <utility>

namespace privtuner::linear {
namespace {

[[noreturn]] void refuse_used() {
  throw SecretError("this secret was used already: a secret decrypts one reply; encrypt again for another");
}

std::string shape(std::uint32_t tokens, std::uint32_t features) {
  return "(" + std::to_string(tokens) + ", " + std::to_string(features) + ")";
}

}  // namespace

Reply::Reply(std::shared_ptr<const LayerSpec> layer, Direction direction, std::uint32_t tokens,
             const RequestId& request, bool mask_known)
    : layer_(std::move(layer)), direction_(direction), request_(request), tokens_(tokens), mask_known_(mask_known) {}

void Reply::begin() {
  if (used_) refuse_used();
  used_ = true;
}

Reply::Rows Reply::next(const std::uint8_t* data, std::size_t size, std::uint8_t* copy) const {
  if (ended_ && !complete()) refuse_used();
  const Preset& preset = *layer_->preset;
  Rows rows{};
  const BlockHeader header = open_block(preset, data, size, rows.size, copy);
  if (header.layer != layer_->id) throw MessageError("reply block: comes from another layer");
  if (header.request != request_) throw MessageError("reply block: answers another request");
  if (header.direction != direction_) {
    throw MessageError(std::string("reply block: is ") + direction_name(header.direction) + ", the request was " +
                       direction_name(direction_));
  }
  if (header.tokens != tokens_ || header.features != features_out()) {
    throw MessageError("reply block: shape " + shape(header.tokens, header.features) + ", expected " +
                       shape(tokens_, features_out()));
  }
  if (header.row_begin != next_row_) {
    throw MessageError("reply block: starts at output " + std::to_string(header.row_begin) + ", expected " +
                       std::to_string(next_row_) + ": reordered, repeated or lost");
  }
  if (header.mask_present == mask_known_) {
    throw MessageError(mask_known_ ? "reply block: carries a mask product nobody asked for"
                                   : "reply block: lacks the mask product that was asked for");
  }
  rows.first = header.row_begin;
  rows.count = header.row_count;
  rows.data = kBlockPrefix;
  rows.data_bytes = std::size_t{rows.count} * tokens_ * static_cast<std::size_t>(preset.reply_bytes);
  rows.mask = rows.data + rows.data_bytes;
  rows.mask_bytes = rows.size - rows.mask;
  return rows;
}

void Reply::finish() const {
  if (complete()) return;
  throw MessageError("reply: ends after output " + std::to_string(next_row_) + " of " + std::to_string(features_out()) +
                     ": truncated");
}

std::string Reply::describe() const {
  return std::string("one ") + direction_name(direction_) + " request, " + std::to_string(tokens_) + " tokens" +
         (used_ ? ", used" : "");
}

}  // namespace privtuner::linear
