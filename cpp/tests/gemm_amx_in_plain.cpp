#include "avx512_emulation.hpp"
//
#include "../src/gemm/gemm_amx.cpp"
