// The loops over residue rows, for any register width. Included by the kernels' files alone: everything has internal
// linkage, because each file compiles it for another instruction set.
//
// A Lanes type, built from a Row, is an Ops type (simd.hpp) that also gives: q; a Factor made by factor(w), the
// products multiply, multiply_scalar, subtract_multiply, and reduce; sums of products: Sum, kGroup terms at most
// between two fold, add_product, a Weight made by weight(w), add_weighted, finish.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

constexpr std::size_t kBlockWords = 32, kUnitWords = 16;  // rows are whole units

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

  static void subtract_multiply(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t w,
                                std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    const typename Lanes::Factor factor = lanes.factor(w);
    for (std::size_t i = 0; i < n; i += kLanes) {
      Lanes::store(out + i, lanes.subtract_multiply(load(a + i), load(b + i), factor));
    }
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

  template <std::size_t words>
  static PRIVTUNER_INLINE void linear_combination_block(const Lanes& lanes, const std::uint64_t* const* a,
                                                        const std::uint64_t* w, std::size_t terms, std::size_t i,
                                                        std::uint64_t* out) {
    const auto add_term = [&](Sum* sums, std::size_t t) __attribute__((always_inline)) {
      const std::uint64_t* const x = a[t] + i;
      const typename Lanes::Weight weight = lanes.weight(w[t]);
#pragma GCC unroll 8
      for (std::size_t v = 0; v < words / kLanes; ++v) lanes.add_weighted(sums[v], load(x + v * kLanes), weight);
    };
    sum_block<words>(lanes, terms, out + i, add_term);
  }

  static void linear_combination(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w,
                                 std::size_t terms, std::uint64_t* out, std::size_t n) {
    const Lanes lanes(row);
    std::size_t i = 0;
    for (; i + kBlockWords <= n; i += kBlockWords) linear_combination_block<kBlockWords>(lanes, a, w, terms, i, out);
    if (i < n) linear_combination_block<kUnitWords>(lanes, a, w, terms, i, out);
  }

  static void quotient(const std::uint64_t* const* a, const double* inverse, std::size_t terms, std::uint64_t* out,
                       std::size_t n) {
    using Real = typename Lanes::Real;
    constexpr std::size_t kVecs = kUnitWords / kLanes;
    const Real half = Lanes::all_real(0.5);
    for (std::size_t i = 0; i < n; i += kUnitWords) {
      Real sums[kVecs];
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVecs; ++v) sums[v] = Lanes::all_real(0.0);
      for (std::size_t t = 0; t < terms; ++t) {
        const Real factor = Lanes::all_real(inverse[t]);
#pragma GCC unroll 4
        for (std::size_t v = 0; v < kVecs; ++v) {
          sums[v] = Lanes::add(sums[v], Lanes::mul(Lanes::real(load(a[t] + i + v * kLanes)), factor));
        }
      }
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVecs; ++v) {
        Lanes::store(out + i + v * kLanes, Lanes::floor_words(Lanes::add(half, sums[v])));
      }
    }
  }

  // Not by gathers: they load word by word as well, and take as long (Zen 4).
  static void permute(const std::uint64_t* a, const std::uint32_t* index, std::uint64_t* out, std::size_t n) {
    for (std::size_t i = 0; i < n; i += 4) {
      const std::uint64_t x0 = a[index[i]], x1 = a[index[i + 1]], x2 = a[index[i + 2]], x3 = a[index[i + 3]];
      out[i] = x0;
      out[i + 1] = x1;
      out[i + 2] = x2;
      out[i + 3] = x3;
    }
  }

  static constexpr ResidueKernels kKernels = {
      &add,        &subtract, &negate,        &multiply,           &multiply_scalar, &subtract_multiply,
      &add_scalar, &reduce,   &inner_product, &linear_combination, &quotient,        &permute};
};

}  // namespace
}  // namespace privtuner::ring::kernels
