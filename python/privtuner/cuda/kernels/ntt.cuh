// Butterflies of the negacyclic transform and the rounds they are done in: 16 values in registers, up to four stages.
//
// Stages are those of Longa and Naehrig, "Speeding up the number theoretic transform" (2016): root number k is
// psi^brv(k), and the pair that starts at position p with the distance 2^h takes root (N + p) >> (h + 1).
#pragma once

#include "modular.cuh"

namespace pt {

constexpr u32 kRoundLog = 4, kRoundSize = 1 << kRoundLog;

template <class Word>
struct ModOf {
  typedef Mod64 Type;
};
template <>
struct ModOf<u32> {
  typedef Mod32 Type;
};

// The values of one thread. Indices are known to the compiler, so that they stay in registers.
template <class Word>
struct Values {
  Word at[kRoundSize];
};

// ---- butterflies: 32-bit words are in [0, q) throughout ----

PT_FN void forward_butterfly(const Mod32& mod, u32& x, u32& y, u32 w, u32 w_companion, bool) {
  const u32 u = x, v = mod.mul(y, w, w_companion);
  x = mod.add(u, v);
  y = mod.sub(u, v);
}

PT_FN u32 forward_end(const Mod32&, u32 x) { return x; }

PT_FN void inverse_butterfly(const Mod32& mod, u32& x, u32& y, u32 w, u32 w_companion) {
  const u32 u = x, v = y;
  x = mod.add(u, v);
  y = mod.mul(mod.sub(u, v), w, w_companion);
}

PT_FN void inverse_end(const Mod32& mod, u32& x, u32& y, const u32* scale) {
  const u32 u = x, v = y;
  x = mod.mul(mod.add(u, v), scale[0], scale[1]);
  y = mod.mul(mod.sub(u, v), scale[2], scale[3]);
}

// ---- butterflies of 64-bit words: q < 2^61, so words hold [0, 8q) ----

// x in [0, 8q) with `reduce`, else in [0, 6q); y any word. Gives [0, 6q) with `reduce`, else [0, 8q): every other
// stage does without.
PT_FN void forward_butterfly(const Mod64& mod, u64& x, u64& y, u64 w, u64 w_companion, bool reduce) {
  const u64 u = reduce ? Mod64::subtract_once(x, 4 * mod.q) : x;
  const u64 v = mod.mul_lazy(y, w, w_companion);  // [0, 2q)
  x = u + v;
  y = u - v + 2 * mod.q;
}

// [0, 8q) to [0, q).
PT_FN u64 forward_end(const Mod64& mod, u64 x) {
  x = Mod64::subtract_once(x, 4 * mod.q);
  return Mod64::subtract_once(Mod64::subtract_once(x, 2 * mod.q), mod.q);
}

// [0, 2q) to [0, 2q).
PT_FN void inverse_butterfly(const Mod64& mod, u64& x, u64& y, u64 w, u64 w_companion) {
  const u64 u = x, v = y;
  x = Mod64::subtract_once(u + v, 2 * mod.q);
  y = mod.mul_lazy(u - v + 2 * mod.q, w, w_companion);
}

// The last stage of the inverse, [0, 2q) to [0, q). scale: 1/N and its root over N, each with its companion; both times
// a constant where the caller wants a multiple.
PT_FN void inverse_end(const Mod64& mod, u64& x, u64& y, const u64* scale) {
  const u64 u = x, v = y;
  x = mod.mul(u + v, scale[0], scale[1]);
  y = mod.mul(u - v + 2 * mod.q, scale[2], scale[3]);
}

// ---- rounds ----

// kCount consecutive words, from an address that is a multiple of kCount words: 16 bytes at a time on a GPU.
template <u32 kCount, class Word>
PT_FN void load_roots(const Word* from, Word* to) {
#if defined(__CUDACC__)
  constexpr u32 kPer = kCount * sizeof(Word) >= 16 ? 16 / sizeof(Word) : 1;
#else
  constexpr u32 kPer = 1;
#endif
  struct alignas(kPer * sizeof(Word)) Pack {
    Word at[kPer];
  };
  PT_UNROLL for (u32 i = 0; i < kCount / kPer; ++i) {
    const Pack pack = reinterpret_cast<const Pack*>(from)[i];
    PT_UNROLL for (u32 k = 0; k < kPer; ++k) to[i * kPer + k] = pack.at[k];
  }
}

// Tables of the row's prime.
template <class Word>
struct Roots {
  const Word* values;
  const Word* companions;
};

// f(i, j, w, w_companion) for the eight pairs of level kLevel of a round: distance 8 >> kLevel, 2^kLevel roots, which
// follow root number first << kLevel.
template <u32 kLevel, class Word, class F>
PT_FN void pairs(const Roots<Word>& roots, u32 first, F f) {
  constexpr u32 kRoots = 1 << kLevel, kHalf = kRoundSize / 2 >> kLevel;
  Word w[kRoots], w_companion[kRoots];
  load_roots<kRoots>(roots.values + (first << kLevel), w);
  load_roots<kRoots>(roots.companions + (first << kLevel), w_companion);
  PT_UNROLL for (u32 k = 0; k < kRoots; ++k) {
    PT_UNROLL for (u32 i = 0; i < kHalf; ++i) f(2 * kHalf * k + i, 2 * kHalf * k + i + kHalf, w[k], w_companion[k]);
  }
}

// Levels [begin, end) of a round, largest distance first; begin <= 2. 64-bit words: [0, 8q) to [0, 8q).
template <class Word>
PT_FN void forward_round(const typename ModOf<Word>::Type& mod, Values<Word>& v, const Roots<Word>& roots, u32 first,
                         u32 begin, u32 end) {
  const auto reduced = [&](u32 i, u32 j, Word w, Word c) { forward_butterfly(mod, v.at[i], v.at[j], w, c, true); };
  const auto lazy = [&](u32 i, u32 j, Word w, Word c) { forward_butterfly(mod, v.at[i], v.at[j], w, c, false); };
  // A level may do without a reduction where the one before it did not.
  if (begin == 0) {
    pairs<0>(roots, first, reduced);
    if (end > 1) pairs<1>(roots, first, lazy);
  } else if (begin == 1) {
    pairs<1>(roots, first, reduced);
  }
  if (end > 2) pairs<2>(roots, first, reduced);
  if (end > 3) pairs<3>(roots, first, lazy);
}

// The same levels, smallest distance first; begin <= 2. 64-bit words: [0, 2q) to [0, 2q). With `last`, level 0 is the
// last stage of all and gives [0, q).
template <class Word>
PT_FN void inverse_round(const typename ModOf<Word>::Type& mod, Values<Word>& v, const Roots<Word>& roots, u32 first,
                         u32 begin, u32 end, bool last, const Word* scale) {
  const auto pair = [&](u32 i, u32 j, Word w, Word c) { inverse_butterfly(mod, v.at[i], v.at[j], w, c); };
  if (end > 3) pairs<3>(roots, first, pair);
  if (end > 2) pairs<2>(roots, first, pair);
  if (begin <= 1 && end > 1) pairs<1>(roots, first, pair);
  if (last) {
    PT_UNROLL for (u32 i = 0; i < kRoundSize / 2; ++i) inverse_end(mod, v.at[i], v.at[i + kRoundSize / 2], scale);
  } else if (begin == 0) {
    pairs<0>(roots, first, pair);
  }
}

}  // namespace pt
