// Products modulo q < 2^50 by products of 52-bit words. Included by the kernels' files alone; internal linkage.
#pragma once

#include "residues_loops.hpp"

namespace privtuner::ring::kernels {
namespace {

__extension__ typedef unsigned __int128 Wide;

constexpr std::uint64_t kTwo52 = std::uint64_t{1} << 52;

template <class Ops>
struct Lanes52 : Ops {
  using Vec = typename Ops::Vec;
  // w and floor(w 2^52 / q).
  struct Factor {
    Vec w, companion;
  };
  using Weight = Vec;
  // The halves of the products summed apart: kMaxTerms = 2^11 low halves stay below 2^63, high ones below 2^61.
  struct Sum {
    Vec low, high;
  };
  static constexpr std::size_t kGroup = std::size_t{1} << 11;

  static constexpr std::size_t kNarrow = 4;  // terms whose sum stays below 2^104

  std::uint64_t modulus;
  Vec q, q2, minus_q, low_mask;  // minus_q modulo 2^52
  Vec normalise, reciprocal;     // for q of k bits: 52 - k, and floor(2^2k / q)
  Factor one, two52, two104;
  explicit Lanes52(const Row& row)
      : modulus(row.q),
        q(Ops::all64(row.q)),
        q2(Ops::all64(2 * row.q)),
        minus_q(Ops::all64(kTwo52 - row.q)),
        low_mask(Ops::all64(kTwo52 - 1)),
        normalise(Ops::all64(static_cast<std::uint64_t>(__builtin_clzll(row.q) - 12))),
        reciprocal(Ops::all64(row.words52->reciprocal)),
        one{Ops::all64(1), Ops::all64(row.words52->one_companion)},
        two52{Ops::all64(row.words52->two52), Ops::all64(row.words52->two52_companion)},
        two104{Ops::all64(row.words52->two104), Ops::all64(row.words52->two104_companion)} {}

  static PRIVTUNER_INLINE Vec high_half(Vec a, Vec b) { return Ops::add_high52(Ops::all64(0), a, b); }
  static PRIVTUNER_INLINE Vec low_half(Vec a, Vec b) { return Ops::add_low52(Ops::all64(0), a, b); }
  // x - quotient q modulo 2^52: the value itself where that is known to be in [0, 2^52).
  PRIVTUNER_INLINE Vec take_off(Vec x, Vec quotient) const {
    return Ops::bit_and(Ops::add_low52(x, quotient, minus_q), low_mask);
  }
  // [0, 4q) to [0, q).
  PRIVTUNER_INLINE Vec canonical(Vec x) const { return Ops::subtract_once64(Ops::subtract_once64(x, q2), q); }

  PRIVTUNER_INLINE Factor factor(std::uint64_t w) const {
    return {Ops::all64(w), Ops::all64(static_cast<std::uint64_t>((Wide{w} << 52) / modulus))};
  }
  // [0, 2q), for x below 2^52: Shoup's quotient is at most one short.
  PRIVTUNER_INLINE Vec multiply_lazy(Vec x, const Factor& f) const {
    return take_off(low_half(x, f.w), high_half(x, f.companion));
  }

  // Barrett: t = floor(a b / 2^(2k - 52)) < 2^52 and t floor(2^2k / q) / 2^52, floored, fall short of a b / q by less
  // than 1/2 (t), 1 (the reciprocal) and 1 (the last floor): the rest is in [0, 2.5 q).
  PRIVTUNER_INLINE Vec multiply(Vec a, Vec b) const {
    const Vec t = high_half(Ops::shift_left64(a, normalise), Ops::shift_left64(b, normalise));
    return canonical(take_off(low_half(a, b), high_half(t, reciprocal)));
  }
  PRIVTUNER_INLINE Vec multiply_scalar(Vec a, const Factor& w) const {
    return Ops::subtract_once64(multiply_lazy(a, w), q);
  }
  PRIVTUNER_INLINE Vec reduce(Vec a) const { return Ops::subtract_once64(take_off(a, high_half(a, one.companion)), q); }

  static PRIVTUNER_INLINE Sum zero_sum() { return {Ops::all64(0), Ops::all64(0)}; }
  PRIVTUNER_INLINE void add_product(Sum& sum, Vec a, Vec b) const {
    sum.low = Ops::add_low52(sum.low, a, b);
    sum.high = Ops::add_high52(sum.high, a, b);
  }
  PRIVTUNER_INLINE Weight weight(std::uint64_t w) const { return Ops::all64(w); }
  static PRIVTUNER_INLINE Vec ready(Vec a) { return a; }
  PRIVTUNER_INLINE void add_weighted(Sum& sum, Vec a, Weight w) const { add_product(sum, a, w); }
  PRIVTUNER_INLINE void fold(Sum&) const {}
  // The sum as limbs of 52 bits, top 2^104 + middle 2^52 + bottom; the products read the low 52 bits by themselves.
  PRIVTUNER_INLINE Vec finish(const Sum& sum, std::size_t terms) const {
    const Vec bottom = sum.low, middle = Ops::add64(sum.high, Ops::template shift_right64<52>(sum.low));
    const Vec quotient = Ops::add_high52(high_half(bottom, one.companion), middle, two52.companion);
    const Vec rest = take_off(Ops::add_low52(bottom, middle, two52.w), quotient);  // [0, 4q)
    if (terms <= kNarrow) return canonical(rest);
    const Vec top = multiply_lazy(Ops::template shift_right64<52>(middle), two104);
    return canonical(Ops::add64(Ops::subtract_once64(rest, q2), top));
  }
};

}  // namespace
}  // namespace privtuner::ring::kernels
