// The order of work of the vector NTTs, for any register width. Included by the kernels' files alone: everything has
// internal linkage, because each file compiles it for another instruction set.
//
// The stages with butterflies closer than kBlock registers run on kBlock registers at a time: first inside pairs of
// registers (a permutation brings the two halves of every butterfly to the same lane of two registers), then across
// the block. The other stages run two per pass over memory.
//
// A Lanes type (ntt_lanes.hpp) gives: Word, Vec, Factor; kLanes words in a Vec, kBlock, kPairStages = log2(2 kLanes);
// load, store, broadcast; spread<stage> (the factors of the kLanes butterflies of a pair, in the order split<stage>
// puts them); split<stage> before stage `stage` of the inverse, split<kPairStages> after the last one; join<stage>
// undoes split<stage>; forward_butterfly, inverse_butterfly, inverse_last; forward_finish to [0, q); in_order (the
// factors of kLanes words in a row) and multiply, to [0, q).
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Lanes>
using Factor = typename Lanes::Factor;
template <class Lanes>
using View = NttView<typename Lanes::Word>;

template <class Lanes>
PRIVTUNER_INLINE Factor<Lanes> broadcast_root(const View<Lanes>& ntt, std::size_t k) {
  return Lanes::broadcast(ntt.roots + k, ntt.companions + k);
}

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
      lanes.inverse_butterfly(z[2 * pair], z[2 * pair + 1],
                              Lanes::template spread<stage>(ntt.roots + k, ntt.companions + k));
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
      lanes.forward_butterfly(z[2 * pair], z[2 * pair + 1],
                              Lanes::template spread<stage>(ntt.roots + k, ntt.companions + k));
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
    constexpr std::size_t kGroups = Lanes::kBlock / (2 * distance);
#pragma GCC unroll 8
    for (std::size_t i = 0; i < Lanes::kBlock / 2; ++i) {
      const std::size_t group = i / distance, low = 2 * distance * group + i % distance;
      const std::size_t k = ntt.n / (2 * distance * Lanes::kLanes) + block * kGroups + group;
      lanes.inverse_butterfly(z[low], z[low + distance], broadcast_root<Lanes>(ntt, k));
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
      lanes.forward_butterfly(z[low], z[low + distance], broadcast_root<Lanes>(ntt, k));
    }
  }
}

template <class Lanes>
void inverse_transform(const View<Lanes>& ntt, typename Lanes::Word* a) {
  using Vec = typename Lanes::Vec;
  constexpr std::size_t kLanes = Lanes::kLanes, kBlockWords = Lanes::kBlock * kLanes;
  static_assert(2 * kBlockWords <= kVectorMinimum);
  const Lanes lanes(ntt.q);
  for (std::size_t block = 0; block < ntt.n / kBlockWords; ++block) {
    typename Lanes::Word* const x = a + block * kBlockWords;
    Vec z[Lanes::kBlock];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Lanes::kBlock; ++i) z[i] = Lanes::load(x + i * kLanes);
    inverse_pairs<Lanes, 0>(lanes, ntt, z, block);
    inverse_across<Lanes, 2>(lanes, ntt, z, block);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Lanes::kBlock; ++i) Lanes::store(x + i * kLanes, z[i]);
  }

  const Factor<Lanes> n_inverse = Lanes::broadcast(&ntt.n_inverse, &ntt.n_inverse_companion);
  const Factor<Lanes> last_root = Lanes::broadcast(&ntt.last_root, &ntt.last_root_companion);
  std::size_t half = kBlockWords;
  std::size_t stages = 0;
  for (std::size_t h = half; h < ntt.n; h *= 2) ++stages;
  if (stages % 2 != 0) {  // one stage alone, so that the others pair up
    if (stages == 1) {
      for (std::size_t j = 0; j < half; j += kLanes) {
        Vec u = Lanes::load(a + j), v = Lanes::load(a + half + j);
        lanes.inverse_last(u, v, n_inverse, last_root);
        Lanes::store(a + j, u);
        Lanes::store(a + half + j, v);
      }
      return;
    }
    for (std::size_t i = 0; i < ntt.n / (2 * half); ++i) {
      const Factor<Lanes> w = broadcast_root<Lanes>(ntt, ntt.n / (2 * half) + i);
      typename Lanes::Word* const x = a + 2 * half * i;
      for (std::size_t j = 0; j < half; j += kLanes) {
        Vec u = Lanes::load(x + j), v = Lanes::load(x + half + j);
        lanes.inverse_butterfly(u, v, w);
        Lanes::store(x + j, u);
        Lanes::store(x + half + j, v);
      }
    }
    half *= 2;
  }
  for (; half < ntt.n; half *= 4) {
    const std::size_t blocks = ntt.n / (4 * half);
    for (std::size_t i = 0; i < blocks; ++i) {
      const Factor<Lanes> low = broadcast_root<Lanes>(ntt, 2 * blocks + 2 * i);
      const Factor<Lanes> high = broadcast_root<Lanes>(ntt, 2 * blocks + 2 * i + 1);
      const Factor<Lanes> both = broadcast_root<Lanes>(ntt, blocks + i);
      typename Lanes::Word* const x = a + 4 * half * i;
      for (std::size_t j = 0; j < half; j += kLanes) {
        Vec z0 = Lanes::load(x + j), z1 = Lanes::load(x + half + j);
        Vec z2 = Lanes::load(x + 2 * half + j), z3 = Lanes::load(x + 3 * half + j);
        lanes.inverse_butterfly(z0, z1, low);
        lanes.inverse_butterfly(z2, z3, high);
        if (blocks == 1) {
          lanes.inverse_last(z0, z2, n_inverse, last_root);
          lanes.inverse_last(z1, z3, n_inverse, last_root);
        } else {
          lanes.inverse_butterfly(z0, z2, both);
          lanes.inverse_butterfly(z1, z3, both);
        }
        Lanes::store(x + j, z0);
        Lanes::store(x + half + j, z1);
        Lanes::store(x + 2 * half + j, z2);
        Lanes::store(x + 3 * half + j, z3);
      }
    }
  }
}

template <class Lanes>
void forward_transform(const View<Lanes>& ntt, typename Lanes::Word* a) {
  using Vec = typename Lanes::Vec;
  constexpr std::size_t kLanes = Lanes::kLanes, kBlockWords = Lanes::kBlock * kLanes;
  const Lanes lanes(ntt.q);
  std::size_t half = ntt.n / 2;
  for (; half >= 2 * kBlockWords; half /= 4) {  // the stages half and half / 2
    const std::size_t blocks = ntt.n / (2 * half), quarter = half / 2;
    for (std::size_t i = 0; i < blocks; ++i) {
      const Factor<Lanes> both = broadcast_root<Lanes>(ntt, blocks + i);
      const Factor<Lanes> low = broadcast_root<Lanes>(ntt, 2 * blocks + 2 * i);
      const Factor<Lanes> high = broadcast_root<Lanes>(ntt, 2 * blocks + 2 * i + 1);
      typename Lanes::Word* const x = a + 2 * half * i;
      for (std::size_t j = 0; j < quarter; j += kLanes) {
        Vec z0 = Lanes::load(x + j), z1 = Lanes::load(x + quarter + j);
        Vec z2 = Lanes::load(x + 2 * quarter + j), z3 = Lanes::load(x + 3 * quarter + j);
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
  if (half == kBlockWords) {  // one stage is left over
    for (std::size_t i = 0; i < ntt.n / (2 * half); ++i) {
      const Factor<Lanes> w = broadcast_root<Lanes>(ntt, ntt.n / (2 * half) + i);
      typename Lanes::Word* const x = a + 2 * half * i;
      for (std::size_t j = 0; j < half; j += kLanes) {
        Vec u = Lanes::load(x + j), v = Lanes::load(x + half + j);
        lanes.forward_butterfly(u, v, w);
        Lanes::store(x + j, u);
        Lanes::store(x + half + j, v);
      }
    }
  }
  for (std::size_t block = 0; block < ntt.n / kBlockWords; ++block) {
    typename Lanes::Word* const x = a + block * kBlockWords;
    Vec z[Lanes::kBlock];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Lanes::kBlock; ++i) z[i] = Lanes::load(x + i * kLanes);
    forward_across<Lanes, 2>(lanes, ntt, z, block);
    forward_pairs<Lanes, 0>(lanes, ntt, z, block);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Lanes::kBlock; ++i) Lanes::store(x + i * kLanes, lanes.forward_finish(z[i]));
  }
}

template <class Lanes>
void multiply_words(std::size_t n, typename Lanes::Word q, const typename Lanes::Word* a, const typename Lanes::Word* b,
                    const typename Lanes::Word* b_companion, typename Lanes::Word* out) {
  const Lanes lanes(q);
  for (std::size_t i = 0; i < n; i += Lanes::kLanes) {
    Lanes::store(out + i, lanes.multiply(Lanes::load(a + i), Lanes::in_order(b + i, b_companion + i)));
  }
}

template <class Lanes>
constexpr NttKernels<typename Lanes::Word> kNttKernels = {&forward_transform<Lanes>, &inverse_transform<Lanes>,
                                                          &multiply_words<Lanes>};

}  // namespace
}  // namespace privtuner::ring::kernels
