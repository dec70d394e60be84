// Vector operations that the kernels are written in: a templated loop takes an Ops type, one register width of one
// instruction set (Simd256, Simd512), so that another set is one more such type. Included, like the types themselves,
// by the kernels' files alone: everything has internal linkage, as each file compiles it for another instruction set.
//
// An Ops type gives, all static:
//   Vec, Real             a register of bits; of doubles. kBytes of them, kRegisters of them in the processor
//   load, store           kBytes at any address; all32, all64, all_real: one value everywhere
//   bit_and, bit_xor
//   on words of 32 bits   add32, sub32, multiply32 (low halves), rotate_left32<bits>
//     subtract_modulo32   a - b, plus q where a < b
//     odd32               the odd words, each also at the even place below it (what is at odd places is not read)
//     multiply_even       the products of 64 bits of the even words
//     high_halves         of two rows of such products, of even and of odd words: all high halves in order
//     transpose_quads     four registers as 4 x 4 words in every 128 bits
//     permute32           word i of the result is word places[i]
//     store_quads         four registers x: piece p of 128 bits of x[0], x[1], x[2], x[3] to out + 64 stride p, in a
//     row byte_counts         the number of set bits of every byte; add8; add_bytes(sums, x): plus the four bytes of a
//     word store_low_bytes     the low byte of the 16 words in 64 / kBytes registers
//   on words of 64 bits   add64, sub64, shift_right64<bits>
//     subtract_once64     from [0, 2 bound) to [0, bound), bound < 2^63
//     add_if_negative64   from [-q, q) to [0, q)
//     Multiplier          a word made ready by multiplier(w) for products_difference(x, w, y, v) = x w - y v mod 2^64
//   not_below(Word, ...)  one bit for every word of x that is >= bound
//   on doubles            add, sub, mul; fma, fms, fnma: a b + c, a b - c, c - a b, rounded once
//     bits_of, from_bits  the same register, of doubles and of bits
//     real                of words below 2^52; signed_words of integers, |x| < 2^51; floor_words of 0 <= x < 2^51
//   Pairs<Word>           the order of words in two registers for close butterflies, see PerfectShuffle
#pragma once

#include <cstddef>
#include <cstdint>

#define PRIVTUNER_INLINE inline __attribute__((always_inline))

namespace privtuner::simd {
namespace {

// Adding the shift leaves an integer below 2^51, or the integer next to a number, in the low bits of the sum.
constexpr double kTwo52 = 4503599627370496.0, kRoundingShift = 1.5 * kTwo52;

constexpr int log2_of(std::size_t x) { return x == 1 ? 0 : 1 + log2_of(x / 2); }

// Butterflies between words 1, 2, 4, ... apart in two registers: split<s> before stage s brings the two words of each
// butterfly to the same lane of the two registers; join<s> undoes it; split<kStages> leads back to order. arrange<s>
// loads the factors of a pair, kLanes >> s of them, each to the lanes of its butterflies.
//
// Here all splits are one: a butterfly of stage s joins words whose numbers differ in bit s, the shuffle moves bit s to
// the register, and after kStages the numbers are back in order. Ops gives even_words and odd_words of two registers,
// their inverses low_mixed and high_mixed, and repeat<bytes>, which fills a register with a few bytes.
template <class Ops, class Word>
struct PerfectShuffle {
  using Vec = typename Ops::Vec;
  static constexpr int kStages = log2_of(2 * Ops::kBytes / sizeof(Word));

  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    if constexpr (stage == kStages) return;
    const Vec even = Ops::even_words(Word{}, a, b), odd = Ops::odd_words(Word{}, a, b);
    a = even;
    b = odd;
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& a, Vec& b) {
    if constexpr (stage == kStages) return;
    const Vec low = Ops::low_mixed(Word{}, a, b), high = Ops::high_mixed(Word{}, a, b);
    a = low;
    b = high;
  }
  template <int stage>
  static PRIVTUNER_INLINE Vec arrange(const Word* p) {
    return Ops::template repeat<(Ops::kBytes >> stage)>(p);
  }
};

}  // namespace
}  // namespace privtuner::simd
