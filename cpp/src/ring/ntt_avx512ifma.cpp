// AVX-512 IFMA: 8 words of 64 bits in a register, q < 2^50, products of 52-bit words.
#include "ntt_words512.hpp"

namespace privtuner::ring::kernels {
namespace {

// Lazily, in Harvey's ranges: forward in [0, 4q - 1], inverse in [0, 2q - 1] between stages, so that every factor fits
// the 52 bits that the products read.
struct Lanes52 : Words512 {
  struct Factor {
    Vec w, companion;  // companion floor(w 2^52 / q)
  };

  static constexpr std::size_t kBlock = 16;  // a factor takes two registers alone: 32 hold it all
  static constexpr Word kTwo52 = Word{1} << 52;

  Vec q, q2, minus_q;  // minus_q modulo 2^52
  explicit Lanes52(Word modulus) : q(all(modulus)), q2(all(2 * modulus)), minus_q(all(kTwo52 - modulus)) {}

  // From the companion floor(w 2^64 / q).
  static PRIVTUNER_INLINE Factor factor(Vec w, Vec companion) { return {w, _mm512_srli_epi64(companion, 12)}; }
  static PRIVTUNER_INLINE Factor broadcast(const Word* w, const Word* companion) {
    return factor(all(*w), all(*companion));
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const Word* w, const Word* companion) {
    return factor(repeat<stage>(w), repeat<stage>(companion));
  }

  // [0, 2q - 1], for x below 2^52: Shoup's quotient is at most one short.
  PRIVTUNER_INLINE Vec mul_lazy(Vec x, const Factor& f) const {
    const Vec zero = _mm512_setzero_si512();
    const Vec quotient = _mm512_madd52hi_epu64(zero, x, f.companion);
    const Vec difference = _mm512_madd52lo_epu64(_mm512_madd52lo_epu64(zero, x, f.w), quotient, minus_q);
    return _mm512_and_si512(difference, all(kTwo52 - 1));  // it is known modulo 2^52
  }

  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec s = subtract_once(u, q2), t = mul_lazy(v, f);  // both [0, 2q - 1]
    u = _mm512_add_epi64(s, t);
    v = _mm512_add_epi64(_mm512_sub_epi64(s, t), q2);
  }
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = _mm512_add_epi64(_mm512_sub_epi64(u, v), q2);  // [1, 4q - 1]
    u = subtract_once(_mm512_add_epi64(u, v), q2);
    v = mul_lazy(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    const Vec sum = _mm512_add_epi64(u, v), difference = _mm512_add_epi64(_mm512_sub_epi64(u, v), q2);
    u = subtract_once(mul_lazy(sum, n_inverse), q);
    v = subtract_once(mul_lazy(difference, last_root), q);
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return subtract_once(subtract_once(x, q2), q); }
};

}  // namespace

void forward_avx512ifma(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { forward_transform<Lanes52>(ntt, a); }
void inverse_avx512ifma(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { inverse_transform<Lanes52>(ntt, a); }

void multiply_avx512ifma(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                         const std::uint64_t* b_companion, std::uint64_t* out) {
  const Lanes52 lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes52::kLanes) {
    const Lanes52::Factor factor = Lanes52::spread<0>(b + i, b_companion + i);
    Lanes52::store(out + i, Lanes52::subtract_once(lanes.mul_lazy(Lanes52::load(a + i), factor), lanes.q));
  }
}

}  // namespace privtuner::ring::kernels
