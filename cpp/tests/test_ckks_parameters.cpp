// Parameters, the canonical embedding and the tables of base conversion, against definitions.
#include "privtuner/ckks/parameters.hpp"

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "privtuner/ckks/encoder.hpp"
#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/plaintext.hpp"

using namespace privtuner::ckks;
namespace math = privtuner::math;
using privtuner::ckks::Error;

namespace {

__extension__ typedef __int128 Int128;
__extension__ typedef unsigned __int128 Uint128;
using Complex = std::complex<long double>;
using Doubles = std::vector<double>;

constexpr double kUnit = 0x1p-53;
const long double kPi = std::acos(-1.0L);

ParametersPtr insecure(int depth, int scale_bits, int log_n = 10) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.log_n = log_n;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

ParametersPtr secure(int depth, int scale_bits, int log_n = 0) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.log_n = log_n;
  return std::make_shared<Parameters>(wish);
}

void check_set(const Parameters& p) {
  const Wish& wish = p.wish();
  const int first_bits = std::min(50, wish.scale_bits + 10);
  // The nearest primes of the progression that are left fill a window of `depth` average gaps, N ln q each.
  const double b = wish.scale_bits, window = p.depth() * static_cast<double>(p.n()) * b / std::exp2(b);
  std::set<std::uint64_t> seen;
  long double log_q = 0, log_p = 0;
  std::uint64_t special = 0;
  for (std::size_t i = 0; i < p.prime_count(); ++i) {
    const std::uint64_t q = p.prime(i).q;
    CHECK(seen.insert(q).second);
    CHECK(math::is_prime(q));
    CHECK_EQ(q % (2 * p.n()), std::uint64_t{1});
    const int bits = i == 0 ? first_bits : i < p.max_limbs() ? wish.scale_bits : kMaxPrimeBits;
    // Primes stay below the power of two wherever there are enough of them near the scale.
    const double slack = window < 0x1p-10 ? 0 : window;
    CHECK_LT(static_cast<double>(q), std::exp2(bits) * (1 + slack));
    if (i >= p.max_limbs()) special = std::max(special, q);
    (i < p.max_limbs() ? log_q : log_p) += std::log2(static_cast<long double>(q));
  }
  CHECK_LT(std::fabs(static_cast<double>(log_q) - p.log_q()), 1e-9);
  CHECK_LT(std::fabs(static_cast<double>(log_q + log_p) - p.log_qp()), 1e-9);
  CHECK_LT(std::fabs(p.log_special() - static_cast<double>(log_p)), 1e-9);

  const double tolerance = std::max(0x1p-8, window);
  for (int level = p.depth(); level >= 0; --level) {
    CHECK_LT(std::fabs(std::log2(p.scale(level)) - b), tolerance);
    if (level == 0) break;
    const double q = static_cast<double>(p.prime(p.limbs(level) - 1).q);
    CHECK_EQ(p.scale(level - 1), p.scale(level) * p.scale(level) / q);
  }

  // A digit is below the special modulus by what keeps the error of a key switch below a rounding's.
  for (std::size_t count = 1; count <= p.max_limbs(); ++count) {
    std::size_t next = 0;
    for (std::size_t d = 0; d < p.digits(count); ++d) {
      double log_digit = 0;
      for (const std::size_t i : p.digit_conversion(d, count).from) {
        CHECK_EQ(i, next++);
        log_digit += std::log2(static_cast<double>(p.prime(i).q));
      }
      CHECK_LT(log_digit + 4, p.log_special());
    }
    CHECK_EQ(next, count);
  }
}

std::uint64_t power(std::uint64_t base, std::uint64_t exponent, std::uint64_t modulus) {
  std::uint64_t result = 1;
  for (; exponent != 0; exponent >>= 1, base = static_cast<std::uint64_t>(Uint128{base} * base % modulus)) {
    if (exponent & 1) result = static_cast<std::uint64_t>(Uint128{result} * base % modulus);
  }
  return result;
}

std::uint64_t residue(Int128 value, std::uint64_t q) {
  const auto rest = static_cast<std::int64_t>(value % static_cast<Int128>(q));
  return static_cast<std::uint64_t>(rest < 0 ? rest + static_cast<std::int64_t>(q) : rest);
}

// Slots of real coefficients by the definition, m(zeta^(5^j)).
std::vector<Complex> direct_slots(const Doubles& coefficients) {
  const std::size_t n = coefficients.size();
  std::vector<Complex> slots(n / 2);
  std::size_t element = 1;
  for (std::size_t j = 0; j < n / 2; ++j, element = element * 5 % (2 * n)) {
    for (std::size_t k = 0; k < n; ++k) {
      const long double angle = kPi * static_cast<long double>(element * k % (2 * n)) / static_cast<long double>(n);
      slots[j] += static_cast<long double>(coefficients[k]) * Complex(std::cos(angle), std::sin(angle));
    }
  }
  return slots;
}

// Relative error in the Euclidean norm of an FFT of `stages` stages (Higham, "Accuracy and Stability of Numerical
// Algorithms", theorem 24.2): each stage adds mu + 4 sqrt(2) u, with mu = 12 u for roots from angles up to 2 pi that
// took four roundings.
double transform_error(std::size_t n) { return std::log2(static_cast<double>(n) / 2) * 18 * kUnit; }

}  // namespace

TEST(the_table_is_the_published_one) {
  // Bossuat et al., IACR ePrint 2024/463: uniform ternary secrets, 128 bits, classical.
  const double published[] = {106, 214, 430, 868, 1747};
  for (int log_n = 12; log_n <= 16; ++log_n) CHECK_EQ(max_log_modulus(log_n), published[log_n - 12]);
  for (const int log_n : {-1, 0, 10, 11, 17, 64}) CHECK_EQ(max_log_modulus(log_n), 0.0);
}

TEST(chains_of_insecure_sets) {
  for (int scale_bits = 25; scale_bits <= 49; ++scale_bits) {
    for (const int depth : {0, 1, 2, 5, 24}) {
      const auto p = insecure(depth, scale_bits);
      check_set(*p);
      CHECK_EQ(p->security_bits(), 0);
      CHECK_EQ(p->name(), "INSECURE-ckks-n1024-depth" + std::to_string(depth) + "-scale" + std::to_string(scale_bits));
    }
  }
}

TEST(chains_of_secure_sets) {
  for (const int depth : {0, 1, 3, 7, 13, 24}) {
    for (const int scale_bits : {25, 30, 32, 40, 49}) {
      if (depth == 24 && scale_bits == 49) continue;  // 32 limbs and more of N = 65536 add nothing but time
      const auto p = secure(depth, scale_bits);
      check_set(*p);
      CHECK_EQ(p->security_bits(), 128);
      CHECK_LE(p->log_qp(), max_log_modulus(p->log_n()));
      CHECK_EQ(p->name().rfind("ckks-n", 0), std::size_t{0});
      if (p->log_n() > 12) {  // no smaller ring would do
        CHECK_THROWS(std::invalid_argument, secure(depth, scale_bits, p->log_n() - 1), "no 128-bit secure set");
      }
    }
  }
}

TEST(no_wish_for_a_secure_set_gives_another) {
  // Modulus next to the bound, primes that are sparse next to the scale.
  for (const auto& [depth, scale_bits] : {std::pair{5, 21}, {5, 27}, {9, 27}, {13, 27}, {22, 30}, {14, 21}}) {
    try {
      CHECK_EQ(secure(depth, scale_bits)->security_bits(), 128);
    } catch (const std::invalid_argument& error) {
      const std::string text = error.what();
      CHECK(text.find("no 128-bit secure set of depth") == 0 || text.find("not enough primes below") == 0);
    }
  }
}

TEST(a_set_that_was_called_insecure_but_is_secure_says_so) {
  const auto p = insecure(1, 30, 13);
  CHECK_EQ(p->security_bits(), 128);
  CHECK_EQ(p->name(), std::string("ckks-n8192-depth1-scale30"));
  CHECK_EQ(p->hash(), secure(1, 30, 13)->hash());
}

TEST(wishes_out_of_range_are_refused) {
  const auto make = [](int depth, int scale_bits, int first_bits, int log_n, bool is_insecure) {
    return std::make_shared<Parameters>(Wish{depth, scale_bits, first_bits, log_n, is_insecure});
  };
  CHECK_THROWS(std::invalid_argument, make(-1, 40, 0, 0, true), "depth -1 is outside [0, 40]");
  CHECK_THROWS(std::invalid_argument, make(41, 40, 0, 0, true), "depth 41 is outside [0, 40]");
  CHECK_THROWS(std::invalid_argument, make(2, 19, 0, 0, true), "scale_bits 19 is outside [20, 49]");
  CHECK_THROWS(std::invalid_argument, make(2, 50, 0, 0, true), "scale_bits 50 is outside [20, 49]");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 39, 0, true), "first_bits 39 is outside [40, 50]");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 51, 0, true), "first_bits 51 is outside [40, 50]");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 0, 9, true), "log2 of the ring dimension 9 is outside [10, 16]");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 0, 17, true), "log2 of the ring dimension 17 is outside [10, 16]");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 0, 12, false), "at N = 4096: the modulus needs at least");
  CHECK_THROWS(std::invalid_argument, make(2, 40, 0, 11, false), "0 are allowed");
  CHECK_THROWS(std::invalid_argument, make(40, 49, 0, 0, false), "up to N = 65536");
  CHECK_THROWS(std::invalid_argument, make(40, 20, 0, 16, true), "not enough primes below 1048576");
}

TEST(the_hash_tells_sets_apart) {
  std::set<std::uint64_t> hashes;
  for (const int depth : {1, 2, 3}) {
    for (const int scale_bits : {30, 35, 40}) {
      for (const int log_n : {10, 11}) CHECK(hashes.insert(insecure(depth, scale_bits, log_n)->hash()).second);
    }
  }
  CHECK_EQ(insecure(2, 40)->hash(), insecure(2, 40)->hash());
  CHECK(insecure(2, 40)->hash() != std::make_shared<Parameters>(Wish{2, 40, 45, 10, true})->hash());
}

TEST(base_conversion_is_exact) {
  std::mt19937_64 random(1);
  for (const auto& p : {insecure(7, 30), insecure(6, 40), insecure(3, 25), insecure(2, 49)}) {
    std::vector<const BaseConversion*> conversions;
    for (std::size_t count = 1; count <= p->max_limbs(); ++count) {
      conversions.push_back(&p->last_conversion(count));
      conversions.push_back(&p->special_conversion(count, true));
      for (std::size_t d = 0; d < p->digits(count); ++d) conversions.push_back(&p->digit_conversion(d, count));
    }
    conversions.push_back(&p->special_conversion(1, false));
    std::size_t tried = 0;
    for (const BaseConversion* c : conversions) {
      double bits = 0;
      Int128 product = 1;
      for (const std::size_t i : c->from) bits += std::log2(static_cast<double>(p->prime(i).q));
      if (bits > 125) continue;
      ++tried;
      for (const std::size_t i : c->from) product *= static_cast<Int128>(p->prime(i).q);
      for (int turn = 0; turn < 20; ++turn) {
        // Random representatives in [-D/2, D/2], and small ones.
        Int128 x =
            static_cast<Int128>((Uint128{random()} << 64 | random()) % static_cast<Uint128>(product)) - product / 2;
        if (turn < 4) x = turn - 2;
        std::vector<std::uint64_t> y;
        double quotient = 0;
        for (std::size_t j = 0; j < c->from.size(); ++j) {
          const math::Modulus& q = p->prime(c->from[j]).row.modulus();
          y.push_back(q.mul(residue(x, q.q), c->inverse_cofactor[j]));
          quotient += static_cast<double>(y[j]) * c->inverse_prime[j];
        }
        const auto u = static_cast<std::uint64_t>(std::nearbyint(quotient));
        for (std::size_t i = 0; i < p->prime_count(); ++i) {
          const math::Modulus& q = p->prime(i).row.modulus();
          std::uint64_t sum = q.mul(q.reduce(u), c->weights[i][y.size()]);
          for (std::size_t j = 0; j < y.size(); ++j) sum = q.add(sum, q.mul(q.reduce(y[j]), c->weights[i][j]));
          CHECK_EQ(sum, residue(x, q.q));
          const bool inside = std::count(c->from.begin(), c->from.end(), i) != 0;
          if (!inside) CHECK_EQ(q.mul(c->inverse_product[i], residue(product, q.q)), std::uint64_t{1});
        }
      }
    }
    CHECK_LT(p->max_limbs() + 1, tried);
    for (std::size_t i = 0; i < p->prime_count(); ++i) {
      std::uint64_t special = 1;
      for (std::size_t s = p->max_limbs(); s < p->prime_count(); ++s) {
        special = static_cast<std::uint64_t>(Uint128{special} * p->prime(s).q % p->prime(i).q);
      }
      CHECK_EQ(p->special_product(i), special);
    }
  }
}

TEST(galois_elements_and_permutations) {
  const auto p = insecure(1, 30);
  const std::uint64_t order = 2 * p->n();
  for (const long long steps : {0LL, 1LL, 2LL, 17LL, 511LL, 512LL, 513LL, 1000000007LL}) {
    CHECK_EQ(galois_element(*p, steps), power(5, static_cast<std::uint64_t>(steps) % p->slots(), order));
    CHECK_EQ(galois_element(*p, steps) * std::uint64_t{galois_element(*p, -steps)} % order, std::uint64_t{1});
  }
  CHECK_EQ(conjugation_element(*p), order - 1);
  // Against the automorphism on coefficients.
  std::mt19937_64 random(2);
  const Prime& prime = p->prime(0);
  for (const std::uint32_t element : {1u, 5u, 25u, 2047u, 1023u, galois_element(*p, 100)}) {
    std::vector<std::uint64_t> a(p->n()), b(p->n());
    for (auto& word : a) word = random() % prime.q;
    for (std::size_t k = 0; k < p->n(); ++k) {
      const std::size_t to = k * element % order;
      b[to % p->n()] = to < p->n() ? a[k] : prime.row.modulus().neg(a[k]);
    }
    prime.ntt.forward(a.data(), math::Isa::portable);
    prime.ntt.forward(b.data(), math::Isa::portable);
    const auto index = galois_permutation(*p, element);
    for (std::size_t k = 0; k < p->n(); ++k) CHECK_EQ(a[index[k]], b[k]);
  }
}

TEST(encoder_known_answers) {
  for (const std::size_t n : {4u, 8u, 64u, 1024u}) {
    const Encoder encoder(n);
    CHECK_EQ(encoder.slots(), n / 2);
    // The constant 1 is the coefficient of X^0, i that of X^(N/2).
    Doubles re(n / 2, 1.0), im(n / 2, 0.0);
    encoder.to_coefficients(re.data(), im.data());
    for (std::size_t k = 0; k < n / 2; ++k) {
      CHECK_LE(std::fabs(re[k] - (k == 0)), transform_error(n) * std::sqrt(static_cast<double>(n)));
      CHECK_LE(std::fabs(im[k]), transform_error(n) * std::sqrt(static_cast<double>(n)));
    }
    std::fill(re.begin(), re.end(), 0.0);
    std::fill(im.begin(), im.end(), 1.0);
    encoder.to_coefficients(re.data(), im.data());
    CHECK_LE(std::fabs(im[0] - 1), transform_error(n) * std::sqrt(static_cast<double>(n)));
    // X is zeta^(5^j) in slot j.
    std::fill(re.begin(), re.end(), 0.0);
    std::fill(im.begin(), im.end(), 0.0);
    re[1 % (n / 2)] = 1;
    encoder.to_slots(re.data(), im.data());
    std::size_t element = 1;
    for (std::size_t j = 0; j < n / 2; ++j, element = element * 5 % (2 * n)) {
      const long double angle = kPi * static_cast<long double>(element) / static_cast<long double>(n);
      CHECK_LE(std::fabs(re[j] - std::cos(angle)), 40 * kUnit);
      CHECK_LE(std::fabs(im[j] - std::sin(angle)), 40 * kUnit);
    }
  }
}

TEST(encoder_against_the_definition) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  for (const std::size_t n : {4u, 16u, 64u, 256u}) {
    const Encoder encoder(n);
    Doubles coefficients(n);
    for (double& c : coefficients) c = normal(random);
    const auto exact = direct_slots(coefficients);
    Doubles both = coefficients;
    encoder.to_slots(both.data(), both.data() + n / 2);
    long double error = 0, size = 0;
    for (std::size_t j = 0; j < n / 2; ++j) {
      error += std::norm(Complex(both[j], both[j + n / 2]) - exact[j]);
      size += std::norm(exact[j]);
    }
    CHECK_LE(std::sqrt(error / size), static_cast<long double>(transform_error(n)));
    encoder.to_coefficients(both.data(), both.data() + n / 2);
    error = size = 0;
    for (std::size_t k = 0; k < n; ++k) {
      error +=
          (static_cast<long double>(both[k]) - coefficients[k]) * (static_cast<long double>(both[k]) - coefficients[k]);
      size += static_cast<long double>(coefficients[k]) * coefficients[k];
    }
    CHECK_LE(std::sqrt(error / size), static_cast<long double>(2 * transform_error(n) + kUnit));
  }
}

TEST(products_of_ring_elements_are_products_of_slots) {
  constexpr std::size_t n = 16;
  std::mt19937_64 random(4);
  Doubles a(n), b(n), product(n, 0.0);
  for (std::size_t k = 0; k < n; ++k) {
    a[k] = static_cast<double>(random() % 100);
    b[k] = static_cast<double>(random() % 100);
  }
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) product[(i + j) % n] += (i + j < n ? 1 : -1) * a[i] * b[j];
  }
  const Encoder encoder(n);
  for (Doubles* x : {&a, &b, &product}) encoder.to_slots(x->data(), x->data() + n / 2);
  for (std::size_t j = 0; j < n / 2; ++j) {
    const std::complex<double> wanted =
        std::complex<double>(a[j], a[j + n / 2]) * std::complex<double>(b[j], b[j + n / 2]);
    CHECK_LT(std::abs(wanted - std::complex<double>(product[j], product[j + n / 2])), 1e-9);
  }
}

TEST(encoding_rounds_what_is_scaled) {
  const auto p = insecure(1, 40);
  Doubles values(p->slots(), 0.75);
  Values view{values.data(), nullptr, p->slots(), 1, 1, 1};
  std::vector<std::int64_t> coefficients(p->n());
  encode(*p, view, 0, 0x1p40, coefficients.data());
  CHECK_EQ(coefficients[0], std::int64_t{3} << 38);
  for (std::size_t k = 1; k < p->n(); ++k) CHECK_LE(std::abs(coefficients[k]), 1);
  // Slots beyond the tokens are zero, strides are those of the view.
  Doubles wide(6 * 3);
  for (std::size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<double>(i);
  const Values part{wide.data(), wide.data(), 3, 6, 1, 3};
  encode(*p, part, 4, 0x1p30, coefficients.data());
  Doubles slots(p->n());
  for (std::size_t k = 0; k < p->n(); ++k) slots[k] = static_cast<double>(coefficients[k]);
  p->encoder().to_slots(slots.data(), slots.data() + p->slots());
  for (std::size_t j = 0; j < p->slots(); ++j) {
    const double wanted = j < 3 ? static_cast<double>(12 + j) : 0;
    CHECK_LT(std::fabs(slots[j] / 0x1p30 - wanted), 512 * 0x1p-30);  // half a unit in each of 1024 coefficients
    CHECK_LT(std::fabs(slots[j + p->slots()] / 0x1p30 - wanted), 512 * 0x1p-30);
  }
  CHECK_THROWS(Error, encode(*p, view, 0, 0x1p63, coefficients.data()), "pass 2^62");
  values[7] = std::numeric_limits<double>::infinity();
  CHECK_THROWS(Error, encode(*p, view, 0, 0x1p40, coefficients.data()), "pass 2^62");
}

TEST(residues_of_whole_numbers) {
  const auto p = insecure(2, 40);
  std::mt19937_64 random(5);
  for (std::size_t i = 0; i < p->prime_count(); ++i) {
    const math::Modulus& q = p->prime(i).row.modulus();
    for (const double value :
         {0.0, 1.0, -1.0, 0x1p52, -0x1p52, 0x1p53, 0x1p53 + 2, 0x1p62, -0x1p62, 0x1p100, -0x1p126}) {
      CHECK_EQ(residue_of(value, q), residue(static_cast<Int128>(value), q.q));
    }
    CHECK_EQ(residue_of(static_cast<double>(q.q), q), std::uint64_t{0});
    for (int turn = 0; turn < 200; ++turn) {
      const double value =
          std::ldexp(static_cast<double>(static_cast<std::int64_t>(random())), static_cast<int>(random() % 63));
      CHECK_EQ(residue_of(value, q), residue(static_cast<Int128>(value), q.q));
    }
    const std::uint64_t huge = static_cast<std::uint64_t>(Uint128{power(2, 900, q.q)} * 3 % q.q);
    CHECK_EQ(residue_of(std::ldexp(3.0, 900), q), huge);
  }
}

PRIVTUNER_TEST_MAIN
