#include "kernels_simd.hpp"
#include "privtuner/math/simd512.hpp"

namespace privtuner::ring::kernels {

const Kernels& kernels_avx512() { return kKernels<simd::Simd512>; }

}  // namespace privtuner::ring::kernels
