// The reply to one request, as the data owner reads it: the one state machine of the processor and of devices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "privtuner/linear/messages.hpp"

namespace privtuner::linear {

// A secret that was used or wiped already.
class SecretError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Says which block comes next and refuses every other one, and lets one decryption begin, whatever comes of it. It
// holds no secret: whoever does asks it first, moves the words, and wipes what is secret when it `end`s. Not
// thread-safe.
class Reply {
 public:
  // mask_known: the request did not ask for the product of the mask.
  Reply(std::shared_ptr<const LayerSpec> layer, Direction direction, std::uint32_t tokens, const RequestId& request,
        bool mask_known);

  const std::shared_ptr<const LayerSpec>& layer() const { return layer_; }
  Direction direction() const { return direction_; }
  const RequestId& request() const { return request_; }
  std::uint32_t tokens() const { return tokens_; }
  std::uint32_t features_out() const { return layer_->features_out(direction_); }
  bool mask_known() const { return mask_known_; }

  bool used() const { return used_; }  // a decryption has begun, or it was ended
  // Throws SecretError if used.
  void begin();
  // Nothing more is read. When the last row was taken, at a refusal, or earlier.
  void end() noexcept { used_ = ended_ = true; }

  // A block that was checked, and where in its message things stand.
  struct Rows {
    std::uint32_t first, count;
    std::size_t data, data_bytes;  // [count] rows
    std::size_t mask, mask_bytes;  // [count][N] words, no bytes where the product is known
    std::size_t size;              // of the block
  };
  // The block at the front of [data, data + size), copied on the way as by open_block. Throws MessageError if it is
  // malformed or not the next one, SecretError once ended before its time.
  Rows next(const std::uint8_t* data, std::size_t size, std::uint8_t* copy = nullptr) const;
  // The words of `rows`, the last ones from `next`, were read.
  void taken(const Rows& rows) { next_row_ = rows.first + rows.count; }

  bool complete() const { return next_row_ == features_out(); }
  // Throws MessageError unless every row was taken.
  void finish() const;

  // "one forward request, 3 tokens, used": what a secret shows of itself.
  std::string describe() const;

 private:
  std::shared_ptr<const LayerSpec> layer_;
  Direction direction_;
  RequestId request_;
  std::uint32_t tokens_;
  bool mask_known_;
  std::uint32_t next_row_ = 0;
  bool used_ = false, ended_ = false;
};

}  // namespace privtuner::linear
