// The kernels of AVX-512, but for the products of 52-bit words.
#include "ntt_lanes.hpp"
#include "ntt_passes.hpp"
#include "privtuner/math/simd512ifma.hpp"
#include "residues_52.hpp"

namespace privtuner::ring::kernels {

const Kernels& kernels_avx512ifma() {
  static const Kernels kernels = [] {
    Kernels changed = kernels_avx512();
    changed.ntt50 = kNttKernels<Word52<simd::Simd512Ifma>>;
    changed.residues = ResidueLoops<Lanes52<simd::Simd512Ifma>>::kKernels;
    return changed;
  }();
  return kernels;
}

}  // namespace privtuner::ring::kernels
