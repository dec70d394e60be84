// An instruction set that no processor has: registers of 128 bits in plain C++. What a new set must give
// (math/simd.hpp), and nothing else.
#pragma once

#include <cmath>
#include <cstring>

#include "privtuner/math/simd.hpp"

namespace privtuner::simd {
namespace {

struct SimdPlain {
  struct Vec {
    std::uint32_t words[4];
  };
  struct Real {
    double x[2];
  };
  static constexpr std::size_t kBytes = 16, kRegisters = 16;

  template <class T>
  static T lane(const Vec& x, std::size_t i) {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(&x) + i * sizeof(T), sizeof(T));
    return value;
  }
  // The register whose lane i is f(i).
  template <class T, class F>
  static Vec each(F f) {
    T lanes[kBytes / sizeof(T)];
    for (std::size_t i = 0; i < kBytes / sizeof(T); ++i) lanes[i] = static_cast<T>(f(i));
    return load(lanes);
  }
  template <class T, class F>
  static Vec each(F f, const Vec& a, const Vec& b) {
    return each<T>([&](std::size_t i) { return f(lane<T>(a, i), lane<T>(b, i)); });
  }
  template <class F>
  static Real each_real(F f) {
    return {{f(0), f(1)}};
  }
  using U8 = std::uint8_t;
  using U32 = std::uint32_t;
  using U64 = std::uint64_t;

  static Vec load(const void* p) {
    Vec x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static void store(void* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }
  static Vec all32(U32 x) {
    return each<U32>([=](std::size_t) { return x; });
  }
  static Vec all64(U64 x) {
    return each<U64>([=](std::size_t) { return x; });
  }
  static Vec bit_and(Vec a, Vec b) {
    return each<U64>([](U64 x, U64 y) { return x & y; }, a, b);
  }
  static Vec bit_xor(Vec a, Vec b) {
    return each<U64>([](U64 x, U64 y) { return x ^ y; }, a, b);
  }

  static Vec add32(Vec a, Vec b) {
    return each<U32>([](U32 x, U32 y) { return x + y; }, a, b);
  }
  static Vec sub32(Vec a, Vec b) {
    return each<U32>([](U32 x, U32 y) { return x - y; }, a, b);
  }
  static Vec multiply32(Vec a, Vec b) {
    return each<U32>([](U32 x, U32 y) { return x * y; }, a, b);
  }
  static Vec subtract_modulo32(Vec a, Vec b, Vec q) {
    return each<U32>([&](std::size_t i) {
      const U32 x = lane<U32>(a, i), y = lane<U32>(b, i);
      return x - y + (x < y ? lane<U32>(q, i) : 0);
    });
  }
  static Vec odd32(Vec x) { return shift_right64<32>(x); }
  static Vec multiply_even(Vec a, Vec b) {
    return each<U64>([](U64 x, U64 y) { return (x & 0xffffffff) * (y & 0xffffffff); }, a, b);
  }
  static Vec high_halves(Vec even, Vec odd) {
    return each<U32>([&](std::size_t i) { return lane<U32>(i % 2 == 0 ? even : odd, i | 1); });
  }
  template <int bits>
  static Vec rotate_left32(Vec a) {
    return each<U32>([&](std::size_t i) { return lane<U32>(a, i) << bits | lane<U32>(a, i) >> (32 - bits); });
  }
  static void transpose_quads(Vec x[4]) {
    const Vec from[4] = {x[0], x[1], x[2], x[3]};
    for (std::size_t j = 0; j < 4; ++j) {
      x[j] = each<U32>([&](std::size_t i) { return lane<U32>(from[i], j); });
    }
  }
  static Vec permute32(Vec x, Vec places) {
    return each<U32>([&](std::size_t i) { return lane<U32>(x, lane<U32>(places, i)); });
  }
  static void store_quads(std::uint8_t* out, std::size_t, Vec a, Vec b, Vec c, Vec d) {
    store(out, a);
    store(out + 16, b);
    store(out + 32, c);
    store(out + 48, d);
  }
  static Vec add8(Vec a, Vec b) {
    return each<U8>([](U8 x, U8 y) { return x + y; }, a, b);
  }
  static Vec byte_counts(Vec a) {
    return each<U8>([&](std::size_t i) { return __builtin_popcount(lane<U8>(a, i)); });
  }
  static Vec add_bytes(Vec sums, Vec a) {
    return each<U32>([&](std::size_t i) {
      U32 sum = lane<U32>(sums, i);
      for (std::size_t k = 0; k < 4; ++k) sum += lane<U8>(a, 4 * i + k);
      return sum;
    });
  }
  static void store_low_bytes(std::int8_t* out, const Vec x[4]) {
    for (std::size_t i = 0; i < 16; ++i) out[i] = static_cast<std::int8_t>(lane<U32>(x[i / 4], i % 4));
  }

  static Vec add64(Vec a, Vec b) {
    return each<U64>([](U64 x, U64 y) { return x + y; }, a, b);
  }
  static Vec sub64(Vec a, Vec b) {
    return each<U64>([](U64 x, U64 y) { return x - y; }, a, b);
  }
  template <int bits>
  static Vec shift_right64(Vec a) {
    return each<U64>([&](std::size_t i) { return lane<U64>(a, i) >> bits; });
  }
  static Vec subtract_once64(Vec a, Vec bound) {
    return each<U64>([](U64 x, U64 y) { return x < y ? x : x - y; }, a, bound);
  }
  static Vec add_if_negative64(Vec a, Vec q) {
    return each<U64>([](U64 x, U64 y) { return x >> 63 != 0 ? x + y : x; }, a, q);
  }
  using Multiplier = Vec;
  static Multiplier multiplier(Vec w) { return w; }
  static Vec products_difference(Vec x, Vec w, Vec y, Vec v) {
    const auto times = [](U64 a, U64 b) { return a * b; };
    return sub64(each<U64>(times, x, w), each<U64>(times, y, v));
  }

  template <class Word>
  static unsigned not_below(Word, Vec x, Vec bound) {
    unsigned mask = 0;
    for (std::size_t i = 0; i < kBytes / sizeof(Word); ++i) {
      mask |= static_cast<unsigned>(lane<Word>(x, i) >= lane<Word>(bound, i)) << i;
    }
    return mask;
  }

  static Real all_real(double x) { return {{x, x}}; }
  static Real add(Real a, Real b) {
    return each_real([&](int i) { return a.x[i] + b.x[i]; });
  }
  static Real sub(Real a, Real b) {
    return each_real([&](int i) { return a.x[i] - b.x[i]; });
  }
  static Real mul(Real a, Real b) {
    return each_real([&](int i) { return a.x[i] * b.x[i]; });
  }
  static Real fma(Real a, Real b, Real c) {
    return each_real([&](int i) { return std::fma(a.x[i], b.x[i], c.x[i]); });
  }
  static Real fms(Real a, Real b, Real c) {
    return each_real([&](int i) { return std::fma(a.x[i], b.x[i], -c.x[i]); });
  }
  static Real fnma(Real a, Real b, Real c) {
    return each_real([&](int i) { return std::fma(-a.x[i], b.x[i], c.x[i]); });
  }
  static Vec bits_of(Real a) { return load(&a); }
  static Real from_bits(Vec a) {
    Real x;
    std::memcpy(&x, &a, sizeof(x));
    return x;
  }
  static Real real(Vec a) { return {{static_cast<double>(lane<U64>(a, 0)), static_cast<double>(lane<U64>(a, 1))}}; }
  static Vec signed_words(Real a) {
    return each<U64>([&](std::size_t i) { return static_cast<std::int64_t>(a.x[i]); });
  }
  static Vec floor_words(Real a) {
    return each<U64>([&](std::size_t i) { return static_cast<std::int64_t>(std::floor(a.x[i])); });
  }

  // Lane i of the result is lane 2 i + odd of the words of a and b in a row; and the inverse.
  template <class Word>
  static Vec every_other(Vec a, Vec b, std::size_t odd) {
    constexpr std::size_t kLanes = kBytes / sizeof(Word);
    return each<Word>([&](std::size_t i) {
      const std::size_t k = 2 * i + odd;
      return k < kLanes ? lane<Word>(a, k) : lane<Word>(b, k - kLanes);
    });
  }
  template <class Word>
  static Vec mixed(Vec a, Vec b, std::size_t first) {
    return each<Word>([&](std::size_t i) { return lane<Word>(i % 2 == 0 ? a : b, first + i / 2); });
  }
  template <class Word>
  static Vec even_words(Word, Vec a, Vec b) {
    return every_other<Word>(a, b, 0);
  }
  template <class Word>
  static Vec odd_words(Word, Vec a, Vec b) {
    return every_other<Word>(a, b, 1);
  }
  template <class Word>
  static Vec low_mixed(Word, Vec a, Vec b) {
    return mixed<Word>(a, b, 0);
  }
  template <class Word>
  static Vec high_mixed(Word, Vec a, Vec b) {
    return mixed<Word>(a, b, kBytes / sizeof(Word) / 2);
  }
  template <std::size_t bytes>
  static Vec repeat(const void* p) {
    return each<U8>([&](std::size_t i) { return static_cast<const U8*>(p)[i % bytes]; });
  }
  template <class Word>
  using Pairs = PerfectShuffle<SimdPlain, Word>;
};

}  // namespace
}  // namespace privtuner::simd
