// The AVX-512 and AMX kernels with both instruction sets in plain C++ (avx512_emulation.hpp, amx_emulation.hpp): their
// packing, their loops and their recombination are those of the real paths, on processors without.
#include "amx_emulation.hpp"
#include "gemm_oracle.hpp"

using namespace oracle;

namespace {

const std::vector<Isa> kPaths = {Isa::avx512, Isa::amx};

}  // namespace

TEST(tile_operations_follow_the_manual) {
  namespace emulated = privtuner::gemm::emulated;
  std::mt19937_64 random(1);
  std::uint8_t a[16 * 80], b[16 * 64];
  std::int32_t c[16 * 16], want[16 * 16];
  for (auto& byte : a) byte = static_cast<std::uint8_t>(random());
  for (auto& byte : b) byte = static_cast<std::uint8_t>(random());
  a[0] = 0x80;  // -128 * 255: the sign of the first and the size of the second operand show
  b[0] = 0xff;
  for (int i = 0; i < 256; ++i) want[i] = c[i] = static_cast<std::int32_t>(random() % 2000000) - 1000000;
  // Quads of bytes: the signed operand by rows, the unsigned one by columns.
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 64; ++k)
        want[m * 16 + n] += static_cast<std::int8_t>(a[m * 80 + k]) * b[k / 4 * 64 + 4 * n + k % 4];
    }
  }
  emulated::load(0, c, 64);
  emulated::load(4, a, 80);
  emulated::load(6, b, 64);
  emulated::dpbsud(0, 4, 6);
  std::int32_t got[16 * 20] = {};
  emulated::store(0, got, 80);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 20; ++n) CHECK_EQ(got[m * 20 + n], n < 16 ? want[m * 16 + n] : 0);
  }
  emulated::zero(0);
  emulated::store(0, got, 64);
  for (int i = 0; i < 256; ++i) CHECK_EQ(got[i], 0);
}

TEST(sizes_around_the_tiles) {
  privtuner::math::set_num_threads(1);
  check_sizes(kPaths, {1, 15, 16, 17, 33, 65});
}

TEST(every_remainder) { check_remainders(kPaths); }

TEST(large_sizes) {
  privtuner::math::set_num_threads(2);
  check_all_types(kPaths, {100, 1000, 65, 1}, Fill::random, Fill::random, 0, 6000);
  check_all_types(kPaths, {17, 1030, 300, 1}, Fill::random, Fill::random, 0, 6010);
}

TEST(extreme_weights_and_residues) { check_fills_and_moduli(kPaths); }

TEST(depths_to_the_limit) { check_depths(kPaths, {65536}, 3, 5); }

TEST(every_number_of_digits) { check_digit_counts(kPaths, 4097, 5); }

TEST(row_ranges) { check_row_ranges(kPaths); }

TEST(thread_counts) { check_threads(kPaths); }

PRIVTUNER_TEST_MAIN
