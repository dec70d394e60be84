// The negacyclic transform of rows of N = 2^10 .. 2^16 words, in place, a prime per row.
//
// N <= 2^12: one block a row, the row in shared memory (the kernels `tiles`). Above, the first log N - 12 stages of the
// forward transform pair words N / 16 and more apart: `columns` does them in registers, 16 words a thread, and `tiles`
// the twelve others on stretches of 4,096 words. Each kernel reads and writes every word once. The inverse is the
// mirror image. 16 words a thread are four stages a round with 2 x 16 registers for the words, so that a tile passes
// through shared memory three times for twelve stages.
#include "ntt.cuh"

namespace pt {

// Which part of which row a block has. Row r is modulo primes[order[r % period]]; blocks that share roots, the same
// part of rows r, r + period, ..., follow each other, so that the roots are read from memory once.
struct Part {
  u64 row;
  u32 entry;  // r % period
  u32 index;  // which of the 2^log_parts parts
};

PT_FN Part part_of(const Block& block, u32 period, u32 repeats, u32 log_parts) {
  const u32 shared_by = block.x / repeats, repeat = block.x - shared_by * repeats;
  const u32 entry = shared_by >> log_parts;
  return Part{u64{repeat} * period + entry, entry, shared_by & ((1u << log_parts) - 1)};
}

// What every prime has: q, then what `prepare` multiplies by (2^64 mod q and its companion), then 1/q modulo a word.
constexpr u32 kConstants = 4;

template <class Word>
PT_FN typename ModOf<Word>::Type mod_of(const Word* constants, u32 prime) {
  return typename ModOf<Word>::Type{constants[kConstants * prime]};
}

template <class Word>
PT_FN Roots<Word> roots_of(const Word* roots, const Word* companions, u32 prime, u32 log_n) {
  return Roots<Word>{roots + (u64{prime} << log_n), companions + (u64{prime} << log_n)};
}

// Where the values of a thread lie in a tile: 2^log_stride apart.
PT_FN u32 start_of(u32 thread, u32 log_stride) {
  const u32 low = (1u << log_stride) - 1;
  return ((thread & ~low) << kRoundLog) | (thread & low);
}

// A word of padding after every 16: without it, threads whose values are consecutive would meet in a few banks.
// padded(start_of(t, s) + (i << s)) = padded(start_of(t, s)) + padded(i << s).
PT_FN u32 padded(u32 position) { return position + (position >> kRoundLog); }

// ---- columns: the stages that pair words of different tiles; 16 words a thread, N / 16 threads a row ----

template <class Word>
PT_FN void forward_columns(const Block& block, Word* words, const Word* constants, const u32* order, const Word* roots,
                           const Word* companions, u32 log_n, u32 levels, u32 period, u32 repeats, u32 log_parts) {
  const Part part = part_of(block, period, repeats, log_parts);
  const u32 prime = order[part.entry], log_stride = log_n - kRoundLog;
  const auto mod = mod_of(constants, prime);
  Word* const row = words + (part.row << log_n);
  block.own([&](unsigned t) {
    Word* const at = row + part.index * block.threads + t;
    Values<Word> v;
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) v.at[i] = at[i << log_stride];
    forward_round(mod, v, roots_of(roots, companions, prime, log_n), 1, 0, levels);
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) at[i << log_stride] = v.at[i];
  });
}

template <class Word>
PT_FN void inverse_columns(const Block& block, Word* words, const Word* constants, const u32* order, const Word* roots,
                           const Word* companions, const Word* scales, u32 scale_by_entry, u32 log_n, u32 levels,
                           u32 period, u32 repeats, u32 log_parts) {
  const Part part = part_of(block, period, repeats, log_parts);
  const u32 prime = order[part.entry], log_stride = log_n - kRoundLog;
  const auto mod = mod_of(constants, prime);
  const Word* const scale = scales + 4 * (scale_by_entry != 0 ? part.entry : prime);
  Word* const row = words + (part.row << log_n);
  block.own([&](unsigned t) {
    Word* const at = row + part.index * block.threads + t;
    Values<Word> v;
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) v.at[i] = at[i << log_stride];
    inverse_round(mod, v, roots_of(roots, companions, prime, log_n), 1, 0, levels, true, scale);
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) at[i << log_stride] = v.at[i];
  });
}

// ---- tiles: the stages within 2^log_tile consecutive words; 2^(log_tile - 4) threads and padded(2^log_tile) words of
// shared memory a block ----

template <class Word>
PT_FN void forward_tiles(const Block& block, Word* words, const Word* constants, const u32* order, const Word* roots,
                         const Word* companions, u32 log_n, u32 log_tile, u32 period, u32 repeats) {
  const Part part = part_of(block, period, repeats, log_n - log_tile);
  const u32 prime = order[part.entry];
  const auto mod = mod_of(constants, prime);
  const auto table = roots_of(roots, companions, prime, log_n);
  const u32 tile = part.index << log_tile;
  Word* const at = words + (part.row << log_n) + tile;
  Word* const shared = reinterpret_cast<Word*>(block.shared);
  PerThread<Values<Word>> values(block);

  // The first round's words come straight from memory, in the order it wants them.
  u32 log_stride = log_tile - kRoundLog, begin = 0;
  block.own([&](unsigned t) {
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) values[t].at[i] = at[(i << log_stride) + t];
  });
#pragma unroll 1  // one copy of the round, which is long
  for (;;) {
    // A thread writes where it has read: only what follows the barrier reads what others wrote.
    block.each([&](unsigned t) {
      const u32 first = (((1u << log_n) + tile) >> (log_stride + kRoundLog)) + (t >> log_stride);
      forward_round(mod, values[t], table, first, begin, kRoundLog);
      Word* const to = shared + padded(start_of(t, log_stride));
      PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) to[padded(i << log_stride)] = values[t].at[i];
    });
    if (log_stride == 0) break;
    // The last round has consecutive words, and the stages that are left.
    begin = log_stride < kRoundLog ? kRoundLog - log_stride : 0;
    log_stride = log_stride < kRoundLog ? 0 : log_stride - kRoundLog;
    block.own([&](unsigned t) {
      const Word* const from = shared + padded(start_of(t, log_stride));
      PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) values[t].at[i] = from[padded(i << log_stride)];
    });
  }
  block.own([&](unsigned t) {
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) {
      const u32 position = i * block.threads + t;
      at[position] = forward_end(mod, shared[padded(position)]);
    }
  });
}

template <class Word>
PT_FN void inverse_tiles(const Block& block, Word* words, const Word* constants, const u32* order, const Word* roots,
                         const Word* companions, const Word* scales, u32 scale_by_entry, u32 log_n, u32 log_tile,
                         u32 period, u32 repeats) {
  const Part part = part_of(block, period, repeats, log_n - log_tile);
  const u32 prime = order[part.entry];
  const auto mod = mod_of(constants, prime);
  const auto table = roots_of(roots, companions, prime, log_n);
  const Word* const scale = scales + 4 * (scale_by_entry != 0 ? part.entry : prime);
  const u32 tile = part.index << log_tile;
  Word* const at = words + (part.row << log_n) + tile;
  Word* const shared = reinterpret_cast<Word*>(block.shared);
  PerThread<Values<Word>> values(block);

  block.each([&](unsigned t) {
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) {
      const u32 position = i * block.threads + t;
      shared[padded(position)] = at[position];
    }
  });
  // The rounds of the forward transform from the last to the first.
  u32 log_stride = 0, begin = (0 - log_tile) % kRoundLog;
#pragma unroll 1  // one copy of the round, which is long
  for (;;) {
    block.own([&](unsigned t) {
      const Word* const from = shared + padded(start_of(t, log_stride));
      PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) values[t].at[i] = from[padded(i << log_stride)];
      const u32 first = (((1u << log_n) + tile) >> (log_stride + kRoundLog)) + (t >> log_stride);
      inverse_round(mod, values[t], table, first, begin, kRoundLog, log_stride + kRoundLog == log_n, scale);
    });
    if (log_stride + kRoundLog == log_tile) break;
    block.each([&](unsigned t) {
      Word* const to = shared + padded(start_of(t, log_stride));
      PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) to[padded(i << log_stride)] = values[t].at[i];
    });
    log_stride += kRoundLog - begin;
    begin = 0;
  }
  block.own([&](unsigned t) {
    PT_UNROLL for (u32 i = 0; i < kRoundSize; ++i) at[(i << log_stride) + t] = values[t].at[i];
  });
}

// ---- products by prepared factors; four words a thread ----

constexpr u32 kPerThread = 4;

PT_FN void prepare_word(const u32* constants, u32 w, u32* value, u32* companion) {
  const u32 form = Mod32{constants[0]}.mul(w, constants[1], constants[2]);
  *value = form;
  *companion = form * constants[3];
}

// floor(w 2^64 / q) = (w 2^64 - r) / q with r = w 2^64 mod q; it is below 2^64, so it equals -r / q modulo 2^64.
PT_FN void prepare_word(const u64* constants, u64 w, u64* value, u64* companion) {
  *value = w;
  *companion = (0 - Mod64{constants[0]}.mul(w, constants[1], constants[2])) * constants[3];
}

template <class Word>
PT_FN void prepare(const Block& block, const Word* words, Word* prepared, Word* prepared_companions,
                   const Word* constants, const u32* order, u32 log_n, u32 period, u32 repeats, u32 log_parts) {
  const Part part = part_of(block, period, repeats, log_parts);
  const Word* const constant = constants + kConstants * order[part.entry];
  block.own([&](unsigned t) {
    PT_UNROLL for (u32 k = 0; k < kPerThread; ++k) {
      const u64 i = (part.row << log_n) + (part.index * kPerThread + k) * block.threads + t;
      prepare_word(constant, words[i], prepared + i, prepared_companions + i);
    }
  });
}

// Row r of the words times row r % factors of what is prepared. out may be the words.
template <class Word>
PT_FN void multiply(const Block& block, const Word* words, const Word* prepared, const Word* prepared_companions,
                    Word* out, const Word* constants, const u32* order, u32 log_n, u32 period, u32 factors,
                    u32 repeats, u32 log_parts) {
  const Part part = part_of(block, factors, repeats, log_parts);
  const auto mod = mod_of(constants, order[static_cast<u32>(part.row) % period]);
  block.own([&](unsigned t) {
    PT_UNROLL for (u32 k = 0; k < kPerThread; ++k) {
      const u64 within = (part.index * kPerThread + k) * block.threads + t;
      const u64 i = (part.row << log_n) + within, j = (u64{part.entry} << log_n) + within;
      out[i] = mod.mul(words[i], prepared[j], prepared_companions[j]);
    }
  });
}

// A name per word size, as PT_KERNEL wants them.
template <class... Args>
PT_FN void ntt32_forward_columns(const Block& block, Args... args) {
  forward_columns<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt32_forward_tiles(const Block& block, Args... args) {
  forward_tiles<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt32_inverse_tiles(const Block& block, Args... args) {
  inverse_tiles<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt32_inverse_columns(const Block& block, Args... args) {
  inverse_columns<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt32_prepare(const Block& block, Args... args) {
  prepare<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt32_multiply(const Block& block, Args... args) {
  multiply<u32>(block, args...);
}
template <class... Args>
PT_FN void ntt64_forward_columns(const Block& block, Args... args) {
  forward_columns<u64>(block, args...);
}
template <class... Args>
PT_FN void ntt64_forward_tiles(const Block& block, Args... args) {
  forward_tiles<u64>(block, args...);
}
template <class... Args>
PT_FN void ntt64_inverse_tiles(const Block& block, Args... args) {
  inverse_tiles<u64>(block, args...);
}
template <class... Args>
PT_FN void ntt64_inverse_columns(const Block& block, Args... args) {
  inverse_columns<u64>(block, args...);
}
template <class... Args>
PT_FN void ntt64_prepare(const Block& block, Args... args) {
  prepare<u64>(block, args...);
}
template <class... Args>
PT_FN void ntt64_multiply(const Block& block, Args... args) {
  multiply<u64>(block, args...);
}

}  // namespace pt

PT_KERNEL(ntt32_forward_columns, 256, (pt::u32* words, const pt::u32* constants, const pt::u32* order,
                                       const pt::u32* roots, const pt::u32* companions, pt::u32 log_n, pt::u32 levels,
                                       pt::u32 period, pt::u32 repeats, pt::u32 log_parts),
          words, constants, order, roots, companions, log_n, levels, period, repeats, log_parts)

PT_KERNEL(ntt32_forward_tiles, 256, (pt::u32* words, const pt::u32* constants, const pt::u32* order,
                                     const pt::u32* roots, const pt::u32* companions, pt::u32 log_n, pt::u32 log_tile,
                                     pt::u32 period, pt::u32 repeats),
          words, constants, order, roots, companions, log_n, log_tile, period, repeats)

PT_KERNEL(ntt32_inverse_tiles, 256, (pt::u32* words, const pt::u32* constants, const pt::u32* order,
                                     const pt::u32* roots, const pt::u32* companions, const pt::u32* scales,
                                     pt::u32 scale_by_entry, pt::u32 log_n, pt::u32 log_tile, pt::u32 period,
                                     pt::u32 repeats),
          words, constants, order, roots, companions, scales, scale_by_entry, log_n, log_tile, period, repeats)

PT_KERNEL(ntt32_inverse_columns, 256, (pt::u32* words, const pt::u32* constants, const pt::u32* order,
                                       const pt::u32* roots, const pt::u32* companions, const pt::u32* scales,
                                       pt::u32 scale_by_entry, pt::u32 log_n, pt::u32 levels, pt::u32 period,
                                       pt::u32 repeats, pt::u32 log_parts),
          words, constants, order, roots, companions, scales, scale_by_entry, log_n, levels, period, repeats,
          log_parts)

PT_KERNEL(ntt32_prepare, 256, (const pt::u32* words, pt::u32* prepared, pt::u32* prepared_companions,
                               const pt::u32* constants, const pt::u32* order, pt::u32 log_n, pt::u32 period,
                               pt::u32 repeats, pt::u32 log_parts),
          words, prepared, prepared_companions, constants, order, log_n, period, repeats, log_parts)

PT_KERNEL(ntt32_multiply, 256, (const pt::u32* words, const pt::u32* prepared, const pt::u32* prepared_companions,
                                pt::u32* out, const pt::u32* constants, const pt::u32* order, pt::u32 log_n,
                                pt::u32 period, pt::u32 factors, pt::u32 repeats, pt::u32 log_parts),
          words, prepared, prepared_companions, out, constants, order, log_n, period, factors, repeats, log_parts)

// Blocks have 128 threads; 512 keeps the registers below 129, so that four of them fit a multiprocessor.
PT_KERNEL(ntt64_forward_columns, 512, (pt::u64* words, const pt::u64* constants, const pt::u32* order,
                                       const pt::u64* roots, const pt::u64* companions, pt::u32 log_n, pt::u32 levels,
                                       pt::u32 period, pt::u32 repeats, pt::u32 log_parts),
          words, constants, order, roots, companions, log_n, levels, period, repeats, log_parts)

PT_KERNEL(ntt64_forward_tiles, 256, (pt::u64* words, const pt::u64* constants, const pt::u32* order,
                                     const pt::u64* roots, const pt::u64* companions, pt::u32 log_n, pt::u32 log_tile,
                                     pt::u32 period, pt::u32 repeats),
          words, constants, order, roots, companions, log_n, log_tile, period, repeats)

PT_KERNEL(ntt64_inverse_tiles, 256, (pt::u64* words, const pt::u64* constants, const pt::u32* order,
                                     const pt::u64* roots, const pt::u64* companions, const pt::u64* scales,
                                     pt::u32 scale_by_entry, pt::u32 log_n, pt::u32 log_tile, pt::u32 period,
                                     pt::u32 repeats),
          words, constants, order, roots, companions, scales, scale_by_entry, log_n, log_tile, period, repeats)

PT_KERNEL(ntt64_inverse_columns, 512, (pt::u64* words, const pt::u64* constants, const pt::u32* order,
                                       const pt::u64* roots, const pt::u64* companions, const pt::u64* scales,
                                       pt::u32 scale_by_entry, pt::u32 log_n, pt::u32 levels, pt::u32 period,
                                       pt::u32 repeats, pt::u32 log_parts),
          words, constants, order, roots, companions, scales, scale_by_entry, log_n, levels, period, repeats,
          log_parts)

PT_KERNEL(ntt64_prepare, 256, (const pt::u64* words, pt::u64* prepared, pt::u64* prepared_companions,
                               const pt::u64* constants, const pt::u32* order, pt::u32 log_n, pt::u32 period,
                               pt::u32 repeats, pt::u32 log_parts),
          words, prepared, prepared_companions, constants, order, log_n, period, repeats, log_parts)

PT_KERNEL(ntt64_multiply, 256, (const pt::u64* words, const pt::u64* prepared, const pt::u64* prepared_companions,
                                pt::u64* out, const pt::u64* constants, const pt::u32* order, pt::u32 log_n,
                                pt::u32 period, pt::u32 factors, pt::u32 repeats, pt::u32 log_parts),
          words, prepared, prepared_companions, out, constants, order, log_n, period, factors, repeats, log_parts)
