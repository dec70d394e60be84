// The loops over residue rows, for any register width. Included by the kernels' files alone: everything has internal
// linkage, because each file compiles it for another instruction set.
//
// A Lanes type, built from a Row, is an Ops type (simd.hpp) that also gives: q; a Factor made by factor(w), the
// products multiply, multiply_scalar, and reduce; sums of products: Sum, kGroup terms at most between two fold,
// add_product, a Weight made by weight(w), add_weighted of a word made ready(word), finish.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

constexpr std::size_t kBlockWords = 32, kUnitWords = 16;  // rows are whole units
constexpr std::size_t kTileWords = 128;                   // of every row of a base conversion at a time

template <class Lanes>
struct ResidueLoops {
  using Vec = typename Lanes::Vec;
  using Sum = typename Lanes::Sum;
  static constexpr std::size_t kLanes = Lanes::kBytes / 8;

  static PRIVTUNER_INLINE Vec load(const std::uint64_t* p) { return Lanes::load(p); }

  static void add(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    for (std::size_t i = 0; i < n; i += kLanes) {
      Lanes::store(out + i,
                   Lanes::add_if_negative64(Lanes::sub64(Lanes::add64(load(a + i), load(b + i)), lanes.q), lanes.q));
    }
  }

  static void subtract(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out,
                       std::size_t n) {
    const Lanes lanes(row);
    for (std::size_t i = 0; i < n; i += kLanes) {
      Lanes::store(out + i, Lanes::add_if_negative64(Lanes::sub64(load(a + i), load(b + i)), lanes.q));
    }
  }

  static void negate(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    const Vec zero = Lanes::all64(0);
    for (std::size_t i = 0; i < n; i += kLanes) {
      Lanes::store(out + i, Lanes::add_if_negative64(Lanes::sub64(zero, load(a + i)), lanes.q));
    }
  }

  static void multiply(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out,
                       std::size_t n) {
    const Lanes lanes(row);
    for (std::size_t i = 0; i < n; i += kLanes) Lanes::store(out + i, lanes.multiply(load(a + i), load(b + i)));
  }

  static void multiply_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out,
                              std::size_t n) {
    const Lanes lanes(row);
    const typename Lanes::Factor factor = lanes.factor(w);
    for (std::size_t i = 0; i < n; i += kLanes) Lanes::store(out + i, lanes.multiply_scalar(load(a + i), factor));
  }

  static void add_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    const Vec shift = Lanes::all64(w - row.q);
    for (std::size_t i = 0; i < n; i += kLanes) {
      Lanes::store(out + i, Lanes::add_if_negative64(Lanes::add64(load(a + i), shift), lanes.q));
    }
  }

  static void reduce(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    for (std::size_t i = 0; i < n; i += kLanes) Lanes::store(out + i, lanes.reduce(load(a + i)));
  }

  // `words` words across all terms, the sums in registers. add_term(sums, t) adds term t to all of them.
  template <std::size_t words, class AddTerm>
  static PRIVTUNER_INLINE void sum_block(const Lanes& lanes, std::size_t terms, std::uint64_t* out, AddTerm add_term) {
    constexpr std::size_t kVecs = words / kLanes;
    Sum sums[kVecs];
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kVecs; ++v) sums[v] = Lanes::zero_sum();
    for (std::size_t t = 0; t < terms;) {
      const std::size_t end = terms - t < Lanes::kGroup ? terms : t + Lanes::kGroup;
      for (; t < end; ++t) add_term(sums, t);
#pragma GCC unroll 8
      for (std::size_t v = 0; v < kVecs; ++v) lanes.fold(sums[v]);
    }
#pragma GCC unroll 8
    for (std::size_t v = 0; v < kVecs; ++v) Lanes::store(out + v * kLanes, lanes.finish(sums[v], terms));
  }

  template <std::size_t words>
  static PRIVTUNER_INLINE void inner_product_block(const Lanes& lanes, const std::uint64_t* const* a,
                                                   const std::uint64_t* const* b, std::size_t terms, std::size_t i,
                                                   std::uint64_t* out) {
    const auto add_term = [&](Sum* sums, std::size_t t) __attribute__((always_inline)) {
      const std::uint64_t *const x = a[t] + i, *const y = b[t] + i;
#pragma GCC unroll 8
      for (std::size_t v = 0; v < words / kLanes; ++v) {
        lanes.add_product(sums[v], load(x + v * kLanes), load(y + v * kLanes));
      }
    };
    sum_block<words>(lanes, terms, out + i, add_term);
  }

  static void inner_product(const Row& row, const std::uint64_t* const* a, const std::uint64_t* const* b,
                            std::size_t terms, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    std::size_t i = 0;
    for (; i + kBlockWords <= n; i += kBlockWords) inner_product_block<kBlockWords>(lanes, a, b, terms, i, out);
    if (i < n) inner_product_block<kUnitWords>(lanes, a, b, terms, i, out);
  }

  template <std::size_t words, bool ready>
  static PRIVTUNER_INLINE void weighted_block(const Lanes& lanes, const std::uint64_t* const* a, const std::uint64_t* w,
                                              std::size_t terms, std::size_t i, std::uint64_t* out) {
    const auto add_term = [&](Sum* sums, std::size_t t) __attribute__((always_inline)) {
      const std::uint64_t* const x = a[t] + i;
      const typename Lanes::Weight weight = lanes.weight(w[t]);
#pragma GCC unroll 8
      for (std::size_t v = 0; v < words / kLanes; ++v) {
        const Vec word = load(x + v * kLanes);
        lanes.add_weighted(sums[v], ready ? word : Lanes::ready(word), weight);
      }
    };
    sum_block<words>(lanes, terms, out + i, add_term);
  }

  template <bool ready>
  static PRIVTUNER_INLINE void weighted_sums(const Lanes& lanes, const std::uint64_t* const* a, const std::uint64_t* w,
                                             std::size_t terms, std::uint64_t* out, std::size_t n) {
    std::size_t i = 0;
    for (; i + kBlockWords <= n; i += kBlockWords) weighted_block<kBlockWords, ready>(lanes, a, w, terms, i, out);
    if (i < n) weighted_block<kUnitWords, ready>(lanes, a, w, terms, i, out);
  }

  static void linear_combination(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w,
                                 std::size_t terms, std::uint64_t* out, std::size_t n) {
    weighted_sums<false>(Lanes(row), a, w, terms, out, n);
  }

  // A tile of all terms is made ready once, its rows beside each other, and serves every target while it is in the
  // first cache. (In place the rows are powers of two apart and would drive each other out.)
  static void convert(const std::uint64_t* const* a, const double* inverse, std::size_t terms,
                      const ConversionTarget* targets, std::size_t count, std::size_t begin, std::size_t end) {
    alignas(64) std::uint64_t tile[(kMaxConverted + 1) * kTileWords];
    const std::uint64_t* rows[kMaxConverted + 1];
    for (std::size_t t = 0; t <= terms; ++t) rows[t] = tile + t * kTileWords;
    for (std::size_t i = begin; i < end; i += kTileWords) {
      const std::size_t words = end - i < kTileWords ? end - i : kTileWords;
      make_ready(a, inverse, terms, i, words, tile);
      for (std::size_t k = 0; k < count; ++k) {
        const Lanes lanes(targets[k].row);
        weighted_sums<true>(lanes, rows, targets[k].weights, terms + 1, targets[k].out + i, words);
      }
    }
  }

  // Words [first, first + words) of the terms, and their quotients as one more term.
  static PRIVTUNER_INLINE void make_ready(const std::uint64_t* const* a, const double* inverse, std::size_t terms,
                                          std::size_t first, std::size_t words, std::uint64_t* tile) {
    using Real = typename Lanes::Real;
    const Real half = Lanes::all_real(0.5);
    for (std::size_t i = 0; i < words; i += kLanes) {
      Real sum = Lanes::all_real(0.0);
      for (std::size_t t = 0; t < terms; ++t) {
        const Vec x = load(a[t] + first + i);
        sum = Lanes::add(sum, Lanes::mul(Lanes::real(x), Lanes::all_real(inverse[t])));
        Lanes::store(tile + t * kTileWords + i, Lanes::ready(x));
      }
      Lanes::store(tile + terms * kTileWords + i, Lanes::ready(Lanes::floor_words(Lanes::add(half, sum))));
    }
  }

  // Inside a group whole registers come from whole registers: the order of their words is one of eight.
  static void permute(const GroupOrder& order, const std::uint64_t* block, std::size_t origin, std::size_t first,
                      std::size_t count, std::uint64_t* out) {
    constexpr std::uint32_t kVecs = kGroupWords / kLanes;
    std::uint32_t from[kGroupWords][kVecs];                         // [carry][register]: the first word of its source
    alignas(64) std::uint32_t words[kGroupWords][2 * kGroupWords];  // [carry]: of every half word in its register
    for (std::uint32_t carry = 0; carry < kGroupWords; ++carry) {
      for (std::uint32_t j = 0; j < kGroupWords; ++j) {
        const std::uint32_t source = source_word(order.element, carry, j), lane = source % kLanes;
        from[carry][j / kLanes] = source - lane;
        words[carry][2 * j] = 2 * lane;
        words[carry][2 * j + 1] = 2 * lane + 1;
      }
    }
    for (std::size_t g = first; g < first + count; ++g, out += kGroupWords) {
      const std::uint32_t carry = order.sources[g] % kGroupWords;
      const std::uint64_t* const group = block + (order.sources[g] / kGroupWords - origin) * kGroupWords;
      for (std::uint32_t v = 0; v < kVecs; ++v) {
        const Vec places = Lanes::load(words[carry] + 2 * v * kLanes);
        Lanes::store(out + v * kLanes, Lanes::permute32(load(group + from[carry][v]), places));
      }
    }
  }

  static constexpr ResidueKernels kKernels = {
      &add,           &subtract,           &negate,  &multiply, &multiply_scalar, &add_scalar, &reduce,
      &inner_product, &linear_combination, &convert, &permute};
};

}  // namespace
}  // namespace privtuner::ring::kernels
