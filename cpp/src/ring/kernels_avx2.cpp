#include "kernels_simd.hpp"
#include "privtuner/math/simd256.hpp"

namespace privtuner::ring::kernels {

const Kernels& kernels_avx2() { return kKernels<simd::Simd256>; }

}  // namespace privtuner::ring::kernels
