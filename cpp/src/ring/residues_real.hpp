// Products modulo q < 2^50 through doubles, for processors without integer products of 52-bit words. Included by the
// kernels' files alone; internal linkage.
//
// Why this is exact. Let p = x y with |x| < 2^52, |y| <= 2^50 integers and |p / q| < 2^51 - 1. Then h = round(p),
// l = p - h is a double (fma computes it), |l| < 2^48, and both are integers. inverse is 1/q with an error of 2^-53 of
// itself, so h inverse differs from p / q by at most 2^-52 (1 + 2^-54) |p / q|, which is below 1/2 + 2^-54. Added to
// 1.5 2^52 by fma it is rounded once, to an integer, as the sum stays within [2^52, 2^53]: c. So r = p - c q has
// |r| <= q (1/2 + 2^-52 (1 + 2^-54) |p / q|) < q + 1. h - c q = r - l is an integer below 2^53, so fma computes it
// without error, and so does the addition of l.
//
//   both factors in [0, q), or one in (-2^50, 2^50): |p / q| < 2^50 and |r| < 0.76 q: one correction is enough;
//   a word below 2^52 and a weight in [-q/2, q/2]: |p / q| < 2^51 (1 - 1/q) <= 2^51 - 2 and |r| <= q.
//
// A sum of kGroup = 6 such r and a folded sum (|.| < 0.51 q) is an integer below 7 q < 2^53: exact as well.
#pragma once

#include "residues_loops.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Ops>
struct RealLanes : Ops {
  using Vec = typename Ops::Vec;
  using Real = typename Ops::Real;
  using Factor = Real;
  using Weight = Real;
  using Sum = Real;
  static constexpr std::size_t kGroup = 6;

  Vec q;
  Real q_real, inverse, shift;
  std::int64_t modulus;
  explicit RealLanes(const Row& row)
      : q(Ops::all64(row.q)),
        q_real(Ops::all_real(static_cast<double>(row.q))),
        inverse(Ops::all_real(row.inverse)),
        shift(Ops::all_real(simd::kRoundingShift)),
        modulus(static_cast<std::int64_t>(row.q)) {}

  // x less q times the integer next to x / q.
  PRIVTUNER_INLINE Real remainder(Real x) const {
    const Real quotient = Ops::sub(Ops::fma(x, inverse, shift), shift);
    return Ops::fnma(quotient, q_real, x);
  }
  PRIVTUNER_INLINE Real product(Real x, Real y) const {
    const Real high = Ops::mul(x, y), low = Ops::fms(x, y, high);
    return Ops::add(remainder(high), low);
  }
  PRIVTUNER_INLINE Vec canonical(Real r) const { return Ops::add_if_negative64(Ops::signed_words(r), q); }

  PRIVTUNER_INLINE Vec multiply(Vec a, Vec b) const { return canonical(product(Ops::real(a), Ops::real(b))); }
  PRIVTUNER_INLINE Factor factor(std::uint64_t w) const { return Ops::all_real(static_cast<double>(w)); }
  PRIVTUNER_INLINE Vec multiply_scalar(Vec a, Factor w) const { return canonical(product(Ops::real(a), w)); }
  PRIVTUNER_INLINE Vec reduce(Vec a) const { return canonical(remainder(Ops::real(a))); }

  static PRIVTUNER_INLINE Sum zero_sum() { return Ops::all_real(0.0); }
  PRIVTUNER_INLINE void add_product(Sum& sum, Vec a, Vec b) const {
    sum = Ops::add(sum, product(Ops::real(a), Ops::real(b)));
  }
  PRIVTUNER_INLINE Weight weight(std::uint64_t w) const {
    const auto x = static_cast<std::int64_t>(w);
    return Ops::all_real(static_cast<double>(x - (modulus & ((modulus - 2 * x) >> 63))));  // centred
  }
  // Words as doubles.
  static PRIVTUNER_INLINE Vec ready(Vec a) { return Ops::bits_of(Ops::real(a)); }
  PRIVTUNER_INLINE void add_weighted(Sum& sum, Vec a, Weight w) const {
    sum = Ops::add(sum, product(Ops::from_bits(a), w));
  }
  PRIVTUNER_INLINE void fold(Sum& sum) const { sum = remainder(sum); }
  PRIVTUNER_INLINE Vec finish(Sum sum, std::size_t) const { return canonical(sum); }  // folded: |sum| < 0.51 q
};

}  // namespace
}  // namespace privtuner::ring::kernels
