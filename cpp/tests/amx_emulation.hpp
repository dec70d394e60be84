// Tiles in plain C++, after the pseudocode of TILELOADD, TILESTORED and TDPBSUD in Intel's "Intel 64 and IA-32
// Architectures Software Developer's Manual", volume 2.
#pragma once

#include <cstdint>
#include <cstring>

namespace privtuner::gemm::emulated {

struct Tile {
  std::uint8_t bytes[16][64];
};

inline thread_local Tile tiles[8];

inline void zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }

inline void load(int tile, const void* from, std::size_t stride) {
  for (std::size_t r = 0; r < 16; ++r) {
    std::memcpy(tiles[tile].bytes[r], static_cast<const std::uint8_t*>(from) + r * stride, 64);
  }
}

inline void store(int tile, void* to, std::size_t stride) {
  for (std::size_t r = 0; r < 16; ++r) {
    std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, tiles[tile].bytes[r], 64);
  }
}

// c[m][n] += sum over k and i of signed a[m][4 k + i] * unsigned b[k][4 n + i].
inline void dpbsud(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    std::int32_t sums[16];
    std::memcpy(sums, tiles[c].bytes[m], 64);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) {
          sums[n] += static_cast<std::int8_t>(tiles[a].bytes[m][4 * k + i]) * tiles[b].bytes[k][4 * n + i];
        }
      }
    }
    std::memcpy(tiles[c].bytes[m], sums, 64);
  }
}

}  // namespace privtuner::gemm::emulated

#define PRIVTUNER_TILE_ZERO(tile) ::privtuner::gemm::emulated::zero(tile)
#define PRIVTUNER_TILE_LOAD(tile, from, stride) ::privtuner::gemm::emulated::load(tile, from, stride)
#define PRIVTUNER_TILE_STORE(tile, to, stride) ::privtuner::gemm::emulated::store(tile, to, stride)
#define PRIVTUNER_TILE_DPBSUD(sums, signed_tile, unsigned_tile) \
  ::privtuner::gemm::emulated::dpbsud(sums, signed_tile, unsigned_tile)

namespace privtuner::gemm {
namespace {
inline void amx_configure() {
  for (int tile = 0; tile < 8; ++tile) emulated::zero(tile);
}
inline void amx_release() {}
}  // namespace
}  // namespace privtuner::gemm
