// The data owner's side: encrypt a batch, decrypt the reply.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "privtuner/linear/messages.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {

// A secret that was used or wiped already.
class SecretError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The products of one public mask with the layers it met: what makes later requests of a layer cost the data half only.
// Public data: the server computed it. Thread-safe.
class MaskCache {
 public:
  struct Entry {
    math::AlignedVector<std::uint8_t> words;  // [features out][N] residues
  };

  // At most max_bytes are kept; layers beyond it send their mask product with every reply.
  explicit MaskCache(std::size_t max_bytes);

  const std::array<std::uint8_t, 32>& seed() const { return seed_; }
  std::size_t bytes() const;
  std::size_t max_bytes() const { return max_bytes_; }

  // The complete product of a layer, or null where there is none of that many bytes: the id alone proves nothing.
  std::shared_ptr<const Entry> find(const LayerId& layer, Direction direction, std::size_t bytes) const;
  // Space for a product of `bytes`, or null where it would not fit. Not found before `insert`.
  std::shared_ptr<Entry> reserve(std::size_t bytes) const;
  void insert(const LayerId& layer, Direction direction, std::shared_ptr<const Entry> entry);

 private:
  std::array<std::uint8_t, 32> seed_;
  std::size_t max_bytes_;
  mutable std::mutex mutex_;
  std::size_t bytes_ = 0;
  std::map<std::pair<LayerId, Direction>, std::shared_ptr<const Entry>> entries_;
};

// What decrypts the reply to one request: secrets of every group of N tokens and the tokens' scales. Never copied,
// never serialised, wiped when its decryption ends, however it ends, or when released.
class Secret {
 public:
  Secret(const Secret&) = delete;
  Secret& operator=(const Secret&) = delete;
  Secret(Secret&&) = default;
  Secret& operator=(Secret&&) = default;
  ~Secret() { erase(); }

  const Public& public_part() const { return *public_; }
  Direction direction() const { return direction_; }
  std::uint32_t tokens() const { return tokens_; }
  std::uint32_t features_out() const { return public_->features_out(direction_); }
  bool used() const { return used_; }  // a decryption has begun, or it was wiped
  // Waits for a decryption that is running in another thread.
  void wipe() noexcept;

 private:
  friend class Decryption;
  friend struct Encryptor;
  Secret() = default;
  void erase() noexcept;
  std::size_t mask_bytes() const;  // of the whole mask product

  std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  // held by a decryption at work, and by wipe
  std::shared_ptr<const Public> public_;
  Direction direction_ = Direction::forward;
  RequestId request_{};
  std::uint32_t tokens_ = 0;
  bool used_ = false;
  math::SecretBuffer<std::uint8_t> groups_;    // prepared NTT factors, one a group
  math::SecretBuffer<double> inverse_scales_;  // 1 / Delta_t, [tokens]
  std::shared_ptr<MaskCache> masks_;
  std::shared_ptr<const MaskCache::Entry> mask_;  // known before the request
};

// Encrypts x (tokens, features), row-major float32. In the backward direction the columns are multiplied by delta.
// `size` must be request_bytes(...). masks may be null: then the request has a fresh mask seed of its own.
// Throws std::invalid_argument for a value that is not finite (naming its place), or no tokens.
// `seed` is the owner's secret randomness: 32 fresh bytes of the operating system; a fixed one only in tests.
Secret encrypt(std::shared_ptr<const Public> public_part, Direction direction, const float* x, std::uint32_t tokens,
               std::shared_ptr<MaskCache> masks, const ring::Seed& seed, const std::array<std::uint8_t, 32>& mask_seed,
               const RequestId& request, std::uint8_t* message, std::size_t size);

// Decrypts a reply block by block. The secret is this decryption's alone from the start and wiped with its last row, at
// the first block that is refused, or with this object: no second reply ever meets it.
class Decryption {
 public:
  // out: (tokens, features out), row-major. Throws SecretError if the secret was used.
  Decryption(Secret& secret, float* out);
  ~Decryption() { secret_->wipe(); }
  Decryption(const Decryption&) = delete;
  Decryption& operator=(const Decryption&) = delete;

  // One or more whole blocks. Throws MessageError if a block is malformed or not the next one, and SecretError after
  // that or once the secret was wiped.
  void feed(const std::uint8_t* data, std::size_t size);
  bool complete() const { return next_row_ == secret_->features_out(); }
  // Throws MessageError unless every row has arrived.
  void finish();

 private:
  void read(const std::uint8_t* data, std::size_t size);
  template <class Word>
  void decrypt_rows(const BlockHeader& header, const std::uint8_t* body);
  Secret* secret_;
  float* out_;
  std::uint32_t next_row_ = 0;
  std::shared_ptr<MaskCache::Entry> filling_;
};

}  // namespace privtuner::linear
