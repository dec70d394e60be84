#include "avx512_emulation.hpp"  // first: it hides the intrinsics

#include "../src/gemm/gemm_avx512.cpp"
