#include <immintrin.h>

#include "sampling_kernels.hpp"

#define PRIVTUNER_INLINE inline __attribute__((always_inline))

namespace privtuner::ring::kernels {
namespace {

PRIVTUNER_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
PRIVTUNER_INLINE void store(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// The number of set bits of every byte: two halves looked up in a register, in constant time.
PRIVTUNER_INLINE __m256i byte_counts(__m256i x) {
  const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(x, low)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi32(x, 4), low)));
}

// The set bits of eight words of 32 bits and of the words' ten bits in `mask`, less 21.
PRIVTUNER_INLINE __m256i centred_counts(const std::uint32_t* words, const std::uint32_t* shared, int mask) {
  const __m256i ten_bits = _mm256_and_si256(load(shared), _mm256_set1_epi32(mask));
  const __m256i counts = _mm256_add_epi8(byte_counts(load(words)), byte_counts(ten_bits));
  const __m256i pairs = _mm256_maddubs_epi16(counts, _mm256_set1_epi8(1));
  return _mm256_sub_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), _mm256_set1_epi32(21));
}

template <class Word>
PRIVTUNER_INLINE std::size_t first_rejected_rest(Word* words, std::size_t begin, std::size_t n, Word mask, Word q) {
  for (std::size_t i = begin; i < n; ++i) {
    words[i] &= mask;
    if (words[i] >= q) return i;
  }
  return n;
}

}  // namespace

std::size_t first_rejected_avx2(std::uint32_t* words, std::size_t begin, std::size_t n, std::uint32_t mask,
                                std::uint32_t q) {
  const __m256i masks = _mm256_set1_epi32(static_cast<int>(mask)), bound = _mm256_set1_epi32(static_cast<int>(q));
  std::size_t i = begin;
  for (; i + 8 <= n; i += 8) {
    const __m256i x = _mm256_and_si256(load(words + i), masks);
    store(words + i, x);
    const __m256i rejected = _mm256_cmpeq_epi32(_mm256_max_epu32(x, bound), x);  // x >= q
    const int found = _mm256_movemask_ps(_mm256_castsi256_ps(rejected));
    if (found != 0) return i + static_cast<std::size_t>(__builtin_ctz(static_cast<unsigned>(found)));
  }
  return first_rejected_rest(words, i, n, mask, q);
}

std::size_t first_rejected_avx2(std::uint64_t* words, std::size_t begin, std::size_t n, std::uint64_t mask,
                                std::uint64_t q) {
  const __m256i masks = _mm256_set1_epi64x(static_cast<long long>(mask));
  const __m256i sign = _mm256_set1_epi64x(static_cast<long long>(std::uint64_t{1} << 63));  // to compare as unsigned
  const __m256i bound = _mm256_xor_si256(_mm256_set1_epi64x(static_cast<long long>(q)), sign);
  std::size_t i = begin;
  for (; i + 4 <= n; i += 4) {
    const __m256i x = _mm256_and_si256(load(words + i), masks);
    store(words + i, x);
    const __m256i accepted = _mm256_cmpgt_epi64(bound, _mm256_xor_si256(x, sign));
    const int found = _mm256_movemask_pd(_mm256_castsi256_pd(accepted)) ^ 15;
    if (found != 0) return i + static_cast<std::size_t>(__builtin_ctz(static_cast<unsigned>(found)));
  }
  return first_rejected_rest(words, i, n, mask, q);
}

void binomial_avx2(const std::uint32_t* words, std::int8_t* out, std::size_t groups) {
  for (; groups != 0; --groups, words += kBinomialWords, out += kBinomialGroup) {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const int mask = 0x3ff << (10 * part);
      const __m256i low = centred_counts(words + 16 * part, words + 48, mask);
      const __m256i high = centred_counts(words + 16 * part + 8, words + 56, mask);
      // Words 0-3, 8-11, 4-7, 12-15 as 16 bits; then in order; then as bytes.
      const __m256i halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0));
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * part), bytes);
    }
  }
}

}  // namespace privtuner::ring::kernels
