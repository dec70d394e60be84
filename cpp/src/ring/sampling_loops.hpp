// The loops of the samplers, for any register width. Included by the kernels' files alone; internal linkage.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Word>
std::size_t first_rejected_plain(Word* words, std::size_t begin, std::size_t n, Word mask, Word q) {
  for (std::size_t i = begin; i < n; ++i) {
    words[i] &= mask;
    if (words[i] >= q) return i;
  }
  return n;
}

template <class Ops, class Word>
std::size_t first_rejected(Word* words, std::size_t begin, std::size_t n, Word mask, Word q) {
  using Vec = typename Ops::Vec;
  constexpr std::size_t kLanes = Ops::kBytes / sizeof(Word);
  const auto all = [](Word w) __attribute__((always_inline)) {
    if constexpr (sizeof(Word) == 4) return Ops::all32(w);
    if constexpr (sizeof(Word) == 8) return Ops::all64(w);
  };
  if (n < kLanes) return first_rejected_plain(words, begin, n, mask, q);
  const Vec masks = all(mask), bound = all(q);
  const auto rejected_from = [&](std::size_t i) __attribute__((always_inline)) {
    const Vec x = Ops::bit_and(Ops::load(words + i), masks);
    Ops::store(words + i, x);
    return Ops::not_below(Word{}, x, bound);
  };
  std::size_t i = begin;
  unsigned rejected = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if ((rejected = rejected_from(i)) != 0) return i + static_cast<std::size_t>(__builtin_ctz(rejected));
  }
  if (i == n) return n;
  i = n - kLanes;  // the register reaches back to words that have passed
  return (rejected = rejected_from(i)) != 0 ? i + static_cast<std::size_t>(__builtin_ctz(rejected)) : n;
}

template <class Ops>
void binomial(const std::uint32_t* words, std::int8_t* out, std::size_t groups) {
  using Vec = typename Ops::Vec;
  constexpr std::size_t kLanes = Ops::kBytes / 4, kVecs = 16 / kLanes;
  const Vec minus_eta = Ops::all32(0u - kBinomialEta);
  for (; groups != 0; --groups, words += kBinomialWords, out += kBinomialGroup) {
#pragma GCC unroll 3
    for (int part = 0; part < 3; ++part) {
      const Vec mask = Ops::all32(0x3ffu << (10 * part));
      Vec values[kVecs];
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVecs; ++v) {
        const Vec own = Ops::load(words + 16 * part + v * kLanes), shared = Ops::load(words + 48 + v * kLanes);
        values[v] = Ops::add_bytes(minus_eta, Ops::add8(Ops::byte_counts(own),  //
                                                        Ops::byte_counts(Ops::bit_and(shared, mask))));
      }
      Ops::store_low_bytes(out + 16 * part, values);
    }
  }
}

template <class Ops>
constexpr SamplingKernels kSamplingKernels = {&first_rejected<Ops, std::uint32_t>, &first_rejected<Ops, std::uint64_t>,
                                              &binomial<Ops>};

}  // namespace
}  // namespace privtuner::ring::kernels
