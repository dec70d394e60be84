// Arithmetic modulo a prime. Every function says what range it takes and gives; none branches on its operands.
#pragma once

#include "platform.cuh"

namespace pt {

PT_FN u64 mul_high(u64 a, u64 b) {
#if defined(__CUDACC__)
  return __umul64hi(a, b);
#else
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<u64>((static_cast<Wide>(a) * b) >> 64);
#endif
}

PT_FN u32 mul_high(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }

}  // namespace pt
