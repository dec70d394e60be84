// The butterflies of the vector NTTs: Lanes types for ntt_passes.hpp from the operations of an instruction set.
// Included by the kernels' files alone; internal linkage.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Ops, class WordType>
struct Words {
  using Word = WordType;
  using Vec = typename Ops::Vec;
  using Pairs = typename Ops::template Pairs<Word>;
  static constexpr std::size_t kLanes = Ops::kBytes / sizeof(Word);
  static constexpr int kPairStages = Pairs::kStages;

  static constexpr bool kEnters = false;

  static PRIVTUNER_INLINE Vec load(const Word* p) { return Ops::load(p); }
  static PRIVTUNER_INLINE Vec enter(const Word* p) { return Ops::load(p); }
  static PRIVTUNER_INLINE void store(Word* p, Vec x) { Ops::store(p, x); }
  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    Pairs::template split<stage>(a, b);
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& a, Vec& b) {
    Pairs::template join<stage>(a, b);
  }
  static PRIVTUNER_INLINE Vec settle(Vec x) { return x; }  // where every butterfly keeps to its range
};

// 32-bit words in [0, q) throughout: q may use the top bit, so nothing lazy fits. Borrows are found by comparing.
template <class Ops>
struct Word32 : Words<Ops, std::uint32_t> {
  using Base = Words<Ops, std::uint32_t>;
  using typename Base::Pairs, typename Base::Vec, typename Base::Word;
  // Montgomery form w and companion w q^-1; w once more with the odd words in even places, where multiply_even reads.
  struct Factor {
    Vec w, w_odd, companion;
  };
  static constexpr std::size_t kBlock = Ops::kRegisters / 4;

  Vec q;
  explicit Word32(Word modulus) : q(Ops::all32(modulus)) {}

  static PRIVTUNER_INLINE Factor factor_of(Word w, Word companion) {
    const Vec all = Ops::all32(w);
    return {all, all, Ops::all32(companion)};
  }
  static PRIVTUNER_INLINE Factor broadcast(const NttView<Word>& ntt, std::size_t k) {
    return factor_of(ntt.roots[k], ntt.companions[k]);
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const NttView<Word>& ntt, std::size_t k) {
    const Vec all = Pairs::template arrange<stage>(ntt.roots + k);
    const bool one = stage == Pairs::kStages - 1;  // the same word everywhere
    return {all, one ? all : Ops::odd32(all), Pairs::template arrange<stage>(ntt.companions + k)};
  }

  PRIVTUNER_INLINE Vec sub(Vec a, Vec b) const { return Ops::subtract_modulo32(a, b, q); }
  PRIVTUNER_INLINE Vec add(Vec a, Vec b) const { return sub(a, Ops::sub32(q, b)); }  // q - b in [1, q]
  // x w for x any word. The low halves of x w and m q agree, so the high halves' difference is exact, in (-q, q).
  PRIVTUNER_INLINE Vec multiply(Vec x, const Factor& f) const {
    const Vec m = Ops::multiply32(x, f.companion);
    const Vec product = Ops::high_halves(Ops::multiply_even(x, f.w), Ops::multiply_even(Ops::odd32(x), f.w_odd));
    const Vec multiple = Ops::high_halves(Ops::multiply_even(m, q), Ops::multiply_even(Ops::odd32(m), q));
    return sub(product, multiple);
  }
  PRIVTUNER_INLINE Vec multiply_in_order(Vec x, const Word* w, const Word* companion) const {
    const Vec words = Ops::load(w);
    return multiply(x, {words, Ops::odd32(words), Ops::load(companion)});
  }

  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = multiply(v, f);
    v = sub(u, t);
    u = add(u, t);
  }
  template <bool>
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = sub(u, v);
    u = add(u, v);
    v = multiply(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    inverse_butterfly<true>(u, v, last_root);
    u = multiply(u, n_inverse);
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return x; }
};

// 64-bit words, lazily, in Harvey's ranges: between stages forward in [0, 2 bound), inverse in [0, bound). Product
// gives the bound, mul_lazy and reduce from [0, bound) to [0, q), and its Factor from that of a word and its companion.
template <class Ops, class Product>
struct LazyWords : Words<Ops, std::uint64_t>, Product {
  using Base = Words<Ops, std::uint64_t>;
  using Product::bound, Product::factor, Product::mul_lazy, Product::reduce;
  using typename Base::Pairs, typename Base::Vec, typename Base::Word, typename Product::Factor;
  static_assert(Product::kBlock % 2 == 0);

  using Product::Product;

  static PRIVTUNER_INLINE Factor factor_of(Word w, Word companion) {
    return factor(Ops::all64(w), Ops::all64(companion));
  }
  static PRIVTUNER_INLINE Factor broadcast(const NttView<Word>& ntt, std::size_t k) {
    return factor_of(ntt.roots[k], ntt.companions[k]);
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const NttView<Word>& ntt, std::size_t k) {
    return factor(Pairs::template arrange<stage>(ntt.roots + k), Pairs::template arrange<stage>(ntt.companions + k));
  }

  PRIVTUNER_INLINE Vec multiply(Vec x, const Factor& f) const { return reduce(mul_lazy(x, f)); }
  PRIVTUNER_INLINE Vec multiply_in_order(Vec x, const Word* w, const Word* companion) const {
    return multiply(x, factor(Ops::load(w), Ops::load(companion)));
  }
  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec s = Ops::subtract_once64(u, bound), t = mul_lazy(v, f);  // both below the bound
    u = Ops::add64(s, t);
    v = Ops::add64(Ops::sub64(s, t), bound);
  }
  template <bool>
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = Ops::add64(Ops::sub64(u, v), bound);  // (0, 2 bound)
    u = Ops::subtract_once64(Ops::add64(u, v), bound);
    v = mul_lazy(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    const Vec sum = Ops::add64(u, v), difference = Ops::add64(Ops::sub64(u, v), bound);
    u = multiply(sum, n_inverse);
    v = multiply(difference, last_root);
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return reduce(Ops::subtract_once64(x, bound)); }
};

// q < 2^61. The bound is 4 q, Harvey's doubled, because the quotient leaves out the product of the low halves.
template <class Ops>
struct Product64 {
  using Vec = typename Ops::Vec;
  struct Factor {
    typename Ops::Multiplier w;
    Vec companion, companion_high;  // companion floor(w 2^64 / q)
  };
  static constexpr std::size_t kBlock = Ops::kRegisters / 4;

  Vec q, q2, bound;
  typename Ops::Multiplier multiplier_q;
  explicit Product64(std::uint64_t modulus)
      : q(Ops::all64(modulus)),
        q2(Ops::all64(2 * modulus)),
        bound(Ops::all64(4 * modulus)),
        multiplier_q(Ops::multiplier(q)) {}

  static PRIVTUNER_INLINE Factor factor(Vec w, Vec companion) {
    return {Ops::multiplier(w), companion, Ops::template shift_right64<32>(companion)};
  }
  // [0, 4q), for x any word: the quotient falls short of Shoup's by at most 2, as two carries are lost.
  PRIVTUNER_INLINE Vec mul_lazy(Vec x, const Factor& f) const {
    const Vec x_high = Ops::template shift_right64<32>(x);
    const Vec middle = Ops::add64(Ops::template shift_right64<32>(Ops::multiply_even(x, f.companion_high)),
                                  Ops::template shift_right64<32>(Ops::multiply_even(x_high, f.companion)));
    const Vec quotient = Ops::add64(Ops::multiply_even(x_high, f.companion_high), middle);
    return Ops::products_difference(x, f.w, quotient, multiplier_q);
  }
  PRIVTUNER_INLINE Vec reduce(Vec x) const { return Ops::subtract_once64(Ops::subtract_once64(x, q2), q); }
};

// q < 2^50, by products of 52-bit words. The bound is 2 q, so that every factor fits the 52 bits that the products
// read.
template <class Ops>
struct Product52 {
  using Vec = typename Ops::Vec;
  struct Factor {
    Vec w, companion;  // companion floor(w 2^52 / q)
  };
  static constexpr std::size_t kBlock =
      Ops::kRegisters / 2;  // a factor takes two registers alone: the rest hold it all
  static constexpr std::uint64_t kTwo52 = std::uint64_t{1} << 52;

  Vec q, bound, minus_q;  // minus_q modulo 2^52
  explicit Product52(std::uint64_t modulus)
      : q(Ops::all64(modulus)), bound(Ops::all64(2 * modulus)), minus_q(Ops::all64(kTwo52 - modulus)) {}

  // From the companion floor(w 2^64 / q).
  static PRIVTUNER_INLINE Factor factor(Vec w, Vec companion) {
    return {w, Ops::template shift_right64<12>(companion)};
  }
  // [0, 2q), for x below 2^52: Shoup's quotient is at most one short.
  PRIVTUNER_INLINE Vec mul_lazy(Vec x, const Factor& f) const {
    const Vec zero = Ops::all64(0);
    const Vec quotient = Ops::add_high52(zero, x, f.companion);
    const Vec difference = Ops::add_low52(Ops::add_low52(zero, x, f.w), quotient, minus_q);
    return Ops::bit_and(difference, Ops::all64(kTwo52 - 1));  // it is known modulo 2^52
  }
  PRIVTUNER_INLINE Vec reduce(Vec x) const { return Ops::subtract_once64(x, q); }
};

// q < 2^50, through doubles, for processors without integer products of 52-bit words. Between stages a register holds
// doubles that are integers, B q at most in size.
//
// Why this is exact. Let |w| <= q / 2, the quotient w / q with an error of 2^-52 of itself, and |x| < 4 q: then
// |x w / q| < 2 q < 2^51, so c, the product x w / q added to 1.5 2^52 and rounded, is an integer, off x w / q by less
// than 1/2 + 2^-52 |x w / q| <= 1/2 + B / 8. h = round(x w) and l = x w - h are doubles, |l| < 2^48; x w - c q is below
// q in size, so h - c q is an integer below 2^53 and a double, and so is h - c q + l. The product is thus below
// (1/2 + B / 8) q; settled numbers are below (1/2 + 2^-49) q.
//
//   forward: of two stages the first takes settled upper halves and leaves 1 + B / 8, the second 9/8 of that and 1/2
//     more: starting at 1, B stays below 1.9. The pairs' stages, four at most, start likewise and lead from 1.9
//     to 1.24, 1.9, 2.63 and 3.46.
//   inverse: starting at B <= 1, the first of two stages leaves sums of 2 and products of 3/4; the second one's sums
//   are
//     settled and its products 1/2 + 4 / 8 at most. With q < 2^50 that is below q.
template <class Ops>
struct RealWord : Words<Ops, std::uint64_t> {
  using Base = Words<Ops, std::uint64_t>;
  using typename Base::Pairs, typename Base::Vec, typename Base::Word;
  using Real = typename Ops::Real;
  struct Factor {
    Real w, quotient;  // in [-q/2, q/2], and that over q
  };
  static constexpr std::size_t kBlock = 8;
  static constexpr bool kEnters = true;
  static_assert(Pairs::kStages <= 4);

  Vec q_words;
  Real q, inverse, shift;
  explicit RealWord(Word modulus)
      : q_words(Ops::all64(modulus)),
        q(Ops::all_real(static_cast<double>(modulus))),
        inverse(Ops::all_real(1.0 / static_cast<double>(modulus))),
        shift(Ops::all_real(simd::kRoundingShift)) {}

  static PRIVTUNER_INLINE Vec enter(const Word* p) { return Ops::bits_of(Ops::real(Ops::load(p))); }
  PRIVTUNER_INLINE Factor factor(Vec bits) const {
    const Real w = Ops::from_bits(bits);
    return {w, Ops::mul(w, inverse)};
  }
  PRIVTUNER_INLINE Factor broadcast(const NttView<Word>& ntt, std::size_t k) const {
    return factor(Ops::all64(ntt.centred[k]));
  }
  template <int stage>
  PRIVTUNER_INLINE Factor spread(const NttView<Word>& ntt, std::size_t k) const {
    return factor(Pairs::template arrange<stage>(ntt.centred + k));
  }
  PRIVTUNER_INLINE Factor factor_of(Word w, Word) const {
    return factor(Ops::bits_of(remainder(Ops::real(Ops::all64(w)))));
  }

  // x less q times the integer next to x / q, |x| < 2^53.
  PRIVTUNER_INLINE Real remainder(Real x) const {
    return Ops::fnma(Ops::sub(Ops::fma(x, inverse, shift), shift), q, x);
  }
  PRIVTUNER_INLINE Real product(Real x, const Factor& f) const {
    const Real high = Ops::mul(x, f.w), quotient = Ops::sub(Ops::fma(x, f.quotient, shift), shift);
    return Ops::add(Ops::fnma(quotient, q, high), Ops::fms(x, f.w, high));
  }
  PRIVTUNER_INLINE Vec canonical(Real r) const { return Ops::add_if_negative64(Ops::signed_words(r), q_words); }

  PRIVTUNER_INLINE Vec settle(Vec x) const { return Ops::bits_of(remainder(Ops::from_bits(x))); }
  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Real s = Ops::from_bits(u), t = product(Ops::from_bits(v), f);
    u = Ops::bits_of(Ops::add(s, t));
    v = Ops::bits_of(Ops::sub(s, t));
  }
  template <bool settles>
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Real s = Ops::from_bits(u), t = Ops::from_bits(v), sum = Ops::add(s, t);
    u = Ops::bits_of(settles ? remainder(sum) : sum);
    v = Ops::bits_of(product(Ops::sub(s, t), f));
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    const Real s = Ops::from_bits(u), t = Ops::from_bits(v);
    u = canonical(product(Ops::add(s, t), n_inverse));
    v = canonical(product(Ops::sub(s, t), last_root));
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return canonical(remainder(Ops::from_bits(x))); }
};

template <class Ops>
using Word64 = LazyWords<Ops, Product64<Ops>>;
template <class Ops>
using Word52 = LazyWords<Ops, Product52<Ops>>;

}  // namespace
}  // namespace privtuner::ring::kernels
