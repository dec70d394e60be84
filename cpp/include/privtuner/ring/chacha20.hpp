// ChaCha20 (RFC 8439): the generator every sampler draws from.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"

namespace privtuner::ring {

inline constexpr std::size_t kChaChaBlock = 64;

using ChaChaNonce = std::array<std::uint8_t, 12>;

// Writes `blocks` * 64 bytes of keystream from block `first_block` on (RFC 8439, section 2.4: 32-bit block counter).
// Throws std::length_error if the counter would pass 2^32. Every path gives the same bytes; `isa` must be a usable one.
void chacha20_keystream(const std::uint8_t key[32], const ChaChaNonce& nonce, std::uint32_t first_block,
                        std::uint8_t* out, std::size_t blocks, math::Isa isa);

}  // namespace privtuner::ring
