// Rows of residues, and how the blocks of a launch are laid over them.
//
// A tensor is [feature][component 2][limb][N], row `limb` modulo the prime of that number, every word below its prime.
// The primes of the chain come first, then the special ones; a switched component has `limbs` rows modulo the chain,
// then those modulo the special primes ("targets").
#pragma once

#include "modular.cuh"

// For loops over as many rows as there happen to be: two rows in flight, or one where a row fills the registers.
#if defined(__CUDACC__)
#define PT_UNROLL_TWICE _Pragma("unroll 2")
#define PT_ROLLED _Pragma("unroll 1")
#else
#define PT_UNROLL_TWICE
#define PT_ROLLED
#endif

namespace pt {

// What block x works on. Features vary fastest: blocks that run together then share the rows that features share.
struct Place {
  u32 feature;
  u64 word;  // of thread 0, the others follow; then the next `threads` words

  PT_FN Place(const Block& block, u32 features, u32 words_per_thread)
      : feature(block.x % features), word(u64{block.x / features} * block.threads * words_per_thread) {}
};

// Rows that go two ways: the first `kept` limbs of a component stay, the others are to be divided out. kept_stride:
// rows from one feature to the next; the rows to be divided out are [feature][component 2][divided].
struct SplitRows {
  u64* kept_rows;
  u64* divided_rows;
  u32 kept, kept_stride, divided;

  PT_FN u64* row(u32 feature, u32 component, u32 limb, u32 n) const {
    if (limb < kept) return kept_rows + (u64{feature} * kept_stride + u64{component} * kept + limb) * n;
    return divided_rows + ((u64{feature} * 2 + component) * divided + (limb - kept)) * n;
  }
};

// A tensor as an operand: `step` rows from one feature to the next (0: one feature serves all), `limbs` rows from one
// component to the other.
struct Operand {
  const u64* rows;
  u32 step, limbs;

  PT_FN const u64* row(u32 feature, u32 component, u32 limb, u32 n) const {
    return rows + (u64{feature} * step + u64{component} * limbs + limb) * n;
  }
};

// (a - b) w for w with its Shoup companion; a, b in [0, q), to [0, q).
PT_FN u64 subtract_multiply(const Modulus& m, u64 a, u64 b, u64 w, u64 w_shoup) {
  return m.mul_shoup(m.sub(a, b), w, w_shoup);
}

// floor(1/2 + sum) for sum >= 0, below 2^63.
PT_FN u64 rounded(double sum) { return static_cast<u64>(static_cast<i64>(0.5 + sum)); }

}  // namespace pt
