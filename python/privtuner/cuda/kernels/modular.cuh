// Arithmetic modulo a prime. Every function says what range it takes and gives; none branches on its operands (a
// conditional is one instruction that selects), so that words may be secret.
#pragma once

#include "platform.cuh"

namespace pt {

// High half of the product.
PT_FN u64 mul_high(u64 a, u64 b) {
#if defined(__CUDACC__)
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<u64>((static_cast<Wide>(a) * b) >> 64);
#endif
}

PT_FN u32 mul_high(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }

// A 128-bit unsigned number, for sums of products that are reduced once. Wide{0, 0} is zero.
struct Wide {
  u64 low, high;
};

// sum + a b modulo 2^128: exact for up to 2^(128 - x - y) products of words below 2^x and 2^y.
PT_FN Wide add_product(Wide sum, u64 a, u64 b) {
  const u64 low = sum.low + a * b;
  return Wide{low, sum.high + mul_high(a, b) + (low < sum.low ? 1 : 0)};
}

// A 32-bit prime q < 2^32. Values are in [0, q) throughout: q may use the top bit, so nothing lazy fits the word.
struct Mod32 {
  u32 q;

  // a, b in [0, q) to [0, q).
  PT_FN u32 add(u32 a, u32 b) const { return sub(a, q - b); }
  // a in [0, q), b in [0, q] to [0, q).
  PT_FN u32 sub(u32 a, u32 b) const {
    const u32 r = a - b;
    return a < b ? r + q : r;
  }
  // a in [0, q) to [0, q).
  PT_FN u32 neg(u32 a) const { return sub(0, a); }
  // a w, in [0, q), for w in Montgomery form (w 2^32 mod q, with that times q^-1 modulo 2^32 as its companion); a any
  // word (Montgomery, 1985). The low halves of the two products agree, so they cancel.
  PT_FN u32 mul(u32 a, u32 w, u32 w_companion) const { return sub(mul_high(a, w), mul_high(a * w_companion, q)); }
};

// A 64-bit prime q < 2^61 where values may stay unreduced: lazy ranges after Harvey, "Faster arithmetic for
// number-theoretic transforms" (2014). Words below 8q fit.
struct Mod64 {
  u64 q;

  // x in [0, 2 bound) to [0, bound); bound <= 2^63.
  PT_FN static u64 subtract_once(u64 x, u64 bound) {
    const u64 r = x - bound;
    return static_cast<i64>(r) < 0 ? x : r;
  }
  // a w, in [0, 2q), for w in [0, q) with its Shoup companion floor(w 2^64 / q); a any word.
  PT_FN u64 mul_lazy(u64 a, u64 w, u64 w_companion) const {
    return a * w + mul_high(a, w_companion) * (0 - q);  // a sum: two multiply-adds, no subtraction
  }
  // The same, in [0, q).
  PT_FN u64 mul(u64 a, u64 w, u64 w_companion) const { return subtract_once(mul_lazy(a, w, w_companion), q); }
};

// The constants of an odd prime q in (2, 2^61), in this order. Functions take words in [0, q) and give [0, q) unless
// they say otherwise.
struct Modulus {
  u64 q;
  u64 two64;        // 2^64 mod q
  u64 two64_shoup;  // floor(two64 2^64 / q)
  u64 one_shoup;    // floor(2^64 / q)

  PT_FN u64 add(u64 a, u64 b) const { return add_if_negative(a + b - q); }
  PT_FN u64 sub(u64 a, u64 b) const { return add_if_negative(a - b); }
  PT_FN u64 neg(u64 a) const { return add_if_negative(0 - a); }

  // x any word.
  PT_FN u64 reduce(u64 x) const { return Mod64::subtract_once(x + mul_high(x, one_shoup) * (0 - q), q); }
  // x any signed word: x + 2^63 as an unsigned word, less 2^63 = two64 / 2 mod q (two64 is even or two64 + q is).
  PT_FN u64 reduce_signed(i64 x) const {
    const u64 half = (two64 + (q & (0 - (two64 & 1)))) / 2;
    return sub(reduce(static_cast<u64>(x) ^ (u64{1} << 63)), half);
  }
  // x any 128-bit number.
  PT_FN u64 reduce_wide(Wide x) const { return add(mul_shoup(x.high, two64, two64_shoup), reduce(x.low)); }

  PT_FN u64 mul(u64 a, u64 b) const { return reduce_wide(Wide{a * b, mul_high(a, b)}); }
  // a w for w with w_shoup = floor(w 2^64 / q); a any word.
  PT_FN u64 mul_shoup(u64 a, u64 w, u64 w_shoup) const { return Mod64{q}.mul(a, w, w_shoup); }

  // x in [-q, q) as a two's complement word.
  PT_FN u64 add_if_negative(u64 x) const { return static_cast<i64>(x) < 0 ? x + q : x; }
};

// Modulus number `index` of a table of four words each.
PT_FN Modulus load_modulus(const u64* moduli, u32 index) {
  const u64* const m = moduli + u64{4} * index;
  return Modulus{m[0], m[1], m[2], m[3]};
}

}  // namespace pt
