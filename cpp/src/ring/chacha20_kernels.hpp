// What the ChaCha20 kernels share. Declarations alone: the kernels' files are compiled with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace privtuner::ring::kernels {

// Blocks a kernel makes side by side.
inline constexpr std::size_t kAvx2Width = 8, kAvx512Width = 16;

// Write `batches` times width blocks from the block counter in state[12] on; the counter wraps modulo 2^32.
void chacha20_avx2(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches);
void chacha20_avx512(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches);

}  // namespace privtuner::ring::kernels
