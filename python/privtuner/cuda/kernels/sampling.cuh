// The samplers of cpp/src/ring/sampling.cpp: the same values from the same seeds, bit for bit. Keystream is ChaCha20
// (RFC 8439) with the nonce LE32(domain) || LE32(index) || LE32(sub_index); every thread makes whole 64-byte blocks.
//
// Words that are kept decide neither a branch nor an address. Words that are thrown away do, and reveal where they
// stood and how many there were, which says nothing of the others.
//
// For kernels that draw on the way, where every thread of the block takes part:
//
//   Errors (eta = 21), samples begin to begin + count of a stream, begin a multiple of 48; shared memory for 17 words
//   a keystream block, of which 48 samples take 4:
//
//     const Stream stream = stream_of(seed, kErrorDomain, feature, group);
//     const u32 blocks = binomial_blocks(count);
//     block.each([&](unsigned t) {
//       for (u32 b = t; b < blocks; b += block.threads) keystream_row(stream, begin / 48 * 4 + b, words + 17 * b);
//     });
//     ... in any later phase, by any thread: binomial_at(words, i) is sample begin + i, in [-21, 21] ...
//     wipe_shared(block, words, 17 * blocks);
//
//   Residues: draw<Word>(block, stream, out, n, mask, q, identity, shared) fills out[0, n), which may be shared memory
//   as well; out may be read after it by any thread.
#pragma once

#include "platform.cuh"

namespace pt {

constexpr u32 kMaskDomain = 0, kSecretDomain = 1, kErrorDomain = 2;
constexpr u32 kBlockBytes = 64, kBlockWords = 16;
constexpr u32 kRow = kBlockWords + 1;  // words from one block to the next in shared memory: odd, so banks differ
constexpr u32 kBinomialGroup = 48, kBinomialBlocks = 4;
constexpr i32 kBinomialEta = 21;

// One keystream.
struct Stream {
  u32 key[8];
  u32 domain, index, sub_index;
};

// seed: 8 little-endian words.
PT_FN Stream stream_of(const u32* seed, u32 domain, u32 index, u32 sub_index) {
  Stream stream;
  PT_UNROLL
  for (u32 i = 0; i < 8; ++i) stream.key[i] = seed[i];
  stream.domain = domain;
  stream.index = index;
  stream.sub_index = sub_index;
  return stream;
}

// 0 < bits < 32.
PT_FN u32 rotate_left(u32 x, u32 bits) { return x << bits | x >> (32 - bits); }

// RFC 8439, section 2.1.
PT_FN void quarter_round(u32& a, u32& b, u32& c, u32& d) {
  d = rotate_left(d ^ (a += b), 16);
  b = rotate_left(b ^ (c += d), 12);
  d = rotate_left(d ^ (a += b), 8);
  b = rotate_left(b ^ (c += d), 7);
}

// Block `counter` of a stream (RFC 8439, section 2.3).
PT_FN void chacha20_block(const Stream& stream, u32 counter, u32 (&x)[kBlockWords]) {
  constexpr u32 kConstants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};  // "expand 32-byte k"
  PT_UNROLL
  for (u32 i = 0; i < 4; ++i) x[i] = kConstants[i];
  PT_UNROLL
  for (u32 i = 0; i < 8; ++i) x[4 + i] = stream.key[i];
  x[12] = counter;
  x[13] = stream.domain;
  x[14] = stream.index;
  x[15] = stream.sub_index;
  for (u32 round = 0; round < 20; round += 2) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  PT_UNROLL
  for (u32 i = 0; i < 4; ++i) x[i] += kConstants[i];
  PT_UNROLL
  for (u32 i = 0; i < 8; ++i) x[4 + i] += stream.key[i];
  x[12] += counter;
  x[13] += stream.domain;
  x[14] += stream.index;
  x[15] += stream.sub_index;
}

// The same to one row of shared memory, where block b of a run lies from word 17 b on: threads that write a block each,
// and threads that read words side by side, then meet no two in one bank (but for one pair).
PT_FN void keystream_row(const Stream& stream, u32 counter, u32* row) {
  u32 x[kBlockWords];
  chacha20_block(stream, counter, x);
  PT_UNROLL
  for (u32 i = 0; i < kBlockWords; ++i) row[i] = x[i];
}

// Word i of a run of blocks: one word is left out behind every sixteen.
PT_FN u32 row_word(const u32* rows, u32 i) { return rows[i + i / kBlockWords]; }

// Zeros over secret words in shared memory; written even though nobody reads them. Ends in a barrier, and needs one
// behind the last use.
PT_FN void wipe_shared(const Block& block, u32* words, u32 count) {
  block.each([&](unsigned t) {
    volatile u32* const wiped = words;
    for (u32 i = t; i < count; i += block.threads) wiped[i] = 0;
  });
}

// Centred binomial samples.

// Without a table.
PT_FN i32 count_ones(u32 x) {
#if defined(__CUDACC__)
  return __popc(x);
#else
  x -= (x >> 1) & 0x55555555;
  x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
  return static_cast<i32>((((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101) >> 24);
#endif
}

// Keystream blocks behind `count` samples, the first of which begins a group of 48.
PT_FN u32 binomial_blocks(u32 count) { return (count + kBinomialGroup - 1) / kBinomialGroup * kBinomialBlocks; }

// Sample i, in [-21, 21], of the groups whose blocks stand in `rows` (as keystream_row puts them). Of its group's words
// it counts one whole, and ten bits of one that three samples share.
PT_FN i32 binomial_at(const u32* rows, u32 i) {
  const u32 group = i / kBinomialGroup, place = i % kBinomialGroup;
  const u32 own = row_word(rows, 64 * group + place), common = row_word(rows, 64 * group + 48 + place % 16);
  return count_ones(own) + count_ones(common & (0x3ffu << (10 * (place / 16)))) - kBinomialEta;
}

// Uniform samples, by rejection.

// Whether any thread's value is not zero; a barrier.
PT_FN bool any_thread(const Block& block, PerThread<u32>& value) {
#if defined(__CUDACC__)
  return __syncthreads_or(static_cast<int>(value[threadIdx.x])) != 0;
#else
  u32 all = 0;
  for (unsigned t = 0; t < block.threads; ++t) all |= value[t];
  return all != 0;
#endif
}

// Replaces every thread's value by the sum of those of the threads before it; returns the sum of all. shared: two words
// a thread. The sums of 2, 4, 8 .. neighbours, one after the other (Hillis, Steele, 1986).
PT_FN u32 sums_before(const Block& block, PerThread<u32>& value, u32* shared) {
  u32 *from = shared, *to = shared + block.threads;
  block.each([&](unsigned t) { from[t] = value[t]; });
  for (u32 step = 1; step < block.threads; step *= 2) {
    block.each([&](unsigned t) { to[t] = from[t] + (t >= step ? from[t - step] : 0); });
    u32* const last = to;
    to = from;
    from = last;
  }
  const u32 total = from[block.threads - 1];
  block.each([&](unsigned t) { value[t] = from[t] - value[t]; });
  return total;
}

// Word number i of consecutive keystream, little-endian, given its 32-bit words.
template <class Word, class Words>
PT_FN Word word_at(u32 i, Words words) {
  if constexpr (sizeof(Word) == 8) {
    return words(2 * i) | static_cast<u64>(words(2 * i + 1)) << 32;
  } else if constexpr (sizeof(Word) == 4) {
    return words(i);
  } else {
    static_assert(sizeof(Word) == 1, "words have 1, 4 or 8 bytes");
    return static_cast<Word>(words(i / 4) >> (8 * (i % 4)));
  }
}

// Bytes of shared memory that draw takes.
PT_FN u32 draw_bytes(u32 threads) { return (kRow + kBlockWords + 2) * 4 * threads; }

struct BlockOfWords {
  u32 words[kBlockWords];
};

struct Identity {
  template <class Word>
  PT_FN Word operator()(Word word) const {
    return word;
  }
};

// out[i] = map(sample i), i < n, of samples uniform in [0, q). Sample i is keystream word i, masked; words >= q are
// replaced, in order of i, by the next ones < q from the first whole block behind those n on.
// mask: q's bit length of ones; q >= 2. shared: draw_bytes(threads), aligned to 8 bytes. Ends in a barrier.
// A tile is as many keystream blocks as there are threads. Where a tile has words to replace, their places are counted
// in order, and so are the words that will do of further blocks, made as they are needed.
template <class Word, class Out, class Map>
PT_FN void draw(const Block& block, const Stream& stream, Out* out, u32 n, Word mask, Word q, Map map, u32* shared) {
  constexpr u32 kWords = kBlockBytes / sizeof(Word);  // of a block
  const u32 tile = kWords * block.threads;
  Word* const list = reinterpret_cast<Word*>(shared);  // replacements in order, a tile's worth
  u32* const rows = shared + kBlockWords * block.threads;
  u32* const sums = rows + kRow * block.threads;
  const auto masked = [&](u32 i) {
    return static_cast<Word>(word_at<Word>(i, [&](u32 word) { return row_word(rows, word); }) & mask);
  };

  u32 next_block = (n + kWords - 1) / kWords;  // for replacements
  u32 used = 0, listed = 0;                    // of the list
  PerThread<u32> rejected(block), accepted(block);
  for (u32 begin = 0; begin < n; begin += tile) {
    const u32 count = n - begin < tile ? n - begin : tile;
    block.each([&](unsigned t) {
      if (t * kWords < count) keystream_row(stream, begin / kWords + t, rows + kRow * t);
    });
    block.own([&](unsigned t) {
      u32 found = 0;
      for (u32 i = t; i < count; i += block.threads) {
        const Word word = masked(i);
        found |= static_cast<u32>(word >= q);
        out[begin + i] = map(word);
      }
      rejected[t] = found;
    });
    if (!any_thread(block, rejected)) continue;

    block.own([&](unsigned t) {
      u32 found = 0;
      for (u32 i = t * kWords; i < (t + 1) * kWords && i < count; ++i) found += static_cast<u32>(masked(i) >= q);
      rejected[t] = found;
    });
    const u32 missing = sums_before(block, rejected, sums);
    for (u32 done = 0; done < missing;) {
      if (used == listed) {
        // Half of all words will do, or more; and one thread of a warp costs what all of them do.
        const u32 half = 2 * (missing - done) / kWords, wanted = half > kWarp ? half : kWarp;
        const u32 blocks = wanted < block.threads ? wanted : block.threads;
        PerThread<BlockOfWords> made(block);
        block.own([&](unsigned t) {
          u32 found = 0;
          if (t < blocks) {
            chacha20_block(stream, next_block + t, made[t].words);
            PT_UNROLL
            for (u32 i = 0; i < kWords; ++i) {
              const Word word = word_at<Word>(i, [&](u32 k) { return made[t].words[k]; });
              found += static_cast<u32>((word & mask) < q);
            }
          }
          accepted[t] = found;
        });
        next_block += blocks;
        listed = sums_before(block, accepted, sums);
        used = 0;
        block.each([&](unsigned t) {
          u32 at = accepted[t];
          if (t < blocks) {
            PT_UNROLL
            for (u32 i = 0; i < kWords; ++i) {
              const Word word = word_at<Word>(i, [&](u32 k) { return made[t].words[k]; }) & mask;
              if (word < q) list[at++] = word;
            }
          }
        });
      }
      const u32 take = missing - done < listed - used ? missing - done : listed - used;
      block.each([&](unsigned t) {
        u32 order = rejected[t];  // of the next word to be replaced
        for (u32 i = t * kWords; i < (t + 1) * kWords && i < count; ++i) {
          if (masked(i) < q) continue;
          if (order >= done && order < done + take) out[begin + i] = map(list[used + (order - done)]);
          ++order;
        }
      });
      done += take;
      used += take;
    }
  }
}

}  // namespace pt
