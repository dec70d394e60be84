#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "privtuner/math/bytes.hpp"
#include "privtuner/math/cpu.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/math/modular.hpp"
#include "privtuner/math/parallel.hpp"

using namespace privtuner::math;

namespace {

// 2^31 - 2^17 + 1, 2^32 - 2^20 + 1, 2^50 - 23 * 2^17 + 1, 2^60 - 2^18 + 1, 2^61 - 2^21 + 1, and 2^61 - 1.
const std::uint64_t kPrimes[] = {3,
                                 5,
                                 17,
                                 97,
                                 12289,
                                 2147352577,
                                 4293918721,
                                 1125899903827969,
                                 1152921504606584833,
                                 2305843009211596801,
                                 2305843009213693951};

constexpr std::uint64_t kTop = ~std::uint64_t{0};

std::uint64_t mod(Uint128 x, std::uint64_t q) { return static_cast<std::uint64_t>(x % q); }

// Residues at both ends and in the middle of [0, q), and random ones.
std::vector<std::uint64_t> residues(std::uint64_t q) {
  std::vector<std::uint64_t> all{0, 1, 2 % q, q / 2, q / 2 + 1, q - 2, q - 1};
  std::mt19937_64 generator(q);
  for (int i = 0; i < 40; ++i) all.push_back(generator() % q);
  return all;
}

std::vector<std::uint64_t> words(std::uint64_t q) {
  std::vector<std::uint64_t> all{0,
                                 1,
                                 q - 1,
                                 q,
                                 q + 1,
                                 2 * q - 1,
                                 2 * q,
                                 kTop,
                                 kTop - 1,
                                 kTop / q * q,
                                 kTop / q * q - 1,
                                 kTop / 2,
                                 kTop / 2 + 1,
                                 kTop / 2 + 2};
  std::mt19937_64 generator(q + 1);
  for (int i = 0; i < 200; ++i) all.push_back(generator() >> (i % 64));
  return all;
}

}  // namespace

// First in the file: both settings are read from the environment at first use.
TEST(environment_settings_are_checked_then_obeyed) {
  for (const char* text : {"0", "1025", "2x", "-1", " "}) {
    setenv("PRIVTUNER_NUM_THREADS", text, 1);
    CHECK_THROWS(std::runtime_error, num_threads(), std::string("\"") + text + "\"; set a whole number from 1 to 1024");
  }
  setenv("PRIVTUNER_NUM_THREADS", "3", 1);
  CHECK_EQ(num_threads(), 3);

  setenv("PRIVTUNER_ISA", "sse2", 1);
  CHECK_THROWS(std::runtime_error, active_isa(), "\"sse2\"; choose portable, avx2, avx512, avx512ifma or amx");
  for (const auto& [isa, name, base] : kIsaPaths) {
    if (isa_usable(isa)) continue;
    setenv("PRIVTUNER_ISA", name, 1);
    CHECK_THROWS(std::runtime_error, active_isa(), "cannot be used: " + isa_obstacle(isa));
    CHECK_THROWS(std::runtime_error, set_active_isa(isa), "cannot be used: " + isa_obstacle(isa));
  }
  setenv("PRIVTUNER_ISA", "portable", 1);
  CHECK_EQ(active_isa(), Isa::portable);
  for (const Isa isa : usable_isas()) {
    set_active_isa(isa);
    CHECK_EQ(active_isa(), isa);
  }
}

TEST(isa_names_and_order) {
  for (const auto& [isa, name, base] : kIsaPaths) {
    CHECK_EQ(isa_from_name(name), isa);
    CHECK_EQ(std::string(isa_name(isa)), name);
  }
  CHECK_THROWS(std::invalid_argument, isa_from_name("AVX2"), "unknown instruction-set path \"AVX2\"");
  CHECK_THROWS(std::invalid_argument, isa_from_name(""), "choose portable, avx2, avx512, avx512ifma or amx");
  CHECK_EQ(usable_isas().front(), Isa::portable);
  for (const auto& [isa, name, base] : kIsaPaths) {
    const std::vector<Isa> usable = usable_isas();
    CHECK_EQ(isa_usable(isa), isa_obstacle(isa).empty());
    CHECK_EQ(isa_usable(isa), std::find(usable.begin(), usable.end(), isa) != usable.end());
    CHECK_LE(isa_usable(isa), isa_compiled(isa));
    CHECK_LE(isa_usable(isa), isa_usable(base));  // a path needs all that its base needs
  }
}

TEST(arithmetic_agrees_with_128_bit_integers) {
  for (const std::uint64_t q : kPrimes) {
    const Modulus m(q);
    CHECK_EQ(m.two64, mod(Uint128{1} << 64, q));
    for (const std::uint64_t a : residues(q)) {
      CHECK_EQ(m.neg(a), mod(Uint128{q} - a, q));
      CHECK_EQ(m.shoup(a), static_cast<std::uint64_t>((Uint128{a} << 64) / q));
      for (const std::uint64_t b : residues(q)) {
        CHECK_EQ(m.add(a, b), mod(Uint128{a} + b, q));
        CHECK_EQ(m.sub(a, b), mod(Uint128{a} + q - b, q));
        CHECK_EQ(m.mul(a, b), mod(Uint128{a} * b, q));
      }
      for (const std::uint64_t x : words(q)) CHECK_EQ(m.mul_shoup(x, a, m.shoup(a)), mod(Uint128{x} * a, q));
    }
  }
}

TEST(reduce_takes_every_word) {
  for (const std::uint64_t q : kPrimes) {
    const Modulus m(q);
    for (const std::uint64_t x : words(q)) {
      CHECK_EQ(m.reduce(x), x % q);
      const Uint128 shifted = (Uint128{1} << 64) * q + x - (x >> 63 ? Uint128{1} << 64 : 0);  // signed x, plus 2^64 q
      CHECK_EQ(m.reduce_signed(static_cast<std::int64_t>(x)), mod(shifted, q));
    }
    CHECK_EQ(m.reduce_signed(-1), q - 1);
    CHECK_EQ(m.reduce_signed(INT64_MIN), (q - (std::uint64_t{1} << 63) % q) % q);
    CHECK_EQ(m.reduce_signed(INT64_MAX), (kTop >> 1) % q);
  }
}

TEST(powers_and_inverses) {
  for (const std::uint64_t q : kPrimes) {
    const Modulus m(q);
    for (const std::uint64_t a : residues(q)) {
      std::uint64_t power = 1;
      for (std::uint64_t e = 0; e < 20; ++e, power = mod(Uint128{power} * a, q)) CHECK_EQ(m.pow(a, e), power);
      if (a == 0) continue;
      CHECK_EQ(m.pow(a, q - 1), 1u);
      CHECK_EQ(mod(Uint128{m.inv(a)} * a, q), 1u);
    }
    CHECK_THROWS(std::invalid_argument, m.inv(0), "0 has no inverse modulo " + std::to_string(q));
  }
}

TEST(lengths_of_moduli) {
  const std::pair<std::uint64_t, int> known[] = {{3, 2},
                                                 {5, 3},
                                                 {7, 3},
                                                 {127, 7},
                                                 {131, 8},
                                                 {4294967291u, 32},
                                                 {4294967311u, 33},
                                                 {1152921504606846883u, 60},
                                                 {2305843009213693951u, 61}};
  for (const auto& [q, bits] : known) CHECK_EQ(Modulus(q).bits(), bits);
}

TEST(moduli_that_are_not_odd_primes_below_2_61_are_refused) {
  for (const std::uint64_t q : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{2}, std::uint64_t{9},
                                std::uint64_t{4096}, std::uint64_t{2305843009213693967},  // the first prime above 2^61
                                std::uint64_t{18446744073709551557u}}) {                  // the last prime below 2^64
    CHECK_THROWS(std::invalid_argument, Modulus(q), std::to_string(q) + " is not an odd prime in (2, 2^61)");
  }
}

TEST(small_primes_agree_with_a_sieve) {
  constexpr std::size_t kLimit = 200000;
  std::vector<bool> composite(kLimit, false);
  for (std::size_t n = 0; n < kLimit; ++n) {
    const bool prime = n >= 2 && !composite[n];
    CHECK_EQ(is_prime(n), prime);
    for (std::size_t k = n * n; prime && k < kLimit; k += n) composite[k] = true;
  }
}

TEST(pseudoprimes_are_composite) {
  // Strong pseudoprimes to base 2; the least ones to all of the first 2, ..., 11 primes (Jaeschke; Jiang, Deng);
  // Carmichael numbers; divisors of the bases used; squares.
  for (const std::uint64_t n :
       {2047u,    3277u,      4033u,       4681u, 8321u,  15841u, 29341u,  42799u,   49141u,     52633u,
        1373653u, 25326001u,  3215031751u, 561u,  1105u,  1729u,  2465u,   2821u,    6601u,      8911u,
        825265u,  321197185u, 325u,        9375u, 14089u, 28178u, 450775u, 9780504u, 1795265022u}) {
    CHECK(!is_prime(n));
  }
  for (const std::uint64_t n : {2152302898747u, 3474749660383u, 341550071728321u, 3825123056546413051u, 9746347772161u,
                                18446744030759878681u, 18446744073709551615u, 18446744073709551556u}) {
    CHECK(!is_prime(n));
  }
}

TEST(large_primes_are_prime) {
  for (const std::uint64_t q : kPrimes) CHECK(is_prime(q));
  for (const std::uint64_t n : {4294967291u, 73u, 193u, 28657u}) CHECK(is_prime(n));
  for (const std::uint64_t n : {2305843009213693967u, 18446744073709551557u, 18446744073709551533u}) CHECK(is_prime(n));
}

TEST(primitive_roots_of_unity) {
  const struct {
    std::uint64_t m, q, root;
  } table[] = {{16, 17, 3},  // 2^8 = 1 and 3^8 = -1 modulo 17
               {32, 97, 28},
               {4096, 12289, 1331},
               {4096, 4293918721, 68871676},
               {131072, 4293918721, 2928850483},
               {4096, 1125899903827969, 745184048846956},
               {131072, 2305843009211596801, 1681162619342215248}};
  for (const auto& known : table) {
    CHECK_EQ(primitive_root_of_unity(known.m, Modulus(known.q)), known.root);
  }
  for (const std::uint64_t q : kPrimes) {
    const Modulus modulus(q);
    for (std::uint64_t m = 1; (q - 1) % m == 0; m *= 2) {
      const std::uint64_t root = primitive_root_of_unity(m, modulus);
      CHECK_EQ(modulus.pow(root, m), 1u);
      if (m > 1) CHECK_EQ(modulus.pow(root, m / 2), q - 1);
    }
  }
  CHECK_THROWS(std::invalid_argument, primitive_root_of_unity(8192, Modulus(12289)),
               "order 8192 is not a power of two");
  CHECK_THROWS(std::invalid_argument, primitive_root_of_unity(3, Modulus(97)), "order 3 is not a power of two");
  CHECK_THROWS(std::invalid_argument, primitive_root_of_unity(0, Modulus(97)), "order 0 is not a power of two");
}

TEST(parallel_for_covers_each_index_once) {
  for (const int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (const std::size_t count : {0, 1, 2, 7, 64, 1000, 1001}) {
      for (const std::size_t grain : {1, 2, 3, 64, 5000}) {
        std::vector<std::atomic<int>> seen(count);
        std::atomic<std::size_t> longest{0};
        parallel_for(count, grain, [&](std::size_t begin, std::size_t end) {
          std::size_t before = longest.load();
          while (before < end - begin && !longest.compare_exchange_weak(before, end - begin)) {
          }
          for (std::size_t i = begin; i < end; ++i) ++seen[i];
        });
        for (const std::atomic<int>& times : seen) CHECK_EQ(times.load(), 1);
        CHECK_EQ(longest.load(), std::min(count, grain));
      }
    }
  }
}

TEST(parallel_for_runs_on_several_threads_at_once) {
  set_num_threads(4);
  std::atomic<int> waiting{0};
  parallel_for(4, 1, [&](std::size_t, std::size_t) {  // ends only if four threads are inside together
    ++waiting;
    while (waiting.load() < 4) std::this_thread::yield();
  });
  CHECK_EQ(waiting.load(), 4);
}

TEST(parallel_for_rethrows_and_stops) {
  for (const int threads : {1, 4}) {
    set_num_threads(threads);
    std::atomic<int> inside{0}, calls{0};
    const auto body = [&](std::size_t begin, std::size_t) {
      ++inside;
      ++calls;
      if (begin == 10) {
        --inside;
        throw std::out_of_range("index 10");
      }
      --inside;
    };
    CHECK_THROWS(std::out_of_range, parallel_for(1000000, 1, body), "index 10");
    CHECK_EQ(inside.load(), 0);
    CHECK_LT(calls.load(), 1000000);
    std::atomic<int> after{0};
    parallel_for(100, 7, [&](std::size_t begin, std::size_t end) { after += static_cast<int>(end - begin); });
    CHECK_EQ(after.load(), 100);
  }
}

TEST(parallel_for_may_be_nested) {
  set_num_threads(4);
  std::vector<std::atomic<int>> seen(40 * 50);
  CHECK_EQ(threads_here(), 4);
  parallel_for(40, 3, [&](std::size_t begin, std::size_t end) {
    if (threads_here() != 1) throw std::logic_error("a nested loop would use several threads");
    for (std::size_t i = begin; i < end; ++i) {
      parallel_for(50, 4, [&, outer = std::this_thread::get_id()](std::size_t low, std::size_t high) {
        if (std::this_thread::get_id() != outer) throw std::logic_error("a nested loop left its thread");
        for (std::size_t j = low; j < high; ++j) ++seen[i * 50 + j];
      });
    }
  });
  for (const std::atomic<int>& times : seen) CHECK_EQ(times.load(), 1);
  const auto thrower = [](std::size_t, std::size_t) {
    parallel_for(5, 1, [](std::size_t, std::size_t) { throw std::domain_error("inner"); });
  };
  CHECK_THROWS(std::domain_error, parallel_for(8, 1, thrower), "inner");
}

TEST(thread_counts_and_grains_out_of_range_are_refused) {
  for (const int n : {0, -1, 1025}) {
    CHECK_THROWS(std::invalid_argument, set_num_threads(n), "num_threads is " + std::to_string(n));
  }
  set_num_threads(1024);
  CHECK_EQ(num_threads(), 1024);
  CHECK_THROWS(std::invalid_argument, parallel_for(1, 0, [](std::size_t, std::size_t) {}), "grain is 0");
}

TEST(checksums_in_parts_are_those_of_the_whole) {
  std::vector<std::uint8_t> data(400);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<std::uint8_t>(i * 37 + 11);
  for (std::size_t size = 0; size < data.size(); ++size) {
    Checksum whole, parts;
    whole.add(data.data(), 56);
    whole.add(data.data(), size);
    parts.add(data.data(), 56);
    for (std::size_t part = Checksum::kParts; part-- > 0;) parts.add_part(part, data.data(), size);
    parts.add_length(size);
    CHECK_EQ(parts.value(), whole.value());
    if (size == 0) continue;
    Checksum changed;
    changed.add(data.data(), 56);
    data[size - 1] ^= 1;
    changed.add(data.data(), size);
    data[size - 1] ^= 1;
    CHECK(changed.value() != whole.value());
  }
}

TEST(buffers_are_aligned_and_wiped) {
  for (std::size_t n : {1, 3, 64, 1000}) {
    AlignedVector<std::uint8_t> bytes(n, std::uint8_t{7});
    CHECK_EQ(reinterpret_cast<std::uintptr_t>(bytes.data()) % kAlignment, 0u);
    secure_wipe(bytes.data() + n / 2, n - n / 2);
    for (std::size_t i = 0; i < n; ++i) CHECK_EQ(bytes[i], i < n / 2 ? 7 : 0);
  }
  SecretBuffer<std::uint32_t> secret(5);
  secret[4] = 9;
  SecretBuffer<std::uint32_t> moved(std::move(secret));
  CHECK_EQ(moved[4], 9u);
  SecretBuffer<std::uint32_t> assigned(2);
  assigned = std::move(moved);
  CHECK_EQ(assigned.size(), 5u);
  CHECK_EQ(assigned[4], 9u);
  assigned.wipe();
  CHECK_EQ(assigned.size(), 0u);
}

PRIVTUNER_TEST_MAIN
