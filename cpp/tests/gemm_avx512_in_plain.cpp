#include "avx512_emulation.hpp"
//
#include "../src/gemm/gemm_avx512.cpp"
