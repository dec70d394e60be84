// The data owner's side on the processor: encrypt a batch, decrypt the reply.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "privtuner/linear/masks.hpp"
#include "privtuner/linear/messages.hpp"
#include "privtuner/linear/reply.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {

// Delta_t |x_t o weight|, of every token t: the largest for which no output can leave (-q/2, q/2), whatever the token.
double token_room(const LayerSpec& layer, Direction direction);

// What decrypts the reply to one request: secrets of every group of N tokens and the tokens' scales. Never copied,
// never serialised, wiped when its decryption ends, however it ends, or when released.
class OneTimeKey {
 public:
  OneTimeKey(const OneTimeKey&) = delete;
  OneTimeKey& operator=(const OneTimeKey&) = delete;
  OneTimeKey(OneTimeKey&&) = default;
  OneTimeKey& operator=(OneTimeKey&&) = default;
  ~OneTimeKey() { erase(); }

  const Reply& reply() const { return reply_; }
  // Waits for a decryption that is running in another thread.
  void wipe() noexcept;

 private:
  using MaskWords = math::AlignedVector<std::uint8_t>;
  friend class Decryption;
  friend struct Encryptor;
  OneTimeKey(Reply reply, std::shared_ptr<MaskCache> masks, std::shared_ptr<const MaskWords> mask);
  void erase() noexcept;

  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  // held by a decryption at work, and by wipe
  Reply reply_;
  math::SecretBuffer<std::uint8_t> groups_;    // prepared NTT factors, one a group
  math::SecretBuffer<double> inverse_scales_;  // 1 / Delta_t, [tokens]
  std::shared_ptr<MaskCache> masks_;
  std::shared_ptr<const MaskWords> mask_;  // known before the request
};

// Encrypts x (tokens, features), row-major float32. In the backward direction the columns are multiplied by delta.
// `size` must be request_bytes(...). masks may be null: then the request has a fresh mask seed of its own.
// Throws std::invalid_argument for a value that is not finite (naming its place), or no tokens.
// `seed` is the owner's secret randomness: 32 fresh bytes of the operating system; a fixed one only in tests.
OneTimeKey encrypt(std::shared_ptr<const LayerSpec> spec, Direction direction, const float* x, std::uint32_t tokens,
                   std::shared_ptr<MaskCache> masks, const ring::Seed& seed,
                   const std::array<std::uint8_t, 32>& mask_seed, const RequestId& request, std::uint8_t* message,
                   std::size_t size);

// Decrypts a reply block by block. The secret is this decryption's alone from the start and wiped with its last row, at
// the first block that is refused, or with this object: no second reply ever meets it.
class Decryption {
 public:
  // out: (tokens, features out), row-major. Throws SecretError if the secret was used.
  Decryption(OneTimeKey& secret, float* out);
  ~Decryption() { secret_->wipe(); }
  Decryption(const Decryption&) = delete;
  Decryption& operator=(const Decryption&) = delete;

  // One or more whole blocks. Throws MessageError if a block is malformed or not the next one, and SecretError after
  // that or once the secret was wiped.
  void feed(const std::uint8_t* data, std::size_t size);
  bool complete() const { return secret_->reply_.complete(); }
  // Throws MessageError unless every row has arrived.
  void finish() const { secret_->reply_.finish(); }

 private:
  template <class Word>
  void decrypt_rows(const Reply::Rows& rows, const std::uint8_t* block);
  OneTimeKey* secret_;
  float* out_;
  std::shared_ptr<OneTimeKey::MaskWords> filling_;
};

}  // namespace privtuner::linear
