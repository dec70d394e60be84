#include "privtuner/ring/chacha20.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "privtuner/math/memory.hpp"

namespace privtuner::ring {
namespace {

std::uint32_t load_le32(const std::uint8_t* p) {
  return std::uint32_t{p[0]} | std::uint32_t{p[1]} << 8 | std::uint32_t{p[2]} << 16 | std::uint32_t{p[3]} << 24;
}

// Whole batches, then one batch aside for the rest when that is quicker than single blocks. Returns the blocks made.
std::size_t wide_blocks(const kernels::ChaCha20Kernel& kernel, std::uint32_t state[16], std::uint8_t* out,
                        std::size_t blocks) {
  constexpr std::size_t kSingleBlocks = 2;
  const std::size_t width = kernel.width, batches = blocks / width, rest = blocks % width;
  if (batches != 0) kernel.batches(state, out, batches);
  state[12] += static_cast<std::uint32_t>(batches * width);
  if (rest <= kSingleBlocks) return batches * width;
  std::uint8_t aside[kernels::kChaCha20MaxWidth * kChaChaBlock];
  kernel.batches(state, aside, 1);
  std::memcpy(out + batches * width * kChaChaBlock, aside, rest * kChaChaBlock);
  math::secure_wipe(aside, sizeof(aside));
  return blocks;
}

}  // namespace

void chacha20_keystream(const std::uint8_t key[32], const ChaChaNonce& nonce, std::uint32_t first_block,
                        std::uint8_t* out, std::size_t blocks, math::Isa isa) {
  constexpr std::uint64_t kCounters = std::uint64_t{1} << 32;
  if (blocks > kCounters - first_block) {
    throw std::length_error(std::to_string(blocks) + " blocks from block " + std::to_string(first_block) +
                            " pass the 2^32 blocks of one ChaCha20 nonce; use another nonce");
  }
  std::uint32_t state[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};  // "expand 32-byte k"
  for (int i = 0; i < 8; ++i) state[4 + i] = load_le32(key + 4 * i);
  state[12] = first_block;
  for (int i = 0; i < 3; ++i) state[13 + i] = load_le32(nonce.data() + 4 * i);

  const std::size_t done = wide_blocks(kernels::kernels_of(isa).chacha20, state, out, blocks);
  kernels::kernels_portable().chacha20.batches(state, out + done * kChaChaBlock, blocks - done);
  math::secure_wipe(state, sizeof(state));
}

}  // namespace privtuner::ring
