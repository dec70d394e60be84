// Streams to device memory: a thread block a row.
#include "sampling.cuh"

namespace pt {

// Row r: the stream (domain, first + r / subs, sub_indices[r % subs]) modulo moduli[r % moduli_count].
template <class Word>
PT_FN void uniform(const Block& block, Word* out, const u32* seed, const u32* sub_indices, const Word* moduli,
                   u32 moduli_count, u32 subs, u32 domain, u32 first, u32 n) {
  const Stream stream = stream_of(seed, domain, first + block.x / subs, sub_indices[block.x % subs]);
  const Word q = moduli[block.x % moduli_count];
  Word mask = q;
  for (u32 shift = 1; shift < 8 * sizeof(Word); shift *= 2) mask |= mask >> shift;
  draw(block, stream, out + static_cast<u64>(block.x) * n, n, mask, q, Identity{},
       reinterpret_cast<u32*>(block.shared));
}

PT_FN void uniform32(const Block& block, u32* out, const u32* seed, const u32* sub_indices, const u32* moduli,
                     u32 moduli_count, u32 subs, u32 domain, u32 first, u32 n) {
  uniform(block, out, seed, sub_indices, moduli, moduli_count, subs, domain, first, n);
}

PT_FN void uniform64(const Block& block, u64* out, const u32* seed, const u32* sub_indices, const u64* moduli,
                     u32 moduli_count, u32 subs, u32 domain, u32 first, u32 n) {
  uniform(block, out, seed, sub_indices, moduli, moduli_count, subs, domain, first, n);
}

// The residue of a byte below 255 modulo 3, minus 1.
struct Ternary {
  PT_FN i8 operator()(u8 byte) const {
    const u32 third = byte * 171u >> 9;  // floor(byte / 3) for every byte, without a division
    return static_cast<i8>(static_cast<i32>(byte - 3 * third) - 1);
  }
};

// Row r: the stream (secret, first + r, 0).
PT_FN void ternary(const Block& block, i8* out, const u32* seed, u32 first, u32 n) {
  u32* const shared = reinterpret_cast<u32*>(block.shared);
  const Stream stream = stream_of(seed, kSecretDomain, first + block.x, 0);
  const u8 limit = 255;  // the one byte beyond 85 times {0, 1, 2}
  draw(block, stream, out + static_cast<u64>(block.x) * n, n, limit, limit, Ternary{}, shared);
  wipe_shared(block, shared, draw_bytes(block.threads) / 4);
}

// Row r: the stream (error, first + r / subs, sub_indices[r % subs]). Of a row, tile block.x % tiles: threads / 4
// groups.
PT_FN void binomial(const Block& block, i8* out, const u32* seed, const u32* sub_indices, u32 subs, u32 tiles,
                    u32 first, u32 n) {
  u32* const rows = reinterpret_cast<u32*>(block.shared);
  const u32 row = block.x / tiles, tile = block.x % tiles, size = block.threads / kBinomialBlocks * kBinomialGroup;
  const u32 begin = tile * size, count = n - begin < size ? n - begin : size;
  const Stream stream = stream_of(seed, kErrorDomain, first + row / subs, sub_indices[row % subs]);
  const u32 blocks = binomial_blocks(count);
  i8* const to = out + static_cast<u64>(row) * n + begin;
  block.each([&](unsigned t) {
    if (t < blocks) keystream_row(stream, tile * block.threads + t, rows + kRow * t);
  });
  block.each([&](unsigned t) {
    for (u32 i = t; i < count; i += block.threads) to[i] = static_cast<i8>(binomial_at(rows, i));
  });
  wipe_shared(block, rows, kRow * blocks);
}

}  // namespace pt

PT_KERNEL(uniform32, 128, (pt::u32* out, const pt::u32* seed, const pt::u32* sub_indices, const pt::u32* moduli,
                           pt::u32 moduli_count, pt::u32 subs, pt::u32 domain, pt::u32 first, pt::u32 n),
          out, seed, sub_indices, moduli, moduli_count, subs, domain, first, n)

PT_KERNEL(uniform64, 128, (pt::u64* out, const pt::u32* seed, const pt::u32* sub_indices, const pt::u64* moduli,
                           pt::u32 moduli_count, pt::u32 subs, pt::u32 domain, pt::u32 first, pt::u32 n),
          out, seed, sub_indices, moduli, moduli_count, subs, domain, first, n)

PT_KERNEL(ternary, 128, (pt::i8* out, const pt::u32* seed, pt::u32 first, pt::u32 n), out, seed, first, n)

PT_KERNEL(binomial, 256, (pt::i8* out, const pt::u32* seed, const pt::u32* sub_indices, pt::u32 subs, pt::u32 tiles,
                          pt::u32 first, pt::u32 n),
          out, seed, sub_indices, subs, tiles, first, n)
