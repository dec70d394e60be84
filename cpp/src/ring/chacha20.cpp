#include "privtuner/ring/chacha20.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "chacha20_kernels.hpp"
#include "privtuner/math/memory.hpp"

namespace privtuner::ring {
namespace {

std::uint32_t load_le32(const std::uint8_t* p) {
  return std::uint32_t{p[0]} | std::uint32_t{p[1]} << 8 | std::uint32_t{p[2]} << 16 | std::uint32_t{p[3]} << 24;
}

void store_le32(std::uint8_t* p, std::uint32_t x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<std::uint8_t>(x >> (8 * i));
}

std::uint32_t rotate_left(std::uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

// RFC 8439, section 2.1.
void quarter_round(std::uint32_t& a, std::uint32_t& b, std::uint32_t& c, std::uint32_t& d) {
  d = rotate_left(d ^ (a += b), 16);
  b = rotate_left(b ^ (c += d), 12);
  d = rotate_left(d ^ (a += b), 8);
  b = rotate_left(b ^ (c += d), 7);
}

// RFC 8439, section 2.3.
void block_portable(const std::uint32_t state[16], std::uint8_t* out) {
  std::uint32_t x[16];
  std::memcpy(x, state, sizeof(x));
  for (int round = 0; round < 20; round += 2) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 16; ++i) store_le32(out + 4 * i, x[i] + state[i]);
}

#if defined(PRIVTUNER_HAVE_AVX2) || defined(PRIVTUNER_HAVE_AVX512)

using Kernel = void (*)(const std::uint32_t*, std::uint8_t*, std::size_t);

// Whole batches, then one batch aside for the rest when that is quicker than single blocks. Returns the blocks made.
std::size_t wide_blocks(Kernel kernel, std::size_t width, std::uint32_t state[16], std::uint8_t* out,
                        std::size_t blocks) {
  constexpr std::size_t kSingleBlocks = 2;
  const std::size_t batches = blocks / width, rest = blocks % width;
  if (batches != 0) kernel(state, out, batches);
  state[12] += static_cast<std::uint32_t>(batches * width);
  if (rest <= kSingleBlocks) return batches * width;
  std::uint8_t aside[kernels::kAvx512Width * kChaChaBlock];
  kernel(state, aside, 1);
  std::memcpy(out + batches * width * kChaChaBlock, aside, rest * kChaChaBlock);
  math::secure_wipe(aside, sizeof(aside));
  return blocks;
}

#endif

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

  std::size_t done = 0;
  switch (isa) {
#if defined(PRIVTUNER_HAVE_AVX512)
    case math::Isa::amx:
    case math::Isa::avx512ifma:
    case math::Isa::avx512:
      done = wide_blocks(kernels::chacha20_avx512, kernels::kAvx512Width, state, out, blocks);
      break;
#endif
#if defined(PRIVTUNER_HAVE_AVX2)
    case math::Isa::avx2:
      done = wide_blocks(kernels::chacha20_avx2, kernels::kAvx2Width, state, out, blocks);
      break;
#endif
    default:
      break;
  }
  for (; done < blocks; ++done, ++state[12]) block_portable(state, out + done * kChaChaBlock);
  math::secure_wipe(state, sizeof(state));
}

}  // namespace privtuner::ring
