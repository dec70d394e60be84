// The bodies of parameters, tensors and keys, inside the envelope of `wire`. Little-endian; every field is checked
// before it is used. Secret keys have no message.
//
//   parameters      : depth u32 | scale_bits u32 | first_bits u32 | log2 N u32 | insecure u32 | 0 u32
//   tensor          : level u32 | seeded u32 | seed [32], if seeded | rows [feature][component][limb]
//   public key      : seed [32] | rows [limb]
//   evaluation keys : count u32 | 0 u32 | count times (element u32, 0: relinearisation | 0 u32 | seed [32]
//                     | rows [digit][prime])
//   refresh         : rows [ciphertext][component][limb], at kRefreshLevel
//   refreshed       : seed [32] | rows [ciphertext][limb], at the level that both sides know
//   row             : N words of as many bytes as their prime needs
//
// The head holds the hash of the parameters and the shape of a tensor. That of a refresh and of its answer has the
// session as subject, the message's number in it as request, and the number of ciphertexts as features. Component 1 of
// seeded tensors, of keys and of what was refreshed is expanded from the seed on arrival: half the bytes.
//
// Scale, bound and predicted error of a tensor do not travel. They follow from the parameters and the circuit, which
// the reader knows; what a server derives with secret weights would tell of these.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/tensor.hpp"
#include "privtuner/wire/envelope.hpp"

namespace privtuner::ckks {

inline constexpr std::size_t kMaxFeatures = 65536;

std::size_t message_bytes(const Tensor& tensor);
std::size_t message_bytes(const PublicKey& key);
std::size_t message_bytes(const EvaluationKeys& keys);
std::size_t parameters_message_bytes();
std::size_t public_key_message_bytes(const Parameters& parameters);
// Bytes of a refresh of `count` ciphertexts, of its answer at `level`, and how many one message has: as many as fit
// kMaxRefreshBytes either way, or one.
inline constexpr std::size_t kMaxRefreshBytes = std::size_t{4} << 20;
inline constexpr std::size_t kMaxRefreshBatch = 64;
std::size_t refresh_bytes(const Parameters& parameters, std::size_t count);
std::size_t refreshed_bytes(const Parameters& parameters, std::size_t count, int level);
std::size_t refresh_batch(const Parameters& parameters, int level);
// Bytes of a set of `count` keys.
std::size_t keys_message_bytes(const Parameters& parameters, std::size_t count);

// Write message_bytes() bytes.
void write(const Tensor& tensor, std::uint8_t* out);
void write(const PublicKey& key, std::uint8_t* out);
void write(const EvaluationKeys& keys, std::uint8_t* out);
void write(const Parameters& parameters, std::uint8_t* out);

// Throw wire::MessageError.
ParametersPtr read_parameters(const std::uint8_t* data, std::size_t size);
// The message must have shape and level of `expected`, a planned tensor (else Error is thrown), which gives scale,
// bound and error. Null: what the secret key encrypts by default, at the parameters' depth and |value| <= 1, of any
// shape.
TensorPtr read_tensor(const ParametersPtr& parameters, const Tensor* expected, const std::uint8_t* data,
                      std::size_t size);
// common: not null where the keys must be derived from it (derived_seed).
std::shared_ptr<const PublicKey> read_public_key(const ParametersPtr& parameters, const SeedBytes* common,
                                                 const std::uint8_t* data, std::size_t size);
std::shared_ptr<const EvaluationKeys> read_keys(const ParametersPtr& parameters, const SeedBytes* common,
                                                const std::uint8_t* data, std::size_t size);

// One message of a refresh: the session, and the number of the message in it.
struct RefreshId {
  wire::Id session{};
  std::uint64_t number = 0;
};
// Masked ciphertexts at kRefreshLevel.
void write_refresh(const Tensor& masked, const RefreshId& id, std::uint8_t* out);
// Reads `count` of them; which message it is, into `id`. Throws MessageError.
std::shared_ptr<Tensor> read_refresh(const ParametersPtr& parameters, std::size_t count, const std::uint8_t* data,
                                     std::size_t size, RefreshId& id);
// Fresh ciphertexts, whose component 1 is expanded from their seed.
void write_refreshed(const Tensor& fresh, const RefreshId& id, std::uint8_t* out);
// Reads the answer to message `id` into `count` features of `fresh` from `first` on. Throws MessageError.
void read_refreshed(const RefreshId& id, const std::uint8_t* data, std::size_t size, std::size_t first,
                    std::size_t count, Tensor& fresh);

}  // namespace privtuner::ckks
