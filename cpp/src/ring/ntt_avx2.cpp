// AVX2: 8 words of 32 bits or 4 of 64 bits in a register.
#include <immintrin.h>

#include "ntt_passes.hpp"

namespace privtuner::ring::kernels {
namespace {

using Vec256 = __m256i;

PRIVTUNER_INLINE Vec256 load256(const void* p) { return _mm256_loadu_si256(static_cast<const Vec256*>(p)); }
PRIVTUNER_INLINE void store256(void* p, Vec256 x) { _mm256_storeu_si256(static_cast<Vec256*>(p), x); }

// 32-bit words in [0, q) throughout: q may use the top bit, so nothing lazy fits. Borrows are found by comparing.
struct Lanes32 {
  using Word = std::uint32_t;
  using Vec = Vec256;
  // Montgomery form w and companion w q^-1; w once more with the odd words in even places, where mul_epu32 reads.
  struct Factor {
    Vec w, w_odd, companion;
  };
  static constexpr std::size_t kLanes = 8, kBlock = 4;
  static constexpr int kPairStages = 4;

  Vec q;
  explicit Lanes32(Word modulus) : q(_mm256_set1_epi32(static_cast<int>(modulus))) {}

  static PRIVTUNER_INLINE Vec load(const Word* p) { return load256(p); }
  static PRIVTUNER_INLINE void store(Word* p, Vec x) { store256(p, x); }

  static PRIVTUNER_INLINE Factor broadcast(const Word* w, const Word* companion) {
    const Vec all = _mm256_set1_epi32(static_cast<int>(*w));
    return {all, all, _mm256_set1_epi32(static_cast<int>(*companion))};
  }

  // A word's number in its pair is b3 b2 b1 b0; a place is a register and a lane. In order: register b3, lane b2 b1 b0.
  // The splits lead to register b0, lane b2 b3 b1; register b1, lane b2 b0 b3; register b2, lane b1 b0 b3; register b3,
  // lane b1 b2 b0; and back to order.
  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    const Vec x = a, y = b;
    if constexpr (stage == 0 || stage == 1 || stage == 3) {
      const __m256 x_ps = _mm256_castsi256_ps(x), y_ps = _mm256_castsi256_ps(y);
      a = _mm256_castps_si256(_mm256_shuffle_ps(x_ps, y_ps, _MM_SHUFFLE(2, 0, 2, 0)));
      b = _mm256_castps_si256(_mm256_shuffle_ps(x_ps, y_ps, _MM_SHUFFLE(3, 1, 3, 1)));
    } else if constexpr (stage == 2) {
      a = _mm256_permute2x128_si256(x, y, 0x20);
      b = _mm256_permute2x128_si256(x, y, 0x31);
    } else {
      a = _mm256_permute4x64_epi64(x, _MM_SHUFFLE(3, 1, 2, 0));
      b = _mm256_permute4x64_epi64(y, _MM_SHUFFLE(3, 1, 2, 0));
    }
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& u, Vec& v) {
    const Vec x = u, y = v;
    if constexpr (stage == 0 || stage == 1 || stage == 3) {
      u = _mm256_unpacklo_epi32(x, y);
      v = _mm256_unpackhi_epi32(x, y);
    } else {
      split<stage>(u, v);  // its own inverse
    }
  }
  // The butterfly's factor has the number formed by the bits above the register's.
  template <int stage>
  static PRIVTUNER_INLINE Vec arrange(const Word* p) {
    if constexpr (stage == 0) return _mm256_permute4x64_epi64(load256(p), _MM_SHUFFLE(3, 1, 2, 0));
    if constexpr (stage == 1) {
      const Vec four = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm256_permutevar8x32_epi32(four, _mm256_setr_epi32(0, 2, 0, 2, 1, 3, 1, 3));
    }
    if constexpr (stage == 2) return _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    if constexpr (stage == 3) return _mm256_set1_epi32(static_cast<int>(*p));
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const Word* w, const Word* companion) {
    const Vec all = arrange<stage>(w);
    return {all, stage == 3 ? all : _mm256_srli_epi64(all, 32), arrange<stage>(companion)};
  }

  PRIVTUNER_INLINE Vec sub(Vec a, Vec b) const {
    const Vec no_borrow = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);  // a >= b
    return _mm256_add_epi32(_mm256_sub_epi32(a, b), _mm256_andnot_si256(no_borrow, q));
  }
  PRIVTUNER_INLINE Vec add(Vec a, Vec b) const { return sub(a, _mm256_sub_epi32(q, b)); }  // q - b in [1, q]
  // The high halves of two rows of 64-bit products, even words and odd words.
  static PRIVTUNER_INLINE Vec high_halves(Vec even, Vec odd) {
    return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
  // x w for x any word. The low halves of x w and m q agree, so the high halves' difference is exact, in (-q, q).
  PRIVTUNER_INLINE Vec mul(Vec x, const Factor& f) const {
    const Vec m = _mm256_mullo_epi32(x, f.companion);
    const Vec product = high_halves(_mm256_mul_epu32(x, f.w), _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f.w_odd));
    const Vec multiple = high_halves(_mm256_mul_epu32(m, q), _mm256_mul_epu32(_mm256_srli_epi64(m, 32), q));
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
struct Lanes64 {
  using Word = std::uint64_t;
  using Vec = Vec256;
  // w and companion as they are; w with its halves swapped; the companion's high half.
  struct Factor {
    Vec w, w_swapped, companion, companion_high;
  };
  static constexpr std::size_t kLanes = 4, kBlock = 4;
  static constexpr int kPairStages = 3;

  Vec q, q2, q4, q_swapped;
  explicit Lanes64(Word modulus)
      : q(broadcast(modulus)), q2(_mm256_slli_epi64(q, 1)), q4(_mm256_slli_epi64(q, 2)), q_swapped(swap(q)) {}

  static PRIVTUNER_INLINE Vec load(const Word* p) { return load256(p); }
  static PRIVTUNER_INLINE void store(Word* p, Vec x) { store256(p, x); }
  static PRIVTUNER_INLINE Vec broadcast(Word x) { return _mm256_set1_epi64x(static_cast<long long>(x)); }
  static PRIVTUNER_INLINE Vec swap(Vec x) { return _mm256_shuffle_epi32(x, _MM_SHUFFLE(2, 3, 0, 1)); }

  static PRIVTUNER_INLINE Factor factor(Vec w, Vec companion) {
    return {w, swap(w), companion, _mm256_srli_epi64(companion, 32)};
  }
  static PRIVTUNER_INLINE Factor broadcast(const Word* w, const Word* companion) {
    return factor(broadcast(*w), broadcast(*companion));
  }

  // In order: register b2, lane b1 b0. The splits lead to register b0, lane b1 b2; register b1, lane b0 b2; register
  // b2, lane b0 b1; and back to order.
  template <int stage>
  static PRIVTUNER_INLINE void split(Vec& a, Vec& b) {
    const Vec x = a, y = b;
    if constexpr (stage == 0 || stage == 2) {
      a = _mm256_unpacklo_epi64(x, y);
      b = _mm256_unpackhi_epi64(x, y);
    } else if constexpr (stage == 1) {
      a = _mm256_permute2x128_si256(x, y, 0x20);
      b = _mm256_permute2x128_si256(x, y, 0x31);
    } else {
      a = _mm256_permute4x64_epi64(x, _MM_SHUFFLE(3, 1, 2, 0));
      b = _mm256_permute4x64_epi64(y, _MM_SHUFFLE(3, 1, 2, 0));
    }
  }
  template <int stage>
  static PRIVTUNER_INLINE void join(Vec& u, Vec& v) {
    split<stage>(u, v);  // each its own inverse
  }
  template <int stage>
  static PRIVTUNER_INLINE Vec arrange(const Word* p) {
    if constexpr (stage == 0) return _mm256_permute4x64_epi64(load256(p), _MM_SHUFFLE(3, 1, 2, 0));
    if constexpr (stage == 1) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    if constexpr (stage == 2) return broadcast(*p);
  }
  template <int stage>
  static PRIVTUNER_INLINE Factor spread(const Word* w, const Word* companion) {
    return factor(arrange<stage>(w), arrange<stage>(companion));
  }

  // [0, 2 bound) to [0, bound), bound < 2^63: keeps x where x - bound has its sign bit set.
  static PRIVTUNER_INLINE Vec subtract_once(Vec x, Vec bound) {
    const __m256d less = _mm256_castsi256_pd(_mm256_sub_epi64(x, bound));
    return _mm256_castpd_si256(_mm256_blendv_pd(less, _mm256_castsi256_pd(x), less));
  }
  // [0, 4q - 1], for x any word: the quotient falls short of Shoup's by at most 2, as two carries are lost. Then
  // x w - quotient q modulo 2^64: the low products in full, of the cross products the low halves.
  PRIVTUNER_INLINE Vec mul_lazy(Vec x, const Factor& f) const {
    const Vec x_high = _mm256_srli_epi64(x, 32);
    const Vec middle = _mm256_add_epi64(_mm256_srli_epi64(_mm256_mul_epu32(x, f.companion_high), 32),
                                        _mm256_srli_epi64(_mm256_mul_epu32(x_high, f.companion), 32));
    const Vec quotient = _mm256_add_epi64(_mm256_mul_epu32(x_high, f.companion_high), middle);
    const Vec low = _mm256_sub_epi64(_mm256_mul_epu32(x, f.w), _mm256_mul_epu32(quotient, q));
    const Vec cross = _mm256_sub_epi32(_mm256_mullo_epi32(x, f.w_swapped), _mm256_mullo_epi32(quotient, q_swapped));
    const Vec cross_sum = _mm256_add_epi32(cross, swap(cross));  // the same in both halves
    return _mm256_add_epi64(low, _mm256_slli_epi64(cross_sum, 32));
  }
  // [0, 4q - 1] to [0, q - 1].
  PRIVTUNER_INLINE Vec reduce(Vec x) const { return subtract_once(subtract_once(x, q2), q); }

  PRIVTUNER_INLINE void forward_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec s = subtract_once(u, q4), t = mul_lazy(v, f);  // both [0, 4q - 1]
    u = _mm256_add_epi64(s, t);
    v = _mm256_add_epi64(_mm256_sub_epi64(s, t), q4);
  }
  PRIVTUNER_INLINE void inverse_butterfly(Vec& u, Vec& v, const Factor& f) const {
    const Vec t = _mm256_add_epi64(_mm256_sub_epi64(u, v), q4);  // [1, 8q - 1]
    u = subtract_once(_mm256_add_epi64(u, v), q4);
    v = mul_lazy(t, f);
  }
  PRIVTUNER_INLINE void inverse_last(Vec& u, Vec& v, const Factor& n_inverse, const Factor& last_root) const {
    const Vec sum = _mm256_add_epi64(u, v), difference = _mm256_add_epi64(_mm256_sub_epi64(u, v), q4);
    u = reduce(mul_lazy(sum, n_inverse));
    v = reduce(mul_lazy(difference, last_root));
  }
  PRIVTUNER_INLINE Vec forward_finish(Vec x) const { return reduce(subtract_once(x, q4)); }
};

}  // namespace

void forward_avx2(const NttView<std::uint32_t>& ntt, std::uint32_t* a) { forward_transform<Lanes32>(ntt, a); }
void forward_avx2(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { forward_transform<Lanes64>(ntt, a); }
void inverse_avx2(const NttView<std::uint32_t>& ntt, std::uint32_t* a) { inverse_transform<Lanes32>(ntt, a); }
void inverse_avx2(const NttView<std::uint64_t>& ntt, std::uint64_t* a) { inverse_transform<Lanes64>(ntt, a); }

void multiply_avx2(std::size_t n, std::uint32_t q, const std::uint32_t* a, const std::uint32_t* b,
                   const std::uint32_t* b_companion, std::uint32_t* out) {
  const Lanes32 lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes32::kLanes) {
    const Vec256 w = load256(b + i);
    store256(out + i, lanes.mul(load256(a + i), {w, _mm256_srli_epi64(w, 32), load256(b_companion + i)}));
  }
}

void multiply_avx2(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                   const std::uint64_t* b_companion, std::uint64_t* out) {
  const Lanes64 lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes64::kLanes) {
    const Lanes64::Factor factor = Lanes64::factor(load256(b + i), load256(b_companion + i));
    store256(out + i, lanes.reduce(lanes.mul_lazy(load256(a + i), factor)));
  }
}

}  // namespace privtuner::ring::kernels
