// Masked refresh: the owner of the key makes a fresh ciphertext of one that it cannot read (Mouchet,
// Troncoso-Pastoriza, Bossuat, Hubaux, IACR ePrint 2020/304, for several parties; Sav et al., "POSEIDON", 2021).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/messages.hpp"
#include "privtuner/ckks/tensor.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ckks {

inline constexpr int kRefreshLevel = 2;   // three primes: room for masks that drown every message
inline constexpr int kLogRefreshes = 24;  // ciphertexts that are refreshed under one key
inline constexpr double kWrapBits = 40;   // a wrap among all of them has a probability below 2^-40
inline constexpr int kMaxFloodBits = 40;

//
// The server, of a ciphertext (c0, c1) modulo q, three primes: adds an encryption of zero under the public key, then r
// to c0, uniform modulo q in every coefficient. The owner: the exact lift of w = c0 + r + c1 s to the integer nearest
// to zero, and a fresh encryption of it. The server takes the exact lift of r off. Without the encryption of zero c1
// would still tell where it comes from: of a product with a clear matrix it is linear in the weights and in what the
// owner sent.

// Throws Error if a tensor at `from` cannot be refreshed to `level`.
void check_refresh_levels(const Parameters& parameters, int from, int level);

// Throws Error if a mask could wrap more often than kWrapBits allows. The coefficients of the message m are at most B;
// m + r for r uniform modulo q passes q / 2 with a probability of |m| / q each.
void check_wrap(const Tensor& x);

// What the coefficients of feature f are flooded with before the owner decrypts them: uniform noise of up to this size,
// 2^flood_bits times what the error of any coefficient stays below, but for one case in a million. A value then says at
// most 2^-flood_bits (in statistical distance) about the error under it. Errors of packed tensors are of coefficients.
double flood_of(const Tensor& x, std::size_t f, int flood_bits, bool packed);

// Fills `revealed` (Evaluator::revealed of x and these) with x, an encryption of zero and the flood.
void reveal(const PublicKey& key, const Tensor& x, int flood_bits, bool packed, Tensor& revealed);

// The server's side of an opening, after which the owner says what a tensor at level 0 holds without knowing it: fills
// `masked` with x, an encryption of zero and a mask, and `mask` [feature][N] with that mask's coefficients, uniform
// modulo the one prime q. The owner's SecretKey::open gives x + mask modulo q, and taking the mask off is exact:
// nothing wraps but what x itself holds. A mask is used once, and wiped by the caller.
void mask_opening(const PublicKey& key, const Tensor& x, Tensor& masked, std::uint64_t* mask);

// The server's side of the refresh of one tensor. Every mask is drawn from the operating system, used for one message
// and wiped with its answer. Messages may be made by one thread while another reads answers, each of them once.
class MaskedRefresh {
 public:
  // x: at kRefreshLevel, with words. fresh: Evaluator::refreshed of it. first: the number of the first message.
  MaskedRefresh(std::shared_ptr<const PublicKey> key, TensorPtr x, std::shared_ptr<Tensor> fresh,
                const wire::Id& session, std::uint64_t first);

  std::size_t messages() const { return masks_.size(); }
  std::size_t message_bytes(std::size_t i) const { return refresh_bytes(*x_->parameters, count(i)); }
  // Message i: message_bytes(i) bytes. Throws std::logic_error where it was made before.
  void mask(std::size_t i, std::uint8_t* out);
  // Takes its mask off the answer. Throws MessageError, std::logic_error where there is no mask.
  void unmask(std::size_t i, const std::uint8_t* answer, std::size_t size);
  // Throws std::logic_error before all answers were read.
  TensorPtr result() const;

 private:
  enum class State : std::uint8_t { waiting, sent, answered };
  struct Mask {
    ring::Seed seed;
    State state = State::waiting;
  };
  std::size_t count(std::size_t i) const { return std::min(batch_, x_->features - i * batch_); }
  RefreshId id(std::size_t i) const { return {session_, first_ + i}; }

  std::shared_ptr<const PublicKey> key_;
  TensorPtr x_;
  std::shared_ptr<Tensor> fresh_;
  wire::Id session_;
  std::uint64_t first_;
  std::size_t batch_;
  std::vector<Mask> masks_;  // one a message
};

}  // namespace privtuner::ckks
