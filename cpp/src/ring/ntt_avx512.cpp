// AVX-512 (F, DQ, VL): 16 words of 32 bits or 8 of 64 bits in a register.
#include "ntt_words512.hpp"

namespace privtuner::ring::kernels {
namespace {

// 32-bit words in [0, q) throughout: q may use the top bit, so nothing lazy fits. Borrows are found by comparing.
struct Lanes32 {
  using Word = std::uint32_t;
  using Vec = __m512i;
  // Montgomery form w and companion w q^-1; w once more with the odd words in even places, where mul_epu32 reads.
  struct Factor {
    Vec w, w_odd, companion;
  };
  static constexpr std::size_t kLanes = 16, kBlock = 8;
  static constexpr int kPairStages = 5;

  Vec q;
  explicit Lanes32(Word modulus) : q(_mm512_set1_epi32(static_cast<int>(modulus))) {}

  static PRIVTUNER_INLINE Vec load(const Word* p) { return _mm512_loadu_si512(p); }
  static PRIVTUNER_INLINE void store(Word* p, Vec x) { _mm512_storeu_si512(p, x); }

  static PRIVTUNER_INLINE Factor broadcast(const Word* w, const Word* companion) {
    const Vec all = _mm512_set1_epi32(static_cast<int>(*w));
    return {all, all, _mm512_set1_epi32(static_cast<int>(*companion))};
  }
  // Odd words to even places. A permutation where a shift would do: it runs on twice as many ports of Zen 4.
  static PRIVTUNER_INLINE Vec odd_words(Vec x) { return _mm512_shuffle_epi32(x, _MM_PERM_DDBB); }
  // 16 >> stage words, repeated.
  template <int stage>
  static PRIVTUNER_INLINE Vec repeat(const Word* p) {
    if constexpr (stage == 0) return _mm512_loadu_si512(p);
    if constexpr (stage == 1) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    if constexpr (stage == 2) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    if constexpr (stage == 3) return _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if constexpr (stage == 4) return _mm512_set1_epi32(static_cast<int>(*p));
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const Word* w, const Word* companion) {
    const Vec all = repeat<stage>(w);
    return {all, stage == 4 ? all : odd_words(all), repeat<stage>(companion)};
  }

  // The same perfect shuffle before each of the five stages: a butterfly of stage s joins words whose numbers differ in
  // bit s, the shuffle moves bit s to the register, and after five the numbers are back in order.
  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    if constexpr (stage == kPairStages) return;
    const Vec even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vec odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const Vec u = _mm512_permutex2var_epi32(a, even, b), v = _mm512_permutex2var_epi32(a, odd, b);
    a = u;
    b = v;
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& u, Vec& v) {
    if constexpr (stage == kPairStages) return;
    const Vec low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Vec high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const Vec a = _mm512_permutex2var_epi32(u, low, v), b = _mm512_permutex2var_epi32(u, high, v);
    u = a;
    v = b;
  }

  PRIVTUNER_INLINE Vec sub(Vec a, Vec b) const {
    const Vec difference = _mm512_sub_epi32(a, b);
    return _mm512_mask_add_epi32(difference, _mm512_cmplt_epu32_mask(a, b), difference, q);
  }
  PRIVTUNER_INLINE Vec add(Vec a, Vec b) const { return sub(a, _mm512_sub_epi32(q, b)); }  // q - b in [1, q]
  // The high halves of two rows of 64-bit products, even words and odd words.
  static PRIVTUNER_INLINE Vec high_halves(Vec even, Vec odd) {
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  }
  // x w for x any word. The low halves of x w and m q agree, so the high halves' difference is exact, in (-q, q).
  PRIVTUNER_INLINE Vec mul(Vec x, const Factor& f) const {
    const Vec m = _mm512_mullo_epi32(x, f.companion);
    const Vec product = high_halves(_mm512_mul_epu32(x, f.w), _mm512_mul_epu32(odd_words(x), f.w_odd));
    const Vec multiple = high_halves(_mm512_mul_epu32(m, q), _mm512_mul_epu32(odd_words(m), q));
    return sub(product, multiple);
  }

  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = mul(v, f);
    v = sub(u, t);
    u = add(u, t);
  }
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = sub(u, v);
    u = add(u, v);
    v = mul(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    inverse_butterfly(u, v, last_root);
    u = mul(u, n_inverse);
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return x; }
};

// 64-bit words, q < 2^61, lazily: forward in [0, 8q - 1], inverse in [0, 4q - 1] between stages. Harvey's ranges,
// doubled, because the quotient leaves out the product of the low halves.
struct Lanes64 : Words512 {
  struct Factor {
    Vec w, companion, companion_high;
  };
  static constexpr std::size_t kBlock = 8;

  Vec q, q2, q4;
  explicit Lanes64(Word modulus) : q(all(modulus)), q2(all(2 * modulus)), q4(all(4 * modulus)) {}

  static PRIVTUNER_INLINE Factor factor(Vec w, Vec companion) {
    return {w, companion, _mm512_srli_epi64(companion, 32)};
  }
  static PRIVTUNER_INLINE Factor broadcast(const Word* w, const Word* companion) {
    return factor(all(*w), all(*companion));
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const Word* w, const Word* companion) {
    return factor(repeat<stage>(w), repeat<stage>(companion));
  }

  // [0, 4q - 1], for x any word: the quotient falls short of Shoup's by at most 2, as two carries are lost.
  PRIVTUNER_INLINE Vec mul_lazy(Vec x, const Factor& f) const {
    const Vec x_high = _mm512_srli_epi64(x, 32);
    const Vec middle = _mm512_add_epi64(_mm512_srli_epi64(_mm512_mul_epu32(x, f.companion_high), 32),
                                        _mm512_srli_epi64(_mm512_mul_epu32(x_high, f.companion), 32));
    const Vec quotient = _mm512_add_epi64(_mm512_mul_epu32(x_high, f.companion_high), middle);
    return _mm512_sub_epi64(_mm512_mullo_epi64(x, f.w), _mm512_mullo_epi64(quotient, q));
  }
  // [0, 4q - 1] to [0, q - 1].
  PRIVTUNER_INLINE Vec reduce(Vec x) const { return subtract_once(subtract_once(x, q2), q); }

  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec s = subtract_once(u, q4), t = mul_lazy(v, f);  // both [0, 4q - 1]
    u = _mm512_add_epi64(s, t);
    v = _mm512_add_epi64(_mm512_sub_epi64(s, t), q4);
  }
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = _mm512_add_epi64(_mm512_sub_epi64(u, v), q4);  // [1, 8q - 1]
    u = subtract_once(_mm512_add_epi64(u, v), q4);
    v = mul_lazy(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    const Vec sum = _mm512_add_epi64(u, v), difference = _mm512_add_epi64(_mm512_sub_epi64(u, v), q4);
    u = reduce(mul_lazy(sum, n_inverse));
    v = reduce(mul_lazy(difference, last_root));
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return reduce(subtract_once(x, q4)); }
};

}  // namespace

void forward_avx512(const NttView<std::uint32_t>& ntt, std::uint32_t* a) { forward_transform<Lanes32>(ntt, a); }
void forward_avx512(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { forward_transform<Lanes64>(ntt, a); }
void inverse_avx512(const NttView<std::uint32_t>& ntt, std::uint32_t* a) { inverse_transform<Lanes32>(ntt, a); }
void inverse_avx512(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { inverse_transform<Lanes64>(ntt, a); }

void multiply_avx512(std::size_t n, std::uint32_t q, const std::uint32_t* a, const std::uint32_t* b,
                     const std::uint32_t* b_companion, std::uint32_t* out) {
  const Lanes32 lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes32::kLanes) {
    Lanes32::store(out + i, lanes.mul(Lanes32::load(a + i), Lanes32::spread<0>(b + i, b_companion + i)));
  }
}

void multiply_avx512(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                     const std::uint64_t* b_companion, std::uint64_t* out) {
  const Lanes64 lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes64::kLanes) {
    const Lanes64::Factor factor = Lanes64::spread<0>(b + i, b_companion + i);
    Lanes64::store(out + i, lanes.reduce(lanes.mul_lazy(Lanes64::load(a + i), factor)));
  }
}

}  // namespace privtuner::ring::kernels
