#include "privtuner/ring/ntt.hpp"

#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"

using privtuner::math::AlignedVector;
using privtuner::math::Isa;
using privtuner::math::Modulus;
using privtuner::math::usable_isas;
using privtuner::ring::Ntt;

namespace {

constexpr std::uint64_t kPreset32 = 4293918721;        // 2^32 - 2^20 + 1
constexpr std::uint64_t kPreset50 = 1125899903827969;  // 2^50 - 23 * 2^17 + 1

const std::uint64_t kPrimes32[] = {97, 12289, 2147352577, kPreset32};
// The largest below 2^40 and 2^50 and the smallest above 2^50 that are 1 modulo 2^17: IFMA takes those below 2^50.
constexpr std::uint64_t kPrime40 = 1099510054913, kAbove50 = 1125899908022273;
// The last two: 2^60 - 2^18 + 1 and 2^61 - 2^21 + 1.
const std::uint64_t kPrimes64[] = {12289,    kPreset32,           kPrime40,           kPreset50,
                                   kAbove50, 1152921504606584833, 2305843009211596801};

template <class Word>
std::vector<std::uint64_t> primes() {
  if constexpr (sizeof(Word) == 4) return {std::begin(kPrimes32), std::end(kPrimes32)};
  return {std::begin(kPrimes64), std::end(kPrimes64)};
}

// Every (n, q) with lowest <= n <= highest that has a transform.
template <class Word, class Body>
void for_each_ring(std::size_t lowest, std::size_t highest, Body body) {
  int rings = 0;
  for (const std::uint64_t q : primes<Word>()) {
    for (std::size_t n = lowest; n <= highest; n *= 2) {
      if (q % (2 * n) != 1) continue;
      body(Ntt<Word>(n, q), n, q);
      ++rings;
    }
  }
  CHECK_LT(0, rings);
}

std::uint64_t mul(std::uint64_t a, std::uint64_t b, std::uint64_t q) {
  return static_cast<std::uint64_t>(static_cast<privtuner::math::Uint128>(a) * b % q);
}

std::uint64_t add(std::uint64_t a, std::uint64_t b, std::uint64_t q) { return (a + b) % q; }

std::size_t bit_reverse(std::size_t k, std::size_t n) {
  std::size_t reversed = 0;
  for (std::size_t low = 1, high = n / 2; low < n; low *= 2, high /= 2) {
    if (k & low) reversed |= high;
  }
  return reversed;
}

template <class Word>
AlignedVector<Word> random_residues(std::size_t n, std::uint64_t q, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  AlignedVector<Word> a(n);
  for (Word& word : a) word = static_cast<Word>(generator() % q);
  return a;
}

// Random residues, and residues at the ends of the range, where a lazy range that is too narrow shows.
template <class Word>
std::vector<AlignedVector<Word>> inputs(std::size_t n, std::uint64_t q) {
  const Word top = static_cast<Word>(q - 1);
  std::vector<AlignedVector<Word>> all;
  all.push_back(random_residues<Word>(n, q, n + q));
  all.emplace_back(n, Word{0});
  all.emplace_back(n, top);
  AlignedVector<Word> alternating(n), halves(n), pieces = random_residues<Word>(n, q, 3 * n + q);
  for (std::size_t i = 0; i < n; ++i) {
    alternating[i] = i % 2 == 0 ? Word{0} : top;
    halves[i] = i < n / 2 ? top : Word{0};
    if (pieces[i] % 3 != 0) pieces[i] = pieces[i] % 3 == 1 ? Word{0} : top;
  }
  all.push_back(alternating);
  all.push_back(halves);
  all.push_back(pieces);
  return all;
}

template <class Word>
AlignedVector<Word> forward(const Ntt<Word>& ntt, AlignedVector<Word> a, Isa isa) {
  ntt.forward(a.data(), isa);
  return a;
}

template <class Word>
AlignedVector<Word> inverse(const Ntt<Word>& ntt, AlignedVector<Word> a, Isa isa) {
  ntt.inverse(a.data(), isa);
  return a;
}

// a(psi^(2 brv(i) + 1)) by Horner's rule.
template <class Word>
std::uint64_t evaluate(const AlignedVector<Word>& a, std::size_t i, std::uint64_t q) {
  const Modulus modulus(q);
  const std::uint64_t psi = privtuner::math::primitive_root_of_unity(2 * a.size(), modulus);
  const std::uint64_t point = modulus.pow(psi, 2 * bit_reverse(i, a.size()) + 1);
  std::uint64_t value = 0;
  for (std::size_t j = a.size(); j-- > 0;) value = add(mul(value, point, q), a[j], q);
  return value;
}

template <class Word>
void check_direct_evaluation() {
  for_each_ring<Word>(16, 65536, [](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
    const std::size_t step = n <= 512 ? 1 : n / 32 + 1;  // every value of small transforms, 32 spread ones of large
    for (const AlignedVector<Word>& a : inputs<Word>(n, q)) {
      const AlignedVector<Word> values = forward(ntt, a, Isa::portable);
      for (std::size_t i = 0; i < n; i += step) CHECK_EQ(values[i], evaluate(a, i, q));
      CHECK_EQ(values[n - 1], evaluate(a, n - 1, q));
      if (n > 512) break;  // the random input
    }
  });
}

template <class Word>
void check_inverse() {
  for_each_ring<Word>(16, 65536, [](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
    for (const AlignedVector<Word>& a : inputs<Word>(n, q)) {
      CHECK(inverse(ntt, forward(ntt, a, Isa::portable), Isa::portable) == a);
      CHECK(forward(ntt, inverse(ntt, a, Isa::portable), Isa::portable) == a);
    }
  });
}

template <class Word>
void check_paths() {
  for (const Isa isa : usable_isas()) {
    for_each_ring<Word>(16, 65536, [isa](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
      for (AlignedVector<Word> a : inputs<Word>(n, q)) {
        const AlignedVector<Word> values = forward(ntt, a, Isa::portable);
        CHECK(forward(ntt, a, isa) == values);
        CHECK(inverse(ntt, a, isa) == inverse(ntt, a, Isa::portable));
        a.insert(a.end(), 16, Word{77});  // words behind the transform stay
        ntt.forward(a.data(), isa);
        CHECK(a == [&] {
          AlignedVector<Word> guarded = values;
          guarded.insert(guarded.end(), 16, Word{77});
          return guarded;
        }());
      }
    });
  }
}

template <class Word>
AlignedVector<Word> product(const Ntt<Word>& ntt, const AlignedVector<Word>& a, const AlignedVector<Word>& b, Isa isa) {
  AlignedVector<Word> prepared(2 * ntt.size()), out(ntt.size());
  ntt.prepare(forward(ntt, b, isa).data(), prepared.data());
  ntt.multiply(forward(ntt, a, isa).data(), prepared.data(), out.data(), isa);
  ntt.inverse(out.data(), isa);
  return out;
}

template <class Word>
AlignedVector<Word> schoolbook(const AlignedVector<Word>& a, const AlignedVector<Word>& b, std::uint64_t q) {
  const std::size_t n = a.size();
  AlignedVector<Word> out(n, Word{0});
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      const std::uint64_t term = mul(a[i], b[j], q);
      Word& target = out[(i + j) % n];
      target = static_cast<Word>(add(target, i + j < n ? term : q - term, q));
    }
  }
  return out;
}

template <class Word>
void check_scaled_inverse() {
  for_each_ring<Word>(16, 4096, [](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
    for (const AlignedVector<Word>& a : inputs<Word>(n, q)) {
      const AlignedVector<Word> plain = inverse(ntt, a, Isa::portable);
      for (const std::uint64_t factor : {std::uint64_t{0}, std::uint64_t{1}, q / 2, q - 1}) {
        AlignedVector<Word> want(n);
        for (std::size_t i = 0; i < n; ++i) want[i] = static_cast<Word>(mul(plain[i], factor, q));
        for (const Isa isa : usable_isas()) {
          AlignedVector<Word> scaled = a;
          ntt.inverse(scaled.data(), isa, factor);
          CHECK(scaled == want);
        }
      }
    }
  });
}

template <class Word>
void check_products() {
  for_each_ring<Word>(16, 512, [](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
    const std::vector<AlignedVector<Word>> all = inputs<Word>(n, q);
    for (std::size_t k = 0; k < all.size(); ++k) {
      const AlignedVector<Word>&a = all[k], &b = all[(5 * k + 2) % all.size()];
      const AlignedVector<Word> want = schoolbook(a, b, q);
      for (const Isa isa : usable_isas()) CHECK(product(ntt, a, b, isa) == want);
    }
  });
}

template <class Word>
void check_multiply() {
  for_each_ring<Word>(16, 4096, [](const Ntt<Word>& ntt, std::size_t n, std::uint64_t q) {
    const std::vector<AlignedVector<Word>> all = inputs<Word>(n, q);
    for (const AlignedVector<Word>& a : all) {
      for (const AlignedVector<Word>& b : all) {
        AlignedVector<Word> prepared(2 * n), want(n);
        ntt.prepare(b.data(), prepared.data());
        for (std::size_t i = 0; i < n; ++i) want[i] = static_cast<Word>(mul(a[i], b[i], q));
        for (const Isa isa : usable_isas()) {
          AlignedVector<Word> out(n, Word{5}), in_place = a;
          ntt.multiply(a.data(), prepared.data(), out.data(), isa);
          ntt.multiply(in_place.data(), prepared.data(), in_place.data(), isa);
          CHECK(out == want);
          CHECK(in_place == want);
        }
      }
    }
  });
}

}  // namespace

TEST(forward_is_evaluation_32) { check_direct_evaluation<std::uint32_t>(); }
TEST(forward_is_evaluation_64) { check_direct_evaluation<std::uint64_t>(); }
TEST(inverse_undoes_forward_32) { check_inverse<std::uint32_t>(); }
TEST(inverse_undoes_forward_64) { check_inverse<std::uint64_t>(); }
TEST(inverse_times_a_factor_32) { check_scaled_inverse<std::uint32_t>(); }
TEST(inverse_times_a_factor_64) { check_scaled_inverse<std::uint64_t>(); }
TEST(every_path_gives_the_portable_words_32) { check_paths<std::uint32_t>(); }
TEST(every_path_gives_the_portable_words_64) { check_paths<std::uint64_t>(); }
TEST(product_is_negacyclic_convolution_32) { check_products<std::uint32_t>(); }
TEST(product_is_negacyclic_convolution_64) { check_products<std::uint64_t>(); }
TEST(multiply_is_pointwise_32) { check_multiply<std::uint32_t>(); }
TEST(multiply_is_pointwise_64) { check_multiply<std::uint64_t>(); }

TEST(x_times_x_to_the_n_minus_1_is_minus_1) {
  const Ntt<std::uint32_t> ntt(2048, kPreset32);
  AlignedVector<std::uint32_t> x(2048, 0u), power(2048, 0u), want(2048, 0u);
  x[1] = power[2047] = 1;
  want[0] = static_cast<std::uint32_t>(kPreset32 - 1);
  for (const Isa isa : usable_isas()) CHECK(product(ntt, x, power, isa) == want);
}

TEST(both_word_sizes_agree) {
  for (std::size_t n = 16; n <= 65536; n *= 2) {
    const Ntt<std::uint32_t> narrow(n, kPreset32);
    const Ntt<std::uint64_t> wide(n, kPreset32);
    const AlignedVector<std::uint32_t> a = random_residues<std::uint32_t>(n, kPreset32, n);
    const AlignedVector<std::uint64_t> b(a.begin(), a.end());
    for (const Isa isa : usable_isas()) {
      const AlignedVector<std::uint32_t> x = forward(narrow, a, isa), y = inverse(narrow, a, isa);
      CHECK((AlignedVector<std::uint64_t>(x.begin(), x.end()) == forward(wide, b, isa)));
      CHECK((AlignedVector<std::uint64_t>(y.begin(), y.end()) == inverse(wide, b, isa)));
    }
  }
}

TEST(sizes_and_moduli_that_have_no_transform_are_refused) {
  using Ntt32 = Ntt<std::uint32_t>;
  using Ntt64 = Ntt<std::uint64_t>;
  CHECK_THROWS(std::invalid_argument, Ntt32(8, kPreset32), "N = 8, q = 4293918721: N must be a power of two");
  CHECK_THROWS(std::invalid_argument, Ntt32(0, kPreset32), "N = 0, q = 4293918721: N must be a power of two");
  CHECK_THROWS(std::invalid_argument, Ntt32(48, 97), "N = 48, q = 97: N must be a power of two");
  CHECK_THROWS(std::invalid_argument, Ntt32(131072, kPreset32), "N must be a power of two in [16, 65536]");
  CHECK_THROWS(std::invalid_argument, Ntt32(2048, kPreset50), "q must be below 2^32");
  CHECK_THROWS(std::invalid_argument, Ntt64(2048, (std::uint64_t{1} << 61) + 4096 * 7 + 1), "q must be below 2^61");
  CHECK_THROWS(std::invalid_argument, Ntt64(4096, 12289), "N = 4096, q = 12289: q must be 1 modulo 2 N");
  CHECK_THROWS(std::invalid_argument, Ntt32(16, 33), "N = 16, q = 33: q must be prime");
  CHECK_THROWS(std::invalid_argument, Ntt32(16, 1), "N = 16, q = 1: q must be prime");
}

PRIVTUNER_TEST_MAIN
