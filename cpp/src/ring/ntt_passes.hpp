// The order of work of the vector NTTs, for any register width. Included by the kernels' files alone: everything has
// internal linkage, because each file compiles it for another instruction set.
//
// The stages with butterflies closer than kBlock registers run on kBlock registers at a time: first inside pairs of
// registers (a permutation brings the two halves of every butterfly to the same lane of two registers), then across
// the block. The other stages run two per pass, on a chunk that stays in the first cache where there are that many.
//
// A Lanes type (ntt_lanes.hpp) gives: Word, Vec, Factor; kLanes words in a Vec, kBlock, kPairStages = log2(2 kLanes);
// load, store; enter, which loads words in [0, q), kEnters if that is not load; broadcast and spread<stage> of a view's
// roots (the factors of the kLanes butterflies of a pair, in the order split<stage> puts them); split<stage> before
// stage `stage` of the inverse, split<kPairStages> after the last one; join<stage> undoes split<stage>;
// forward_butterfly; settle, for the upper half of every other stage of them; inverse_butterfly<settles>, which leaves
// every other one's sums settled; inverse_last and forward_finish to words in [0, q); multiply_in_order, the product of
// words with prepared ones.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Lanes>
using Factor = typename Lanes::Factor;
template <class Lanes>
using View = NttView<typename Lanes::Word>;

constexpr std::size_t kChunkBytes = std::size_t{1} << 14;  // half of a small first cache: the roots pass through it too

template <class Lanes, int stage>
PRIVTUNER_INLINE void inverse_pairs(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Vec* z,
                                    std::size_t block) {
  constexpr std::size_t kPairs = Lanes::kBlock / 2;
#pragma GCC unroll 8
  for (std::size_t pair = 0; pair < kPairs; ++pair) Lanes::template split<stage>(z[2 * pair], z[2 * pair + 1]);
  if constexpr (stage < Lanes::kPairStages) {
    const std::size_t first = (ntt.n >> (stage + 1)) + block * kPairs * (Lanes::kLanes >> stage);
#pragma GCC unroll 8
    for (std::size_t pair = 0; pair < kPairs; ++pair) {
      const std::size_t k = first + pair * (Lanes::kLanes >> stage);
      lanes.template inverse_butterfly<stage % 2 != 0 || stage == Lanes::kPairStages - 1>(
          z[2 * pair], z[2 * pair + 1], lanes.template spread<stage>(ntt, k));
    }
    inverse_pairs<Lanes, stage + 1>(lanes, ntt, z, block);
  }
}

template <class Lanes, int stage>
PRIVTUNER_INLINE void forward_pairs(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Vec* z,
                                    std::size_t block) {
  constexpr std::size_t kPairs = Lanes::kBlock / 2;
  if constexpr (stage < Lanes::kPairStages) {
    forward_pairs<Lanes, stage + 1>(lanes, ntt, z, block);
    const std::size_t first = (ntt.n >> (stage + 1)) + block * kPairs * (Lanes::kLanes >> stage);
#pragma GCC unroll 8
    for (std::size_t pair = 0; pair < kPairs; ++pair) {
      const std::size_t k = first + pair * (Lanes::kLanes >> stage);
      lanes.forward_butterfly(z[2 * pair], z[2 * pair + 1], lanes.template spread<stage>(ntt, k));
    }
  }
#pragma GCC unroll 8
  for (std::size_t pair = 0; pair < kPairs; ++pair) Lanes::template join<stage>(z[2 * pair], z[2 * pair + 1]);
}

// Butterflies between registers `distance` apart, of the stages distance, 2 distance, ... below kBlock.
template <class Lanes, std::size_t distance>
PRIVTUNER_INLINE void inverse_across(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Vec* z,
                                     std::size_t block) {
  if constexpr (distance < Lanes::kBlock) {
    constexpr bool settles = simd::log2_of(distance) % 2 == 0 || 2 * distance == Lanes::kBlock;
    constexpr std::size_t kGroups = Lanes::kBlock / (2 * distance);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Lanes::kBlock / 2; ++i) {
      const std::size_t group = i / distance, low = 2 * distance * group + i % distance;
      const std::size_t k = ntt.n / (2 * distance * Lanes::kLanes) + block * kGroups + group;
      lanes.template inverse_butterfly<settles>(z[low], z[low + distance], lanes.broadcast(ntt, k));
    }
    inverse_across<Lanes, 2 * distance>(lanes, ntt, z, block);
  }
}

template <class Lanes, std::size_t distance>
PRIVTUNER_INLINE void forward_across(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Vec* z,
                                     std::size_t block) {
  if constexpr (distance < Lanes::kBlock) {
    forward_across<Lanes, 2 * distance>(lanes, ntt, z, block);
    constexpr std::size_t kGroups = Lanes::kBlock / (2 * distance);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Lanes::kBlock / 2; ++i) {
      const std::size_t group = i / distance, low = 2 * distance * group + i % distance;
      const std::size_t k = ntt.n / (2 * distance * Lanes::kLanes) + block * kGroups + group;
      lanes.forward_butterfly(z[low], z[low + distance], lanes.broadcast(ntt, k));
    }
  }
}

template <class Lanes>
PRIVTUNER_INLINE void inverse_block(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                    std::size_t block) {
  typename Lanes::Word* const x = a + block * Lanes::kBlock * Lanes::kLanes;
  typename Lanes::Vec z[Lanes::kBlock];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Lanes::kBlock; ++i) z[i] = Lanes::enter(x + i * Lanes::kLanes);
  inverse_pairs<Lanes, 0>(lanes, ntt, z, block);
  inverse_across<Lanes, 2>(lanes, ntt, z, block);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < Lanes::kBlock; ++i) Lanes::store(x + i * Lanes::kLanes, z[i]);
}

template <class Lanes>
PRIVTUNER_INLINE void forward_block(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                    std::size_t block) {
  constexpr std::size_t kBlock = Lanes::kBlock;
  typename Lanes::Word* const x = a + block * kBlock * Lanes::kLanes;
  typename Lanes::Vec z[kBlock];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kBlock; ++i) z[i] = Lanes::load(x + i * Lanes::kLanes);
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kBlock / 2; ++i) z[i] = lanes.settle(z[i]);
  forward_across<Lanes, 2>(lanes, ntt, z, block);
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kBlock; i += 2) z[i] = lanes.settle(z[i]);
  forward_pairs<Lanes, 0>(lanes, ntt, z, block);
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kBlock; ++i) Lanes::store(x + i * Lanes::kLanes, lanes.forward_finish(z[i]));
}

// The stage half alone, on blocks [first, last) of 2 half words.
template <class Lanes>
PRIVTUNER_INLINE void inverse_single(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                     std::size_t half, std::size_t first, std::size_t last) {
  for (std::size_t i = first; i < last; ++i) {
    const Factor<Lanes> w = lanes.broadcast(ntt, ntt.n / (2 * half) + i);
    typename Lanes::Word* const x = a + 2 * half * i;
    for (std::size_t j = 0; j < half; j += Lanes::kLanes) {
      typename Lanes::Vec u = Lanes::load(x + j), v = Lanes::load(x + half + j);
      lanes.template inverse_butterfly<true>(u, v, w);
      Lanes::store(x + j, u);
      Lanes::store(x + half + j, v);
    }
  }
}

template <class Lanes>
PRIVTUNER_INLINE void forward_single(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                     std::size_t half, std::size_t first, std::size_t last) {
  for (std::size_t i = first; i < last; ++i) {
    const Factor<Lanes> w = lanes.broadcast(ntt, ntt.n / (2 * half) + i);
    typename Lanes::Word* const x = a + 2 * half * i;
    for (std::size_t j = 0; j < half; j += Lanes::kLanes) {
      typename Lanes::Vec u = lanes.settle(Lanes::load(x + j)), v = Lanes::load(x + half + j);
      lanes.forward_butterfly(u, v, w);
      Lanes::store(x + j, u);
      Lanes::store(x + half + j, v);
    }
  }
}

// The stages half and 2 half, on blocks [first, last) of 4 half words.
template <class Lanes>
PRIVTUNER_INLINE void inverse_double(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                     std::size_t half, std::size_t first, std::size_t last) {
  const std::size_t blocks = ntt.n / (4 * half);
  for (std::size_t i = first; i < last; ++i) {
    const Factor<Lanes> low = lanes.broadcast(ntt, 2 * blocks + 2 * i);
    const Factor<Lanes> high = lanes.broadcast(ntt, 2 * blocks + 2 * i + 1);
    const Factor<Lanes> both = lanes.broadcast(ntt, blocks + i);
    typename Lanes::Word* const x = a + 4 * half * i;
    for (std::size_t j = 0; j < half; j += Lanes::kLanes) {
      typename Lanes::Vec z0 = Lanes::load(x + j), z1 = Lanes::load(x + half + j);
      typename Lanes::Vec z2 = Lanes::load(x + 2 * half + j), z3 = Lanes::load(x + 3 * half + j);
      lanes.template inverse_butterfly<false>(z0, z1, low);
      lanes.template inverse_butterfly<false>(z2, z3, high);
      lanes.template inverse_butterfly<true>(z0, z2, both);
      lanes.template inverse_butterfly<true>(z1, z3, both);
      Lanes::store(x + j, z0);
      Lanes::store(x + half + j, z1);
      Lanes::store(x + 2 * half + j, z2);
      Lanes::store(x + 3 * half + j, z3);
    }
  }
}

// The last two stages, or, with `alone`, the last one.
template <class Lanes, bool alone>
PRIVTUNER_INLINE void inverse_end(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a) {
  const Factor<Lanes> n_inverse = lanes.factor_of(ntt.n_inverse, ntt.n_inverse_companion);
  const Factor<Lanes> last_root = lanes.factor_of(ntt.last_root, ntt.last_root_companion);
  const std::size_t part = ntt.n / (alone ? 2 : 4);
  const Factor<Lanes> low = lanes.broadcast(ntt, 2), high = lanes.broadcast(ntt, 3);
  for (std::size_t j = 0; j < part; j += Lanes::kLanes) {
    typename Lanes::Vec z0 = Lanes::load(a + j), z1 = Lanes::load(a + part + j);
    if constexpr (alone) {
      lanes.inverse_last(z0, z1, n_inverse, last_root);
    } else {
      typename Lanes::Vec z2 = Lanes::load(a + 2 * part + j), z3 = Lanes::load(a + 3 * part + j);
      lanes.template inverse_butterfly<false>(z0, z1, low);
      lanes.template inverse_butterfly<false>(z2, z3, high);
      lanes.inverse_last(z0, z2, n_inverse, last_root);
      lanes.inverse_last(z1, z3, n_inverse, last_root);
      Lanes::store(a + 2 * part + j, z2);
      Lanes::store(a + 3 * part + j, z3);
    }
    Lanes::store(a + j, z0);
    Lanes::store(a + part + j, z1);
  }
}

// The stages half and half / 2, on blocks [first, last) of 2 half words.
template <class Lanes, bool enters>
PRIVTUNER_INLINE void forward_double(const Lanes& lanes, const View<Lanes>& ntt, typename Lanes::Word* a,
                                     std::size_t half, std::size_t first, std::size_t last) {
  const std::size_t blocks = ntt.n / (2 * half), quarter = half / 2;
  const auto load = [](const typename Lanes::Word* x) { return enters ? Lanes::enter(x) : Lanes::load(x); };
  for (std::size_t i = first; i < last; ++i) {
    const Factor<Lanes> both = lanes.broadcast(ntt, blocks + i);
    const Factor<Lanes> low = lanes.broadcast(ntt, 2 * blocks + 2 * i);
    const Factor<Lanes> high = lanes.broadcast(ntt, 2 * blocks + 2 * i + 1);
    typename Lanes::Word* const x = a + 2 * half * i;
    for (std::size_t j = 0; j < quarter; j += Lanes::kLanes) {
      typename Lanes::Vec z0 = lanes.settle(load(x + j)), z1 = lanes.settle(load(x + quarter + j));
      typename Lanes::Vec z2 = load(x + 2 * quarter + j), z3 = load(x + 3 * quarter + j);
      lanes.forward_butterfly(z0, z2, both);
      lanes.forward_butterfly(z1, z3, both);
      lanes.forward_butterfly(z0, z1, low);
      lanes.forward_butterfly(z2, z3, high);
      Lanes::store(x + j, z0);
      Lanes::store(x + quarter + j, z1);
      Lanes::store(x + 2 * quarter + j, z2);
      Lanes::store(x + 3 * quarter + j, z3);
    }
  }
}

template <class Lanes>
void inverse_transform(const View<Lanes>& ntt, typename Lanes::Word* a) {
  constexpr std::size_t kBlockWords = Lanes::kBlock * Lanes::kLanes;
  constexpr std::size_t kChunkWords = kChunkBytes / sizeof(typename Lanes::Word);
  static_assert(2 * kBlockWords <= kVectorMinimum && (!Lanes::kEnters || 4 * kBlockWords <= kVectorMinimum));
  const Lanes lanes(ntt.q);
  std::size_t apart = 0;  // stages beyond the blocks
  while ((kBlockWords << apart) < ntt.n) ++apart;
  const bool odd = apart % 2 != 0 && apart != 1;  // one stage alone, so that the others pair up
  const std::size_t first_half = odd ? 2 * kBlockWords : kBlockWords;
  std::size_t chunk = first_half;
  while (4 * chunk <= kChunkWords && 4 * chunk < ntt.n) chunk *= 4;
  for (std::size_t begin = 0; begin < ntt.n; begin += chunk) {
    const std::size_t end = begin + chunk;
    for (std::size_t block = begin / kBlockWords; block < end / kBlockWords; ++block) {
      inverse_block(lanes, ntt, a, block);
    }
    if (odd) inverse_single(lanes, ntt, a, kBlockWords, begin / first_half, end / first_half);
    for (std::size_t half = first_half; half < chunk; half *= 4) {
      inverse_double(lanes, ntt, a, half, begin / (4 * half), end / (4 * half));
    }
  }
  for (std::size_t half = chunk; 4 * half < ntt.n; half *= 4) {
    inverse_double(lanes, ntt, a, half, 0, ntt.n / (4 * half));
  }
  if (apart == 1) {
    inverse_end<Lanes, true>(lanes, ntt, a);
  } else {
    inverse_end<Lanes, false>(lanes, ntt, a);
  }
}

template <class Lanes>
void forward_transform(const View<Lanes>& ntt, typename Lanes::Word* a) {
  constexpr std::size_t kBlockWords = Lanes::kBlock * Lanes::kLanes;
  constexpr std::size_t kChunkWords = kChunkBytes / sizeof(typename Lanes::Word);
  const Lanes lanes(ntt.q);
  std::size_t half = ntt.n / 2;
  if (Lanes::kEnters) {
    forward_double<Lanes, true>(lanes, ntt, a, half, 0, 1);
    half /= 4;
  }
  for (; half >= 2 * kBlockWords && 2 * half > kChunkWords; half /= 4) {
    forward_double<Lanes, false>(lanes, ntt, a, half, 0, ntt.n / (2 * half));
  }
  const std::size_t chunk = 2 * half;
  for (std::size_t begin = 0; begin < ntt.n; begin += chunk) {
    const std::size_t end = begin + chunk;
    std::size_t h = half;
    for (; h >= 2 * kBlockWords; h /= 4) {
      forward_double<Lanes, false>(lanes, ntt, a, h, begin / (2 * h), end / (2 * h));
    }
    if (h == kBlockWords) forward_single(lanes, ntt, a, h, begin / (2 * h), end / (2 * h));
    for (std::size_t block = begin / kBlockWords; block < end / kBlockWords; ++block) {
      forward_block(lanes, ntt, a, block);
    }
  }
}

template <class Lanes>
void multiply_words(std::size_t n, typename Lanes::Word q, const typename Lanes::Word* a, const typename Lanes::Word* b,
                    const typename Lanes::Word* b_companion, typename Lanes::Word* out) {
  const Lanes lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes::kLanes) {
    Lanes::store(out + i, lanes.multiply_in_order(Lanes::load(a + i), b + i, b_companion + i));
  }
}

template <class Lanes>
constexpr NttKernels<typename Lanes::Word> kNttKernels = {&forward_transform<Lanes>, &inverse_transform<Lanes>,
                                                          &multiply_words<Lanes>};

}  // namespace
}  // namespace privtuner::ring::kernels
