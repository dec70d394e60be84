// AVX-512 IFMA: products of 52-bit words.
#include "residues_words512.hpp"

namespace privtuner::ring::kernels {
namespace {

__extension__ typedef unsigned __int128 Wide;

constexpr std::uint64_t kTwo52 = std::uint64_t{1} << 52;

struct IfmaLanes : ResidueWords512 {
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
  Vec raise;                     // the least multiple of q above 2^50
  Vec normalise, reciprocal;     // for q of k bits: 52 - k, and floor(2^2k / q)
  Factor one, two52, two104;
  explicit IfmaLanes(const Row& row)
      : modulus(row.q),
        q(all(row.q)),
        q2(all(2 * row.q)),
        minus_q(all(kTwo52 - row.q)),
        low_mask(all(kTwo52 - 1)),
        raise(all(((kTwo52 / 4) / row.q + 1) * row.q)) {
    const int bits = 64 - __builtin_clzll(row.q);
    normalise = all(static_cast<std::uint64_t>(52 - bits));
    reciprocal = all(static_cast<std::uint64_t>((Wide{1} << (2 * bits)) / row.q));
    one = factor(1);
    two52 = factor(kTwo52 % row.q);
    two104 = factor(static_cast<std::uint64_t>((Wide{1} << 104) % row.q));
  }

  PRIVTUNER_INLINE Vec add_if_negative(Vec x) const { return ResidueWords512::add_if_negative(x, q); }
  static PRIVTUNER_INLINE Vec subtract_once(Vec x, Vec bound) { return _mm512_min_epu64(x, sub(x, bound)); }
  static PRIVTUNER_INLINE Vec high_half(Vec a, Vec b) { return _mm512_madd52hi_epu64(_mm512_setzero_si512(), a, b); }
  static PRIVTUNER_INLINE Vec low_half(Vec a, Vec b) { return _mm512_madd52lo_epu64(_mm512_setzero_si512(), a, b); }
  // x - quotient q modulo 2^52: the value itself where that is known to be in [0, 2^52).
  PRIVTUNER_INLINE Vec take_off(Vec x, Vec quotient) const {
    return _mm512_and_si512(_mm512_madd52lo_epu64(x, quotient, minus_q), low_mask);
  }
  // [0, 4q) to [0, q).
  PRIVTUNER_INLINE Vec canonical(Vec x) const { return subtract_once(subtract_once(x, q2), q); }

  PRIVTUNER_INLINE Factor factor(std::uint64_t w) const {
    return {all(w), all(static_cast<std::uint64_t>((Wide{w} << 52) / modulus))};
  }
  // [0, 2q), for x below 2^52: Shoup's quotient is at most one short.
  PRIVTUNER_INLINE Vec multiply_lazy(Vec x, const Factor& f) const {
    return take_off(low_half(x, f.w), high_half(x, f.companion));
  }

  // Barrett: t = floor(a b / 2^(2k - 52)) < 2^52 and t floor(2^2k / q) / 2^52, floored, fall short of a b / q by less
  // than 1/2 (t), 1 (the reciprocal) and 1 (the last floor): the rest is in [0, 2.5 q).
  PRIVTUNER_INLINE Vec multiply(Vec a, Vec b) const {
    const Vec t = high_half(_mm512_sllv_epi64(a, normalise), _mm512_sllv_epi64(b, normalise));
    return canonical(take_off(low_half(a, b), high_half(t, reciprocal)));
  }
  PRIVTUNER_INLINE Vec multiply_scalar(Vec a, const Factor& w) const { return subtract_once(multiply_lazy(a, w), q); }
  PRIVTUNER_INLINE Vec subtract_multiply(Vec a, Vec b, const Factor& w) const {
    return multiply_scalar(add(sub(a, b), raise), w);  // (0, 2^50 + 2q)
  }
  PRIVTUNER_INLINE Vec reduce(Vec a) const { return subtract_once(take_off(a, high_half(a, one.companion)), q); }

  static PRIVTUNER_INLINE Sum zero_sum() { return {all(0), all(0)}; }
  PRIVTUNER_INLINE void add_product(Sum& sum, Vec a, Vec b) const {
    sum.low = _mm512_madd52lo_epu64(sum.low, a, b);
    sum.high = _mm512_madd52hi_epu64(sum.high, a, b);
  }
  PRIVTUNER_INLINE Weight weight(std::uint64_t w) const { return all(w); }
  PRIVTUNER_INLINE void add_weighted(Sum& sum, Vec a, Weight w) const { add_product(sum, a, w); }
  PRIVTUNER_INLINE void fold(Sum&) const {}
  // The sum as limbs of 52 bits, top 2^104 + middle 2^52 + bottom; the products read the low 52 bits by themselves.
  PRIVTUNER_INLINE Vec finish(const Sum& sum, std::size_t terms) const {
    const Vec bottom = sum.low, middle = add(sum.high, _mm512_srli_epi64(sum.low, 52));
    const Vec quotient = _mm512_madd52hi_epu64(high_half(bottom, one.companion), middle, two52.companion);
    const Vec rest = take_off(_mm512_madd52lo_epu64(bottom, middle, two52.w), quotient);  // [0, 4q)
    if (terms <= kNarrow) return canonical(rest);
    const Vec top = multiply_lazy(_mm512_srli_epi64(middle, 52), two104);
    return canonical(add(subtract_once(rest, q2), top));
  }
};

}  // namespace

const ResidueKernels& residues_avx512ifma() { return ResidueLoops<IfmaLanes>::kKernels; }

}  // namespace privtuner::ring::kernels
