#include "privtuner/gemm/gemm.hpp"

#include <cstdio>
#include <stdexcept>
#include <string>
#include <tuple>

#include "gemm_oracle.hpp"

using namespace oracle;
using privtuner::gemm::kMaxDepth;
using privtuner::gemm::kMaxWeight16;
using privtuner::gemm::multiply;
using privtuner::math::usable_isas;

namespace {

// An int16 weight is low + 256 high with both bytes signed.
template <class Weight>
void check_storage(std::size_t rows, std::size_t cols) {
  std::mt19937_64 random(rows * 1000 + cols);
  for (const Fill fill : kFills) {
    const auto w = weights<Weight>(rows * cols, fill, random);
    const Weights packed(w.data(), rows, cols);
    CHECK_EQ(packed.rows(), rows);
    CHECK_EQ(packed.cols(), cols);
    CHECK_EQ(packed.bytes_per_weight(), static_cast<int>(sizeof(Weight)));
    CHECK_EQ(packed.row_blocks(), (rows + 3) / 4);
    CHECK_EQ(packed.col_blocks(), (cols + 3) / 4);
    for (std::size_t r = 0; r < 4 * packed.row_blocks(); ++r) {
      for (std::size_t c = 0; c < 4 * packed.col_blocks(); ++c) {
        const std::size_t inside = (r % 4) * 4 + c % 4;
        int value = packed.block(0, r / 4, c / 4)[inside];
        if (sizeof(Weight) == 2) value += 256 * packed.block(1, r / 4, c / 4)[inside];
        const bool exists = r < rows && c < cols;
        CHECK_EQ(value, exists ? static_cast<int>(w[r * cols + c]) : 0);
        if (exists) CHECK_EQ(packed.at(r, c), value);
      }
    }
  }
}

template <class Word>
std::vector<Word> product(const Weights& w, const AlignedVector<Word>& c, std::size_t columns, Isa isa,
                          std::uint64_t q) {
  std::vector<Word> out(w.rows() * columns);
  multiply(w, Operand::plain, PackedResidues<Word>(c.data(), w.cols(), columns, columns, isa, bit_length(q)),
           Modulus(q), 0, w.rows(), out.data(), columns);
  return out;
}

}  // namespace

TEST(paths_under_test) {
  for (const auto& [isa, name, base] : privtuner::math::kIsaPaths) {
    const std::string obstacle = privtuner::math::isa_obstacle(isa);
    std::printf("       %s: %s\n", name, obstacle.empty() ? "tested" : ("skipped: " + obstacle).c_str());
  }
  CHECK_EQ(usable_isas().front(), Isa::portable);
}

TEST(a_product_by_hand) {
  // [[1, -2], [127, -128]] [[q-1, 5], [3, 0]] = [[-1 - 6, 5], [-127 - 384, 635]] mod q.
  const std::int8_t w[] = {1, -2, 127, -128};
  const AlignedVector<std::uint32_t> c32 = {static_cast<std::uint32_t>(kPreset32 - 1), 5, 3, 0};
  const AlignedVector<std::uint64_t> c64 = {kPreset50 - 1, 5, 3, 0}, c60 = {kLargest60 - 1, 5, 3, 0};
  for (const Isa isa : usable_isas()) {
    const std::vector<std::uint32_t> want32 = {kPreset32 - 7, 5, kPreset32 - 511, 635};
    const std::vector<std::uint64_t> want64 = {kPreset50 - 7, 5, kPreset50 - 511, 635};
    const std::vector<std::uint64_t> want60 = {kLargest60 - 7, 5, kLargest60 - 511, 635};
    CHECK(product(Weights(w, 2, 2), c32, 2, isa, kPreset32) == want32);
    CHECK(product(Weights(w, 2, 2), c64, 2, isa, kPreset50) == want64);
    CHECK(product(Weights(w, 2, 2), c60, 2, isa, kLargest60) == want60);
  }
}

TEST(sizes_around_the_tiles) {
  privtuner::math::set_num_threads(1);
  check_sizes(usable_isas(), {1, 15, 16, 17, 31, 32, 33, 63, 65, 100});
}

TEST(every_remainder) { check_remainders(usable_isas()); }

TEST(large_sizes) {
  privtuner::math::set_num_threads(2);
  check_all_types(usable_isas(), {1000, 1000, 17, 1}, Fill::random, Fill::random, 0, 6000);
  check_all_types(usable_isas(), {17, 1000, 1000, 1}, Fill::random, Fill::random, 0, 6010);
  check_all_types(usable_isas(), {1000, 17, 1000, 0}, Fill::random, Fill::random, 0, 6020);
  check_all_types(usable_isas(), {65536, 1, 3, 0}, Fill::random, Fill::random, 0, 6030);
  check_product<std::int8_t, std::uint32_t>(usable_isas(), {1000, 1000, 1000 / check::kShare, 0}, Operand::plain,
                                            Fill::random, Fill::random, kPreset32, 6040);
}

TEST(extreme_weights_and_residues) { check_fills_and_moduli(usable_isas()); }

TEST(depths_to_the_limit) { check_depths(usable_isas(), {8188, 8192, 8193, 16389, 65536}, 5, 17 / check::kShare); }

TEST(every_number_of_digits) { check_digit_counts(usable_isas(), kMaxDepth, 17 / check::kShare); }

TEST(row_ranges) { check_row_ranges(usable_isas()); }

TEST(thread_counts) { check_threads(usable_isas()); }

TEST(no_columns_and_no_rows) {
  const std::int8_t w[] = {1, 2, 3, 4};
  const Weights weights(w, 2, 2);
  const AlignedVector<std::uint32_t> c = {1, 2};
  for (const Isa isa : usable_isas()) {
    std::uint32_t out = 77;
    multiply(weights, Operand::plain, PackedResidues<std::uint32_t>(c.data(), 2, 0, 0, isa, 7), Modulus(97), 0, 2, &out,
             0);
    multiply(weights, Operand::plain, PackedResidues<std::uint32_t>(c.data(), 2, 1, 1, isa, 7), Modulus(97), 0, 0, &out,
             1);
    CHECK_EQ(out, 77u);
  }
}

TEST(memory_is_used_again) {
  // Growing, shrinking, other digits: nothing of the residues before is left.
  std::mt19937_64 random(7000);
  for (const Isa isa : usable_isas()) {
    PackedResidues<std::uint64_t> residues;
    for (const auto& [depth, columns, bits] :
         {std::tuple{9, 20, 40}, std::tuple{131, 100, 60}, std::tuple{5, 33, 30}, std::tuple{131, 99, 36}}) {
      const Shape shape = {13, static_cast<std::size_t>(depth), static_cast<std::size_t>(columns), 2};
      const Modulus q(largest_prime(bits));
      const auto w = weights<std::int8_t>(shape.rows * shape.depth, Fill::random, random);
      AlignedVector<std::uint64_t> c(shape.depth * (shape.columns + shape.gap));
      fill_residues(c.data(), c.size(), Fill::random, q.q, random);
      residues.assign(c.data(), shape.depth, shape.columns, shape.columns + shape.gap, isa, bits);
      CHECK_EQ(residues.bits(), bits);
      expect_product(schoolbook(w, shape.depth, Operand::plain, shape, c, q.q),
                     Weights(w.data(), shape.rows, shape.depth), Operand::plain, shape, residues, q, 0, shape.rows);
    }
  }
}

TEST(weights_are_stored_exactly) {
  for (const std::size_t rows : {1, 3, 4, 5, 17}) {
    for (const std::size_t cols : {1, 4, 7, 64}) {
      check_storage<std::int8_t>(rows, cols);
      check_storage<std::int16_t>(rows, cols);
    }
  }
}

TEST(every_two_byte_weight_is_stored_exactly) {
  std::vector<std::int16_t> w;
  for (int value = -kMaxWeight16; value <= kMaxWeight16; ++value) w.push_back(static_cast<std::int16_t>(value));
  const Weights packed(w.data(), 1, w.size());
  for (std::size_t c = 0; c < w.size(); ++c) CHECK_EQ(packed.at(0, c), static_cast<int>(w[c]));
}

TEST(weights_rejects) {
  const std::int8_t w8[] = {1};
  const std::int16_t too_high[] = {0, 0, 0, 0, 0, 32640}, too_low[] = {-32640};
  CHECK_THROWS(std::invalid_argument, Weights(w8, 0, 1), "shape (0, 1): both dimensions must be in [1, 65536]");
  CHECK_THROWS(std::invalid_argument, Weights(w8, 1, 0), "shape (1, 0)");
  CHECK_THROWS(std::invalid_argument, Weights(w8, kMaxDepth + 1, 1), "shape (65537, 1)");
  CHECK_THROWS(std::invalid_argument, Weights(w8, 1, kMaxDepth + 1), "shape (1, 65537)");
  CHECK_THROWS(std::invalid_argument, Weights(too_high, 2, 3),
               "the 16-bit weight at (1, 2) is outside [-32639, 32639]");
  CHECK_THROWS(std::invalid_argument, Weights(too_low, 1, 1), "the 16-bit weight at (0, 0) is outside");
}

TEST(residues_rejects) {
  const AlignedVector<std::uint32_t> c(8);
  using Packed = PackedResidues<std::uint32_t>;
  CHECK_THROWS(std::invalid_argument, Packed(c.data(), 0, 1, 1, Isa::portable), "depth 0");
  CHECK_THROWS(std::invalid_argument, Packed(c.data(), kMaxDepth + 1, 0, 0, Isa::portable),
               "depth 65537, 0 columns, stride 0: depth must be in [1, 65536]");
  CHECK_THROWS(std::invalid_argument, Packed(c.data(), 2, 3, 2, Isa::portable), "3 columns, stride 2");
  CHECK_THROWS(std::invalid_argument, Packed(c.data(), 2, 1, 1, Isa::portable, 0),
               "residues of 0 bits: must be in [1, 32]");
  CHECK_THROWS(std::invalid_argument, Packed(c.data(), 2, 1, 1, Isa::portable, 33), "residues of 33 bits");
  const AlignedVector<std::uint64_t> wide(8);
  CHECK_THROWS(std::invalid_argument, PackedResidues<std::uint64_t>(wide.data(), 2, 1, 1, Isa::portable, 61),
               "residues of 61 bits: must be in [1, 60]");
}

TEST(multiply_rejects) {
  const std::vector<std::int8_t> w(100 * 40, 1);
  const Weights weights(w.data(), 100, 40);
  const AlignedVector<std::uint32_t> c32(100);
  const AlignedVector<std::uint64_t> c64(100);
  const PackedResidues<std::uint32_t> plain(c32.data(), 40, 1, 1, Isa::portable);
  const PackedResidues<std::uint32_t> transpose(c32.data(), 100, 1, 1, Isa::portable);
  const PackedResidues<std::uint64_t> wide(c64.data(), 40, 1, 1, Isa::portable);
  CHECK_EQ(plain.bits(), 32);  // unless told
  CHECK_EQ(wide.bits(), 60);
  std::uint32_t out32[100];
  std::uint64_t out64[100];
  const Modulus q(kPreset32);
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, transpose, q, 0, 1, out32, 1),
               "residues have depth 100, the weights 40");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::transpose, plain, q, 0, 1, out32, 1),
               "residues have depth 40, the weights 100");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, q, 16, 1, out32, 1),
               "rows [16, 17) must start at a multiple of 32 and end by 100");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, q, 96, 5, out32, 1), "end by 100");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, q, 128, 0, out32, 1), "end by 100");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, q, 96, ~std::size_t{0} - 90, out32, 1),
               "rows [96, 5)");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::transpose, transpose, q, 32, 9, out32, 1),
               "end by 40");
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, q, 0, 1, out32, 0),
               "output stride 0 is below the 1 columns");
  // The smallest primes above 2^32 and 2^60.
  CHECK_THROWS(std::invalid_argument, multiply(weights, Operand::plain, plain, Modulus(4294967311u), 0, 1, out32, 1),
               "modulus 4294967311 has 33 bits, the residues were packed for 32");
  CHECK_THROWS(std::invalid_argument,
               multiply(weights, Operand::plain, wide, Modulus(1152921504606847009u), 0, 1, out64, 1),
               "modulus 1152921504606847009 has 61 bits, the residues were packed for 60");
  // One bit short, on every path: also where the digits would have room for it.
  for (const Isa isa : usable_isas()) {
    for (const int bits : {30, 32, 36, 39, 40, 44, 48, 51, 53, 55, 56, 59}) {
      const PackedResidues<std::uint64_t> narrow(c64.data(), 40, 1, 1, isa, bits);
      multiply(weights, Operand::plain, narrow, Modulus(largest_prime(bits)), 0, 1, out64, 1);
      CHECK_THROWS(std::invalid_argument,
                   multiply(weights, Operand::plain, narrow, Modulus(largest_prime(bits + 1)), 0, 1, out64, 1),
                   " has " + std::to_string(bits + 1) + " bits, the residues were packed for " + std::to_string(bits));
    }
  }
}

PRIVTUNER_TEST_MAIN
