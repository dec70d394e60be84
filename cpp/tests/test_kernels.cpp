// One table of kernels a layer, and what a new instruction set needs: one header of operations (simd_plain.hpp).
#include "kernel_cases.hpp"
#include "simd_plain.hpp"

#include "../src/gemm/kernel.hpp"
#include "../src/linear/elements.hpp"
#include "../src/ring/kernels_simd.hpp"
#include "privtuner/math/kernel_table.hpp"

using privtuner::math::Isa;
using privtuner::math::KernelTable;

namespace {

constexpr const kernel_cases::Kernels& kPlain = kernel_cases::kernels::kKernels<privtuner::simd::SimdPlain>;

int first() { return 1; }
int third() { return 3; }
constexpr KernelTable<int (*)()> kWithGaps("a layer", {{Isa::portable, &first}, {Isa::avx512, &third}});

}  // namespace

TEST(a_table_with_a_gap_throws_and_never_does_with_another_path) {
  CHECK_EQ(kWithGaps.at(Isa::portable)(), 1);
  CHECK_EQ(kWithGaps.at(Isa::avx512)(), 3);
  for (const Isa isa : {Isa::avx2, Isa::avx512ifma, Isa::amx}) {
    CHECK_THROWS(std::logic_error, kWithGaps.at(isa),
                 std::string("a layer has no kernels for the path ") + isa_name(isa));
  }
  CHECK_THROWS(std::invalid_argument, kWithGaps.at(static_cast<Isa>(99)), "unknown instruction-set path 99");
}

TEST(every_layer_has_kernels_for_the_paths_of_the_build_and_for_no_other) {
  for (const auto& [isa, name, base] : privtuner::math::kIsaPaths) {
    if (privtuner::math::isa_usable(isa)) {
      CHECK(kernel_cases::kernels::kernels_of(isa).residues.permute != nullptr);
      CHECK(privtuner::linear::elements<std::uint32_t>(isa).gather != nullptr);
    } else if (!privtuner::math::isa_compiled(isa)) {
      CHECK_THROWS(std::logic_error, kernel_cases::kernels::kernels_of(isa),
                   "ring has no kernels for the path " + std::string(name));
      CHECK_THROWS(std::logic_error, privtuner::linear::path_elements(isa),
                   "linear has no kernels for the path " + std::string(name));
      const std::uint32_t word = 0;
      CHECK_THROWS(std::logic_error, privtuner::gemm::PackedResidues<std::uint32_t>(&word, 1, 1, 1, isa),
                   "gemm has no kernels for the path " + std::string(name));
    }
  }
}

TEST(a_new_set_transforms_like_the_portable_path) { kernel_cases::check_transforms(kPlain); }

TEST(a_new_set_makes_the_same_keystream) { kernel_cases::check_chacha20(kPlain); }

TEST(a_new_set_samples_the_same) { kernel_cases::check_samplers(kPlain); }

TEST(a_new_set_computes_the_same_residues) { kernel_cases::check_residues(kPlain); }

PRIVTUNER_TEST_MAIN
