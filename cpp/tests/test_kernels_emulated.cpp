// The operations of AVX-512 and IFMA (math/simd512.hpp, simd512ifma.hpp) and the kernels made of them, on processors
// without: the headers are the product's, the intrinsics below them plain C++.
#include "avx512_emulation.hpp"  // first: it hides the intrinsics

#include "../src/ring/kernels_simd.hpp"
#include "../src/ring/residues_52.hpp"
#include "kernel_cases.hpp"
#include "privtuner/math/simd512ifma.hpp"

namespace {

namespace kernels = privtuner::ring::kernels;
using privtuner::simd::Simd512, privtuner::simd::Simd512Ifma;

constexpr const kernels::Kernels& kAvx512 = kernels::kKernels<Simd512>;
const kernels::Kernels kIfma = [] {
  kernels::Kernels changed = kAvx512;
  changed.ntt50 = kernels::kNttKernels<kernels::Word52<Simd512Ifma>>;
  changed.residues = kernels::ResidueLoops<kernels::Lanes52<Simd512Ifma>>::kKernels;
  return changed;
}();

}  // namespace

TEST(transforms) { kernel_cases::check_transforms(kAvx512); }
TEST(keystreams) { kernel_cases::check_chacha20(kAvx512); }
TEST(samplers) { kernel_cases::check_samplers(kAvx512); }
TEST(residues) { kernel_cases::check_residues(kAvx512); }
TEST(transforms_with_ifma) { kernel_cases::check_transforms(kIfma); }
TEST(residues_with_ifma) { kernel_cases::check_residues(kIfma); }

PRIVTUNER_TEST_MAIN
