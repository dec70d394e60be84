// ChaCha20 with a block in every lane, for any register width: register i holds word i of each block (RFC 8439, section
// 2.3, on every lane). Included by the kernels' files alone; internal linkage.
#pragma once

#include "kernels.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Ops, class Vec = typename Ops::Vec>
PRIVTUNER_INLINE void quarter_round(Vec& a, Vec& b, Vec& c, Vec& d) {
  a = Ops::add32(a, b);
  d = Ops::template rotate_left32<16>(Ops::bit_xor(d, a));
  c = Ops::add32(c, d);
  b = Ops::template rotate_left32<12>(Ops::bit_xor(b, c));
  a = Ops::add32(a, b);
  d = Ops::template rotate_left32<8>(Ops::bit_xor(d, a));
  c = Ops::add32(c, d);
  b = Ops::template rotate_left32<7>(Ops::bit_xor(b, c));
}

template <class Ops>
void chacha20_batches(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches) {
  using Vec = typename Ops::Vec;
  constexpr std::uint32_t kWidth = Ops::kBytes / 4;
  static_assert(kWidth <= kChaCha20MaxWidth);
  static constexpr std::uint32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Vec lanes = Ops::load(kLaneNumbers);
  for (std::uint32_t counter = state[12]; batches != 0; --batches, counter += kWidth, out += kWidth * 64) {
    const Vec counters = Ops::add32(Ops::all32(counter), lanes);
    Vec x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = Ops::all32(state[i]);
    x[12] = counters;
    for (int round = 0; round < 20; round += 2) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quarter_round<Ops>(x[i], x[4 + i], x[8 + i], x[12 + i]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        quarter_round<Ops>(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = Ops::add32(x[i], i == 12 ? counters : Ops::all32(state[i]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) Ops::transpose_quads(x + 4 * i);
    // Piece p of x[4 i + j] is now quarter i of block 4 p + j.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) Ops::store_quads(out + 64 * j, 256, x[j], x[4 + j], x[8 + j], x[12 + j]);
  }
}

template <class Ops>
constexpr ChaCha20Kernel kChaCha20Kernel = {Ops::kBytes / 4, &chacha20_batches<Ops>};

}  // namespace
}  // namespace privtuner::ring::kernels
