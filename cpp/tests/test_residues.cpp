#include "privtuner/ring/residues.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "privtuner/math/memory.hpp"

using privtuner::math::AlignedVector;
using privtuner::math::Isa;
using privtuner::math::usable_isas;
using privtuner::ring::Automorphism;
using privtuner::ring::convert_rows;
using privtuner::ring::kMaxConverted;
using privtuner::ring::kMaxTerms;
using privtuner::ring::ResidueRow;

namespace {

__extension__ typedef unsigned __int128 Uint128;

using Words = AlignedVector<std::uint64_t>;
using Rows = std::vector<Words>;

constexpr std::uint64_t kTwo50 = std::uint64_t{1} << 50, kTwo52 = std::uint64_t{1} << 52;
const std::size_t kLengths[] = {16, 32, 48, 272};

// The largest and the second largest prime below 2^50, and below 2^40, 2^30 and 2^17; primes above 2^49 and 2^16, the
// latter the least that is taken; two in between; and one q = 2^50 - d with d^2 next to 2^50, so that the fraction of
// 2^100 / q is next to 1 and a reciprocal rounded down is furthest off.
const std::vector<std::uint64_t>& primes() {
  static const std::vector<std::uint64_t> all = [] {
    std::vector<std::uint64_t> found;
    for (const int bits : {50, 40, 30, 17}) {
      std::uint64_t q = (std::uint64_t{1} << bits) - 1;
      for (int count = 0; count < 2; --q) {
        if (!privtuner::math::is_prime(q)) continue;
        found.push_back(q);
        ++count;
      }
    }
    for (std::uint64_t q : {(std::uint64_t{1} << 49) + 1, (std::uint64_t{1} << 16) + 1, std::uint64_t{4293918721},
                            std::uint64_t{3} << 44, kTwo50 - (std::uint64_t{1} << 25) + 1000}) {
      while (!privtuner::math::is_prime(q)) ++q;
      found.push_back(q);
    }
    return found;
  }();
  return all;
}

std::uint64_t modulo(Uint128 x, std::uint64_t q) { return static_cast<std::uint64_t>(x % q); }

// Words below bound, a third of them near the ends of [0, bound) or of [0, q) or at multiples of q.
Words row_of(std::size_t n, std::uint64_t q, std::uint64_t bound, std::uint64_t seed) {
  std::mt19937_64 generator(seed * 0x9e3779b97f4a7c15u + n + q);
  const std::uint64_t ends[] = {
      0, 1, 2, q / 2, q / 2 + 1, q - 2, q - 1, q, 2 * q - 1, bound / q * q, bound / 2, bound - 2, bound - 1};
  Words row(n);
  for (std::uint64_t& word : row) {
    word = generator() % 3 == 0 ? ends[generator() % std::size(ends)] : generator();
    word %= bound;
  }
  return row;
}

// All words the largest, then rows as above.
Rows rows_of(std::size_t rows, std::size_t n, std::uint64_t q, std::uint64_t bound, std::uint64_t seed) {
  Rows all;
  for (std::size_t r = 0; r < rows; ++r) {
    all.push_back(r == 0 ? Words(n, bound - 1) : row_of(n, q, bound, 1000 * seed + r));
  }
  return all;
}

template <class Body>
void for_each_case(Body body) {
  for (const std::uint64_t q : primes()) {
    const ResidueRow row(q);
    for (const std::size_t n : kLengths) body(row, q, n);
  }
}

// run(a, out, isa) writes out from a; it is tried with out apart, with 16 words behind it, and with out = a.
template <class Run>
void check_row(const Words& a, const Words& want, Run run) {
  for (const Isa isa : usable_isas()) {
    Words out(want.size() + 16, 77), in_place = a, guarded = want;
    guarded.insert(guarded.end(), 16, 77);
    run(a.data(), out.data(), isa);
    CHECK(out == guarded);
    run(in_place.data(), in_place.data(), isa);
    CHECK(in_place == want);
  }
}

// want(x, y) is the word expected from the words x and y.
template <class Want, class Run>
void check_pairs(const Words& a, const Words& b, Want want, Run run) {
  Words wanted(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) wanted[i] = want(a[i], b[i]);
  check_row(a, wanted, [&](const std::uint64_t* x, std::uint64_t* out, Isa isa) { run(x, b.data(), out, isa); });
}

std::vector<const std::uint64_t*> pointers(const Rows& rows, std::size_t terms) {
  std::vector<const std::uint64_t*> all;
  for (std::size_t t = 0; t < terms; ++t) all.push_back(rows[t % rows.size()].data());
  return all;
}

std::vector<std::uint64_t> scalars(std::uint64_t q) {
  std::mt19937_64 generator(q);
  return {0, 1, q / 2, q / 2 + 1, q - 1, generator() % q};
}

}  // namespace

TEST(sums_differences_and_negatives) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    CHECK_EQ(row.modulus().q, q);
    const Rows a = rows_of(3, n, q, q, 1), b = rows_of(3, n, q, q, 2);
    for (std::size_t k = 0; k < a.size(); ++k) {
      check_pairs(
          a[k], b[k], [q](auto x, auto y) { return (x + y) % q; },
          [&](auto x, auto y, auto out, Isa isa) { row.add(x, y, out, n, isa); });
      check_pairs(
          a[k], b[k], [q](auto x, auto y) { return (x + q - y) % q; },
          [&](auto x, auto y, auto out, Isa isa) { row.subtract(x, y, out, n, isa); });
      check_pairs(
          a[k], a[k], [q](auto x, auto) { return (q - x) % q; },
          [&](auto x, auto, auto out, Isa isa) { row.negate(x, out, n, isa); });
      for (const std::uint64_t w : scalars(q)) {
        check_pairs(
            a[k], a[k], [q, w](auto x, auto) { return (x + w) % q; },
            [&](auto x, auto, auto out, Isa isa) { row.add_scalar(x, w, out, n, isa); });
      }
    }
  });
}

TEST(out_may_be_the_second_factor_or_both) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    const Words a = row_of(n, q, q, 3), b = row_of(n, q, q, 4);
    for (const Isa isa : usable_isas()) {
      Words product(n), difference(n), square = a, second = b, right = b;
      row.multiply(a.data(), b.data(), product.data(), n, isa);
      row.subtract(a.data(), b.data(), difference.data(), n, isa);
      row.multiply(a.data(), second.data(), second.data(), n, isa);
      row.subtract(a.data(), right.data(), right.data(), n, isa);
      row.multiply(square.data(), square.data(), square.data(), n, isa);
      CHECK(second == product);
      CHECK(right == difference);
      for (std::size_t i = 0; i < n; ++i) CHECK_EQ(square[i], modulo(Uint128{a[i]} * a[i], q));
    }
  });
}

TEST(products) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    const Rows a = rows_of(4, n, q, q, 5), b = rows_of(4, n, q, q, 6);
    for (std::size_t k = 0; k < a.size(); ++k) {
      check_pairs(
          a[k], b[k], [q](auto x, auto y) { return modulo(Uint128{x} * y, q); },
          [&](auto x, auto y, auto out, Isa isa) { row.multiply(x, y, out, n, isa); });
      for (const std::uint64_t w : scalars(q)) {
        check_pairs(
            a[k], a[k], [q, w](auto x, auto) { return modulo(Uint128{x} * w, q); },
            [&](auto x, auto, auto out, Isa isa) { row.multiply_scalar(x, w, out, n, isa); });
      }
    }
  });
}

// Where the rounded quotient is hardest to place: products next to half-integer and integer multiples of q.
TEST(products_near_multiples) {
  for (const std::uint64_t q : primes()) {
    const ResidueRow row(q);
    std::mt19937_64 generator(q);
    constexpr std::size_t n = 4096;
    Words a(n), b(n), want(n), out(n);
    for (std::size_t i = 0; i < n; ++i) {
      // b = (m q + d) / a modulo q, with a b mod q = d near 0, q / 2 and q.
      const std::uint64_t near[] = {0, q / 2, q - 3};
      const std::uint64_t target = (near[i % 3] + generator() % 3) % q;
      a[i] = 1 + generator() % (q - 1);
      if (i % 2 == 0) a[i] = q - 1 - i;
      b[i] = row.modulus().mul(target, row.modulus().inv(a[i]));
      want[i] = target;
    }
    for (const Isa isa : usable_isas()) {
      row.multiply(a.data(), b.data(), out.data(), n, isa);
      CHECK(out == want);
      const std::uint64_t* const left[] = {a.data(), a.data()};
      const std::uint64_t* const right[] = {b.data(), b.data()};
      row.inner_product(left, right, 2, out.data(), n, isa);
      for (std::size_t i = 0; i < n; ++i) CHECK_EQ(out[i], 2 * want[i] % q);
    }
  }
}

TEST(products_of_the_largest_words) {
  for (const std::uint64_t q : primes()) {
    const ResidueRow row(q);
    std::mt19937_64 generator(q + 1);
    Words a(4096), b(4096);
    for (std::uint64_t& word : a) word = q - 1 - generator() % (q / 64);
    for (std::uint64_t& word : b) word = q - 1 - generator() % (q / 64);
    check_pairs(
        a, b, [q](auto x, auto y) { return modulo(Uint128{x} * y, q); },
        [&](auto x, auto y, auto out, Isa isa) { row.multiply(x, y, out, a.size(), isa); });
  }
}

TEST(reduction_of_52_bit_words) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    for (const Words& a : rows_of(6, n, q, kTwo52, 8)) {
      check_pairs(
          a, a, [q](auto x, auto) { return x % q; },
          [&](auto x, auto, auto out, Isa isa) { row.reduce(x, out, n, isa); });
    }
    Words multiples(n);
    for (std::size_t i = 0; i < n; ++i) multiples[i] = (kTwo52 / q - i / 2 % (kTwo52 / q)) * q - i % 2;
    check_pairs(
        multiples, multiples, [q](auto x, auto) { return x % q; },
        [&](auto x, auto, auto out, Isa isa) { row.reduce(x, out, n, isa); });
  });
}

TEST(inner_products) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    const Rows a = rows_of(9, n, q, q, 9), b = rows_of(9, n, q, q, 10), top = rows_of(1, n, q, q, 0);
    for (const std::size_t terms : {1, 2, 3, 4, 5, 6, 7, 12, 13, 31}) {
      for (const bool extreme : {false, true}) {
        const auto x = pointers(extreme ? top : a, terms), y = pointers(extreme ? top : b, terms);
        Words want(n);
        for (std::size_t i = 0; i < n; ++i) {
          Uint128 sum = 0;
          for (std::size_t t = 0; t < terms; ++t) sum += Uint128{x[t][i]} * y[t][i];
          want[i] = modulo(sum, q);
        }
        for (const Isa isa : usable_isas()) {
          Words out(n + 16, 77), guarded = want;
          guarded.insert(guarded.end(), 16, 77);
          row.inner_product(x.data(), y.data(), terms, out.data(), n, isa);
          CHECK(out == guarded);
          Rows left = extreme ? top : a;
          row.inner_product(pointers(left, terms).data(), y.data(), terms, left[0].data(), n, isa);
          CHECK(left[0] == want);
        }
      }
    }
  });
}

TEST(linear_combinations) {
  for_each_case([](const ResidueRow& row, std::uint64_t q, std::size_t n) {
    const Rows a = rows_of(9, n, q, kTwo52, 11), top = rows_of(1, n, q, kTwo52, 0);
    const Words random = row_of(64, q, q, 12);
    for (const std::size_t terms : {1, 2, 3, 4, 5, 6, 7, 12, 13, 31}) {
      // Weights: random; all the largest; the two at the middle, where a centred weight is longest.
      for (int kind = 0; kind < 4; ++kind) {
        const auto x = pointers(kind == 0 ? a : top, terms);
        Words w(terms, kind == 1 ? q - 1 : kind == 2 ? q / 2 : q / 2 + 1), want(n);
        if (kind == 0) std::copy(random.begin(), random.begin() + static_cast<std::ptrdiff_t>(terms), w.begin());
        for (std::size_t i = 0; i < n; ++i) {
          Uint128 sum = 0;
          for (std::size_t t = 0; t < terms; ++t) sum += Uint128{x[t][i]} * w[t];
          want[i] = modulo(sum, q);
        }
        for (const Isa isa : usable_isas()) {
          Words out(n + 16, 77), guarded = want;
          guarded.insert(guarded.end(), 16, 77);
          row.linear_combination(x.data(), w.data(), terms, out.data(), n, isa);
          CHECK(out == guarded);
          Rows in_place = kind == 0 ? a : top;
          row.linear_combination(pointers(in_place, terms).data(), w.data(), terms, in_place[0].data(), n, isa);
          CHECK(in_place[0] == want);
        }
      }
    }
  });
}

TEST(the_longest_sums) {
  for (const std::uint64_t q : primes()) {
    const ResidueRow row(q);
    constexpr std::size_t n = 48;
    const Words top_weights(kMaxTerms, q - 1);
    const Rows top = rows_of(1, n, q, q, 0), top52 = rows_of(1, n, q, kTwo52, 0);
    const Rows mixed = rows_of(40, n, q, q, 13), mixed52 = rows_of(40, n, q, kTwo52, 14);
    const Words weights = row_of(kMaxTerms, q, q, 15);
    for (const bool extreme : {false, true}) {
      const auto a = pointers(extreme ? top : mixed, kMaxTerms), a52 = pointers(extreme ? top52 : mixed52, kMaxTerms);
      const Words& w = extreme ? top_weights : weights;
      Words products(n), combination(n), out(n);
      for (std::size_t i = 0; i < n; ++i) {
        Uint128 squares = 0, weighted = 0;
        for (std::size_t t = 0; t < kMaxTerms; ++t) {
          squares += Uint128{a[t][i]} * a[t][i];
          weighted += Uint128{a52[t][i]} * w[t];
        }
        products[i] = modulo(squares, q);
        combination[i] = modulo(weighted, q);
      }
      for (const Isa isa : usable_isas()) {
        row.inner_product(a.data(), a.data(), kMaxTerms, out.data(), n, isa);
        CHECK(out == products);
        row.linear_combination(a52.data(), w.data(), kMaxTerms, out.data(), n, isa);
        CHECK(out == combination);
      }
    }
  }
}

TEST(base_conversions) {
  const std::size_t n = 272;
  for (std::size_t terms = 1; terms <= primes().size(); ++terms) {
    Rows a;
    std::vector<double> inverse;
    for (std::size_t t = 0; t < terms; ++t) {
      const std::uint64_t q = primes()[t];
      a.push_back(row_of(n, q, q, 16 + t));
      std::fill(a[t].begin(), a[t].begin() + 16, q - 1);
      inverse.push_back(1.0 / static_cast<double>(q));
    }
    Words times(n);
    for (std::size_t i = 0; i < n; ++i) {
      volatile double sum = 0;  // every step rounded
      long double exact = 0;
      for (std::size_t t = 0; t < terms; ++t) {
        volatile double term = static_cast<double>(a[t][i]) * inverse[t];
        sum = sum + term;
        exact += static_cast<long double>(a[t][i]) / static_cast<long double>(primes()[t]);
      }
      times[i] = static_cast<std::uint64_t>(std::floor(0.5 + sum));
      CHECK_LE(times[i], terms);
      CHECK_LE(std::fabs(static_cast<double>(times[i] - exact)), 0.5 + 1e-12);
    }
    // All primes at once, with weights as they come and the largest; whole rows and parts of them.
    for (const bool extreme : {false, true}) {
      for (const auto& [begin, end] : {std::pair{std::size_t{0}, n}, {16, 32}, {128, 256}, {112, 272}}) {
        Rows want, weights;
        for (const std::uint64_t q : primes()) {
          weights.push_back(extreme ? Words(terms + 1, q - 1) : row_of(terms + 1, q, q, 40));
          want.emplace_back(n, 77);
          for (std::size_t i = begin; i < end; ++i) {
            Uint128 sum = Uint128{times[i]} * weights.back()[terms];
            for (std::size_t t = 0; t < terms; ++t) sum += Uint128{a[t][i]} * weights.back()[t];
            want.back()[i] = modulo(sum, q);
          }
        }
        for (const Isa isa : usable_isas()) {
          Rows out(want.size(), Words(n, 77));
          std::vector<ResidueRow> rows(primes().begin(), primes().end());
          std::vector<privtuner::ring::kernels::ConversionTarget> targets;
          for (std::size_t k = 0; k < rows.size(); ++k) {
            targets.push_back(rows[k].target(weights[k].data(), out[k].data()));
          }
          convert_rows(pointers(a, terms).data(), inverse.data(), terms, targets.data(), targets.size(), begin, end,
                       isa);
          CHECK(out == want);
        }
      }
    }
  }
}

// The most rows, all words and weights the largest.
TEST(the_longest_base_conversions) {
  constexpr std::size_t n = 48;
  for (const std::uint64_t q : primes()) {
    const ResidueRow row(q);
    const Words top(n, primes()[0] - 1), weights(kMaxConverted + 1, q - 1);
    const Rows a(1, top);
    const std::vector<double> inverse(kMaxConverted, 1.0 / static_cast<double>(primes()[0]));
    const std::uint64_t all = kMaxConverted;  // every term is next to 1
    const std::uint64_t want = modulo(Uint128{kMaxConverted} * top[0] * (q - 1) % q + Uint128{all} * (q - 1), q);
    for (const Isa isa : usable_isas()) {
      Words out(n);
      const auto target = row.target(weights.data(), out.data());
      convert_rows(pointers(a, kMaxConverted).data(), inverse.data(), kMaxConverted, &target, 1, 0, n, isa);
      CHECK(out == Words(n, want));
    }
  }
}

TEST(automorphisms) {
  for (const std::size_t n : {16u, 32u, 256u, 4096u}) {
    std::size_t bits = 0;
    while ((std::size_t{1} << bits) < n) ++bits;
    const auto reverse = [bits](std::size_t k) {
      std::size_t result = 0;
      for (std::size_t bit = 0; bit < bits; ++bit) result = 2 * result + (k >> bit & 1);
      return result;
    };
    std::mt19937_64 generator(n);
    Words a(n);
    for (std::uint64_t& word : a) word = generator();
    const auto order = static_cast<std::uint32_t>(2 * n);
    for (const std::uint32_t element : {1u, 3u, 5u, 7u, 25u, order / 2 - 1, order / 2 + 1, order - 5, order - 1}) {
      const Automorphism automorphism(n, element);
      // Word i is the value at psi^(2 brv(i) + 1) and becomes that at its element-th power.
      Words want(n);
      for (std::size_t i = 0; i < n; ++i) want[i] = a[reverse((2 * reverse(i) + 1) * element % order / 2)];
      for (const Isa isa : usable_isas()) {
        for (std::size_t words = 8; words <= n; words *= 4) {
          Words out(n + 16, 77), guarded = want;
          guarded.insert(guarded.end(), 16, 77);
          for (std::size_t begin = 0; begin < n; begin += words) {
            const std::size_t source = automorphism.source(begin, words);
            CHECK_EQ(source % words, 0u);
            const Words block(a.begin() + static_cast<std::ptrdiff_t>(source),
                              a.begin() + static_cast<std::ptrdiff_t>(source + words));
            automorphism.permute(block.data(), begin, words, out.data() + begin, isa);
          }
          CHECK(out == guarded);
        }
      }
    }
  }
}

TEST(what_has_no_row_is_refused) {
  for (const std::uint64_t q : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{65521},
                                std::uint64_t{65536}, std::uint64_t{65541}, kTwo50, kTwo50 - 1,
                                std::uint64_t{4293918723}, std::uint64_t{4503599627370449}, ~std::uint64_t{0}}) {
    CHECK_THROWS(std::invalid_argument, ResidueRow(q),
                 "modulo " + std::to_string(q) + ": choose a prime between 2^16 and 2^50");
  }
  CHECK_EQ(ResidueRow(65537).modulus().q, 65537u);

  const ResidueRow row(65537);
  const Words a(32, 1);
  const std::uint64_t* const rows[] = {a.data()};
  const double inverse[] = {1.0};
  Words out(32);
  const Isa isa = Isa::portable;
  const std::string length = "a row of 17 words: pass a multiple of 16";
  CHECK_THROWS(std::invalid_argument, row.add(a.data(), a.data(), out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.subtract(a.data(), a.data(), out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.negate(a.data(), out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.multiply(a.data(), a.data(), out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.multiply_scalar(a.data(), 1, out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.add_scalar(a.data(), 1, out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.reduce(a.data(), out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.inner_product(rows, rows, 1, out.data(), 17, isa), length);
  CHECK_THROWS(std::invalid_argument, row.linear_combination(rows, a.data(), 1, out.data(), 17, isa), length);
  const auto target = row.target(a.data(), out.data());
  CHECK_THROWS(std::invalid_argument, convert_rows(rows, inverse, 1, &target, 1, 0, 17, isa), length);
  CHECK_THROWS(std::invalid_argument, convert_rows(rows, inverse, 1, &target, 1, 17, 32, isa), length);
  for (const std::size_t terms : {std::size_t{0}, kMaxTerms + 1}) {
    const std::string sum = "a sum of " + std::to_string(terms) + " terms: pass 1 to 2048";
    CHECK_THROWS(std::invalid_argument, row.inner_product(rows, rows, terms, out.data(), 16, isa), sum);
    CHECK_THROWS(std::invalid_argument, row.linear_combination(rows, a.data(), terms, out.data(), 16, isa), sum);
  }
  for (const std::size_t terms : {std::size_t{0}, kMaxConverted + 1}) {
    CHECK_THROWS(std::invalid_argument, convert_rows(rows, inverse, terms, &target, 1, 0, 16, isa),
                 "a base conversion of " + std::to_string(terms) + " rows: pass 1 to 64");
  }
  for (const auto& [size, element] : {std::pair{std::size_t{8}, 1u}, {24, 1}, {16, 0}, {16, 6}, {16, 33}}) {
    CHECK_THROWS(std::invalid_argument, Automorphism(size, element),
                 "no automorphism X -> X^" + std::to_string(element) + " of " + std::to_string(size) + " coefficients");
  }
  const Automorphism identity(32, 1);
  for (const auto& [begin, words] :
       {std::pair{std::size_t{0}, std::size_t{0}}, {0, 4}, {0, 24}, {8, 16}, {32, 8}, {0, 64}}) {
    const std::string block =
        "words " + std::to_string(begin) + " to " + std::to_string(begin + words) + " are no block of a row of 32";
    CHECK_THROWS(std::invalid_argument, identity.source(begin, words), block);
    CHECK_THROWS(std::invalid_argument, identity.permute(a.data(), begin, words, out.data(), isa), block);
  }
}

PRIVTUNER_TEST_MAIN
