// The few tile operations the AMX kernel uses. With PRIVTUNER_AMX_EMULATED they run in plain C++, so that the kernel's
// logic is tested on processors without AMX.
#pragma once

#include <cstdint>

#ifdef PRIVTUNER_AMX_EMULATED
#include "amx_emulation.hpp"
#else
#include <immintrin.h>

#define PRIVTUNER_TILE_ZERO(tile) _tile_zero(tile)
#define PRIVTUNER_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define PRIVTUNER_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define PRIVTUNER_TILE_DPBSUD(sums, signed_tile, unsigned_tile) _tile_dpbsud(sums, signed_tile, unsigned_tile)

namespace privtuner::gemm {
namespace {

// Eight tiles of 16 rows x 64 bytes (palette 1).
inline void amx_configure() {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // Some compilers' _tile_loadconfig admits to reading 8 of these 64 bytes: no store to the rest may be dropped.
  __asm__ __volatile__("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

inline void amx_release() { _tile_release(); }

}  // namespace
}  // namespace privtuner::gemm
#endif
