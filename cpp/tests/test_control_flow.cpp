// No branch depends on a secret: each function runs on several secrets, one instruction at a time, and must take the
// same way. This looks at what the compiler made, whichever it was, on every path of this processor.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../src/linear/elements.hpp"
#include "check.hpp"
#include "privtuner/linear/preset.hpp"
#include "privtuner/ring/chacha20.hpp"
#include "privtuner/ring/ntt.hpp"
#include "privtuner/ring/residues.hpp"
#include "privtuner/ring/sampling.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>
#endif

namespace math = privtuner::math;
namespace ring = privtuner::ring;
namespace linear = privtuner::linear;

namespace {

std::vector<std::uintptr_t> way(std::size_t{1} << 21);  // addresses of instructions
volatile std::size_t steps = 0;

#if defined(__x86_64__) && defined(__linux__)

void on_step(int, siginfo_t*, void* context) {
  const std::size_t at = steps;
  if (at < way.size()) {
    way[at] = static_cast<std::uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  }
  steps = at + 1;
}

// The processor's trap flag: SIGTRAP after every instruction. Functions, so that no caller's red zone is written to.
__attribute__((noinline)) void start_stepping() {
  asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
}
__attribute__((noinline)) void stop_stepping() {
  asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
}

#else

void start_stepping() {}
void stop_stepping() {}

#endif

std::vector<std::uintptr_t> way_of(const std::function<void()>& work) {
  work();  // what is bound or filled at first use
  steps = 0;
  start_stepping();
  work();
  stop_stepping();
  CHECK_LT(steps, way.size());
  return {way.begin(), way.begin() + static_cast<std::ptrdiff_t>(steps)};
}

// The index of the first step that is another one in `b`, or -1.
std::ptrdiff_t parting(const std::vector<std::uintptr_t>& a, const std::vector<std::uintptr_t>& b) {
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) {
    if (a[i] != b[i]) return static_cast<std::ptrdiff_t>(i);
  }
  return a.size() == b.size() ? -1 : static_cast<std::ptrdiff_t>(std::min(a.size(), b.size()));
}

__attribute__((noinline)) std::int64_t branching(std::int64_t v) {
  if (v < 0) {
    asm volatile("" ::: "memory");
    return v + 7;
  }
  return v;
}

// False where single steps cannot be had: not x86-64, or an emulator without the trap flag.
bool can_step() {
#if defined(__x86_64__) && defined(__linux__)
  struct sigaction action{};
  action.sa_sigaction = &on_step;
  action.sa_flags = SA_SIGINFO;
  CHECK_EQ(sigaction(SIGTRAP, &action, nullptr), 0);
#endif
  volatile std::int64_t v = 1;
  const auto work = [&] { v = branching(v); };
  const std::vector<std::uintptr_t> positive = way_of(work);
  if (positive.empty()) {
    std::printf("       skipped: no single steps on this system\n");
    return false;
  }
  v = 1;
  CHECK_EQ(parting(positive, way_of(work)), -1);
  v = -1000;
  CHECK_NE(parting(positive, way_of(work)), -1);  // a branch is seen
  return true;
}

// fill(i) puts secret i where `work` finds it.
template <class Fill, class Work>
void check_one_way(const std::string& name, int secrets, Fill fill, Work work) {
  std::vector<std::uintptr_t> first;
  for (int i = 0; i < secrets; ++i) {
    fill(i);
    const std::vector<std::uintptr_t> found = way_of(work);
    if (i == 0) first = found;
    const std::ptrdiff_t at = parting(first, found);
    if (at >= 0) {
      check::fail(__FILE__, __LINE__,
                  name + ": secret " + std::to_string(i) + " takes another way at step " + std::to_string(at) + " of " +
                      std::to_string(first.size()));
    }
  }
  CHECK_LT(50u, first.size());
}

constexpr int kSecrets = 4;

// 0: zeros, 1: the largest, the others random.
template <class Word>
void fill_words(std::vector<Word>& words, int which, std::uint64_t q) {
  std::mt19937_64 random(static_cast<std::uint64_t>(which));
  for (Word& w : words) w = static_cast<Word>(which == 0 ? 0 : which == 1 ? q - 1 : random() % q);
}

void fill_bytes(void* out, std::size_t size, int which) {
  std::mt19937_64 random(static_cast<std::uint64_t>(which));
  for (std::size_t i = 0; i < size; ++i) static_cast<std::uint8_t*>(out)[i] = static_cast<std::uint8_t>(random());
}

std::string named(const char* what, math::Isa isa) { return std::string(what) + " " + math::isa_name(isa); }

// With tails of every kind of loop: 16, 8, 4, 2 and 1 tokens.
constexpr std::size_t kTokens = 31;

template <class Word>
void check_elements(const linear::Preset& preset, math::Isa isa) {
  const linear::Elements<Word>& loops = linear::elements<Word>(isa);
  std::vector<Word> mask(kTokens), out(kTokens);
  std::vector<std::int8_t> error(kTokens);
  std::vector<float> x(kTokens), y(kTokens);
  std::vector<double> scale(kTokens);
  std::vector<std::uint8_t> reply(4 * kTokens);
  const auto fill = [&](int which) {
    fill_words(mask, which, preset.q);
    std::mt19937_64 random(static_cast<std::uint64_t>(which + 100));
    for (std::size_t t = 0; t < kTokens; ++t) {
      error[t] = static_cast<std::int8_t>(which < 2 ? 42 * which - 21 : static_cast<int>(random() % 43) - 21);
      const double part = which < 2 ? 2 * which - 1 : static_cast<double>(random() % 2001) / 1000 - 1;
      x[t] = static_cast<float>(part * 0.99);
      scale[t] = static_cast<double>(preset.q) / 2;
    }
    fill_bytes(reply.data(), reply.size(), which);
    if (which < 2) std::fill(reply.begin(), reply.end(), static_cast<std::uint8_t>(which == 0 ? 255 : 0));
  };
  const std::string what = " of " + std::to_string(8 * sizeof(Word)) + " bits, ";
  check_one_way(named(("embed" + what).c_str(), isa), kSecrets, fill, [&] {
    loops.embed(preset, mask.data(), error.data(), x.data(), 1.0, scale.data(), kTokens, out.data());
  });
  check_one_way(named(("reveal" + what).c_str(), isa), kSecrets, fill, [&] {
    loops.reveal(preset, reply.data(), kTokens, 0, kTokens, mask.data(), 1.0, scale.data(), y.data());
  });
}

template <class Word>
void check_transform(std::uint64_t q, math::Isa isa) {
  const std::size_t n = isa == math::Isa::portable ? 32 : 256;  // vector kernels take no smaller ones
  const ring::Ntt<Word> ntt(n, q);
  std::vector<Word> a(n), given(n), prepared(2 * n);
  const auto fill = [&](int which) {
    fill_words(given, which, q);
    ntt.prepare(given.data(), prepared.data());
    a = given;
  };
  check_one_way(named("forward", isa), kSecrets, fill, [&] { ntt.forward(a.data(), isa); });
  check_one_way(named("inverse", isa), kSecrets, fill, [&] { ntt.inverse(a.data(), isa); });
  check_one_way(named("prepare", isa), kSecrets, fill, [&] { ntt.prepare(given.data(), prepared.data()); });
  check_one_way(named("multiply", isa), kSecrets, fill,
                [&] { ntt.multiply(a.data(), prepared.data(), a.data(), isa); });
}

}  // namespace

TEST(elements) {
  if (!can_step()) return;
  for (const math::Isa isa : math::usable_isas()) {
    for (const int dropped : {1, 8}) {  // a reply of 4 bytes, and of 3
      check_elements<std::uint32_t>(linear::make_preset("32 bits", 2048, 4293918721u, 127, dropped), isa);
    }
    for (const int dropped : {18, 26}) {
      check_elements<std::uint64_t>(linear::make_preset("64 bits", 2048, 562949953392641u, 127, dropped), isa);
    }
  }
}

TEST(transforms) {
  if (!can_step()) return;
  for (const math::Isa isa : math::usable_isas()) {
    check_transform<std::uint32_t>(linear::preset("linear-w8").q, isa);
    check_transform<std::uint64_t>(linear::preset("linear-w16").q, isa);
  }
}

TEST(rows_of_residues) {
  if (!can_step()) return;
  constexpr std::size_t kN = 48;
  const std::uint64_t q = linear::preset("linear-w16").q;
  const ring::ResidueRow row(q);
  std::vector<std::uint64_t> a(kN), b(kN), out(kN);
  const auto fill = [&](int which) {
    fill_words(a, which, q);
    fill_words(b, (which + 1) % kSecrets, q);
  };
  const std::uint64_t *terms_a[] = {a.data(), b.data()}, *terms_b[] = {b.data(), a.data()};
  const std::uint64_t weights[] = {3, q - 3};
  for (const math::Isa isa : math::usable_isas()) {
    const auto check = [&](const char* what, const std::function<void()>& work) {
      check_one_way(named(what, isa), kSecrets, fill, work);
    };
    check("add", [&] { row.add(a.data(), b.data(), out.data(), kN, isa); });
    check("subtract", [&] { row.subtract(a.data(), b.data(), out.data(), kN, isa); });
    check("negate", [&] { row.negate(a.data(), out.data(), kN, isa); });
    check("multiply", [&] { row.multiply(a.data(), b.data(), out.data(), kN, isa); });
    check("multiply_scalar", [&] { row.multiply_scalar(a.data(), 3, out.data(), kN, isa); });
    check("add_scalar", [&] { row.add_scalar(a.data(), 3, out.data(), kN, isa); });
    check("reduce", [&] { row.reduce(a.data(), out.data(), kN, isa); });
    check("inner_product", [&] { row.inner_product(terms_a, terms_b, 2, out.data(), kN, isa); });
    check("linear_combination", [&] { row.linear_combination(terms_a, weights, 2, out.data(), kN, isa); });
  }
}

TEST(keystream_and_samplers) {
  if (!can_step()) return;
  std::array<std::uint8_t, 32> key{};
  std::vector<std::uint8_t> keystream(17 * ring::kChaChaBlock);
  ring::Seed seed;
  std::vector<std::int8_t> out(48);
  const auto fill = [&](int which) {
    fill_bytes(key.data(), key.size(), which);
    seed.bytes = key;
  };
  // Keys that give no byte of 255 to the ternary sampler, which may show how many it rejects.
  std::vector<int> plain;
  for (int which = 0; plain.size() < kSecrets; ++which) {
    fill(which);
    ring::chacha20_keystream(key.data(), {1}, 0, keystream.data(), 1, math::Isa::portable);
    bool rejected = false;
    for (std::size_t i = 0; i < out.size(); ++i) rejected = rejected || keystream[i] == 255;
    if (!rejected) plain.push_back(which);
  }
  for (const math::Isa isa : math::usable_isas()) {
    const std::size_t blocks = isa == math::Isa::portable ? 1 : 17;
    check_one_way(named("keystream", isa), kSecrets, fill,
                  [&] { ring::chacha20_keystream(key.data(), {}, 0, keystream.data(), blocks, isa); });
    check_one_way(named("binomial", isa), kSecrets, fill,
                  [&] { ring::sample_binomial(seed, {ring::Domain::error, 0, 0}, out.data(), out.size(), isa); });
    check_one_way(
        named("ternary", isa), kSecrets, [&](int which) { fill(plain[static_cast<std::size_t>(which)]); },
        [&] { ring::sample_ternary(seed, {ring::Domain::secret, 0, 0}, out.data(), out.size(), isa); });
  }
}

PRIVTUNER_TEST_MAIN
