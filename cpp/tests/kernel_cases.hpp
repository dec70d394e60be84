// The kernels of one instruction set against the portable ones, word for word, at sizes and words at their limits.
#pragma once

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "../src/ring/kernels.hpp"
#include "check.hpp"
#include "privtuner/ring/ntt.hpp"
#include "privtuner/ring/residues.hpp"

namespace kernel_cases {

namespace kernels = privtuner::ring::kernels;
using kernels::Kernels;

// Words in [0, bound), the ends among them.
template <class Word>
std::vector<Word> words_below(std::uint64_t bound, std::size_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Word> words(n);
  for (auto& word : words) {
    const std::uint64_t x = random(), near = x / 8 % std::min<std::uint64_t>(bound, 3);
    word = static_cast<Word>(x % 8 == 0 ? near : (x % 8 == 1 ? bound - 1 - near : random() % bound));
  }
  return words;
}

template <class Word>
void check_ntt(const kernels::NttKernels<Word>& got, const kernels::NttKernels<Word>& want,
               const std::vector<std::uint64_t>& moduli) {
  for (const std::uint64_t q : moduli) {
    for (const std::size_t n : {std::size_t{256}, std::size_t{512}, std::size_t{2048}}) {
      const privtuner::ring::Ntt<Word> ntt(n, q);
      const auto last = ntt.last_stage();
      const Word modulus = static_cast<Word>(q);
      const kernels::NttView<Word> forward{
          n, modulus, ntt.roots().data(), ntt.roots_companion().data(), ntt.roots_centred().data(), 0, 0, 0, 0};
      const kernels::NttView<Word> inverse{n,
                                           modulus,
                                           ntt.inverse_roots().data(),
                                           ntt.inverse_roots_companion().data(),
                                           ntt.inverse_roots_centred().data(),
                                           last[0],
                                           last[1],
                                           last[2],
                                           last[3]};
      const auto both = [&](auto run) {
        for (const std::vector<Word>& a : {words_below<Word>(q, n, n + q), std::vector<Word>(n, modulus - 1)}) {
          std::vector<Word> x = a, y = a;
          run(got, x), run(want, y);
          CHECK(x == y);
        }
      };
      both([&](const auto& kernel, auto& a) { kernel.forward(forward, a.data()); });
      both([&](const auto& kernel, auto& a) { kernel.inverse(inverse, a.data()); });
      std::vector<Word> prepared(2 * n);
      ntt.prepare(words_below<Word>(q, n, 7).data(), prepared.data());
      both([&](const auto& kernel, auto& a) {
        kernel.multiply(n, modulus, a.data(), prepared.data(), prepared.data() + n, a.data());
      });
    }
  }
}

inline void check_transforms(const Kernels& got) {
  const Kernels& want = kernels::kernels_portable();
  check_ntt(got.ntt32, want.ntt32, {12289, 2147352577, 4293918721});
  check_ntt(got.ntt50, want.ntt50, {12289, 1099510054913, 1125899904679937});
  check_ntt(got.ntt61, want.ntt61, {12289, 1125899908022273, 2305843009211596801});
}

inline void check_chacha20(const Kernels& got) {
  CHECK_LE(got.chacha20.width, kernels::kChaCha20MaxWidth);
  std::vector<std::uint32_t> state = words_below<std::uint32_t>(std::uint64_t{1} << 32, 16, 1);
  for (const std::uint32_t counter : {0u, 0xfffffff0u, 0xffffffffu}) {  // the counter wraps inside a batch
    state[12] = counter;
    for (const std::size_t batches : {std::size_t{1}, std::size_t{3}}) {
      const std::size_t blocks = batches * got.chacha20.width;
      std::vector<std::uint8_t> x(64 * blocks + 1, 0xa5), y = x;  // the last byte is nobody's
      got.chacha20.batches(state.data(), x.data(), batches);
      kernels::kernels_portable().chacha20.batches(state.data(), y.data(), blocks);
      CHECK(x == y);
    }
  }
}

template <class Word, class Kernel>
void check_rejection(Kernel got, Word q, Word mask) {
  for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{16}, std::size_t{61}}) {
    for (std::size_t bad = 0; bad <= n; ++bad) {  // bad == n: none is refused
      std::vector<Word> words = words_below<Word>(q, n, n);
      for (auto& word : words) word = static_cast<Word>(word | ~mask);  // what the mask takes off
      for (std::size_t i = bad; i < n; i += 5) words[i] = static_cast<Word>(q | ~mask);
      std::vector<Word> want = words;
      for (auto& word : want) word &= mask;
      std::size_t i = 0, next = bad;
      for (; (i = got(words.data(), i, n, mask, q)) < n; ++i, next += 5) {
        CHECK_EQ(i, next);
        CHECK(std::equal(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(i) + 1, want.begin()));
        words[i] = want[i] = 0;  // a replacement
      }
      CHECK_LE(n, next);  // all were found
      CHECK(words == want);
    }
  }
}

inline void check_samplers(const Kernels& got) {
  check_rejection<std::uint32_t>(got.sampling.first_rejected32, 4293918721u, 0xffffffffu);
  check_rejection<std::uint32_t>(got.sampling.first_rejected32, 97u, 127u);
  check_rejection<std::uint64_t>(got.sampling.first_rejected64, (std::uint64_t{1} << 63) + 1, ~std::uint64_t{0});
  check_rejection<std::uint64_t>(got.sampling.first_rejected64, 1125899904679937, (std::uint64_t{1} << 50) - 1);
  const auto words = words_below<std::uint32_t>(std::uint64_t{1} << 32, 5 * kernels::kBinomialWords, 3);
  std::vector<std::int8_t> x(5 * kernels::kBinomialGroup), y = x;
  got.sampling.binomial(words.data(), x.data(), 5);
  kernels::kernels_portable().sampling.binomial(words.data(), y.data(), 5);
  CHECK(x == y);
}

inline void check_residues(const Kernels& all) {
  using Words = std::vector<std::uint64_t>;
  const kernels::ResidueKernels &got = all.residues, &want = kernels::kernels_portable().residues;
  constexpr std::size_t n = 48;
  constexpr std::uint64_t kTwo52 = std::uint64_t{1} << 52;
  for (const std::uint64_t q : {std::uint64_t{65537}, std::uint64_t{1099510054913}, std::uint64_t{1125899904679937}}) {
    const privtuner::ring::ResidueRow of(q);
    const kernels::Row row = of.target(nullptr, nullptr).row;
    Words x(n), y(n);
    const auto same = [&](auto run) {
      run(got, x.data()), run(want, y.data());
      CHECK(x == y);
    };
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      const Words a = words_below<std::uint64_t>(q, n, seed), b = words_below<std::uint64_t>(q, n, seed + 100);
      const Words wide = words_below<std::uint64_t>(kTwo52, n, seed);
      same([&](const auto& kernel, auto* out) { kernel.add(row, a.data(), b.data(), out, n); });
      same([&](const auto& kernel, auto* out) { kernel.subtract(row, a.data(), b.data(), out, n); });
      same([&](const auto& kernel, auto* out) { kernel.negate(row, a.data(), out, n); });
      same([&](const auto& kernel, auto* out) { kernel.multiply(row, a.data(), b.data(), out, n); });
      same([&](const auto& kernel, auto* out) { kernel.reduce(row, wide.data(), out, n); });
      for (const std::uint64_t w : {b[0], std::uint64_t{0}, q - 1}) {
        same([&](const auto& kernel, auto* out) { kernel.multiply_scalar(row, a.data(), w, out, n); });
        same([&](const auto& kernel, auto* out) { kernel.add_scalar(row, a.data(), w, out, n); });
      }
    }
    for (const std::size_t terms :
         {std::size_t{1}, std::size_t{4}, std::size_t{5}, std::size_t{13}, std::size_t{2048}}) {
      for (const bool extreme : {false, true}) {
        std::vector<Words> a, b, wide;
        std::vector<const std::uint64_t*> pa, pb, pw;
        for (std::size_t t = 0; t < terms; ++t) {
          a.push_back(extreme ? Words(n, q - 1) : words_below<std::uint64_t>(q, n, t));
          b.push_back(extreme ? Words(n, q - 1) : words_below<std::uint64_t>(q, n, t + 5000));
          wide.push_back(extreme ? Words(n, kTwo52 - 1) : words_below<std::uint64_t>(kTwo52, n, t));
        }
        for (std::size_t t = 0; t < terms; ++t) {
          pa.push_back(a[t].data()), pb.push_back(b[t].data()), pw.push_back(wide[t].data());
        }
        const Words weights = extreme ? Words(terms, q - 1) : words_below<std::uint64_t>(q, terms, 9);
        same([&](const auto& kernel, auto* out) { kernel.inner_product(row, pa.data(), pb.data(), terms, out, n); });
        same([&](const auto& kernel, auto* out) {
          kernel.linear_combination(row, pw.data(), weights.data(), terms, out, n);
        });
      }
    }
    for (const std::size_t terms : {std::size_t{1}, std::size_t{5}, std::size_t{7}, std::size_t{64}}) {
      for (const bool extreme : {false, true}) {
        constexpr std::size_t rows = 192;  // more than a tile
        std::vector<Words> a;
        std::vector<const std::uint64_t*> pa;
        for (std::size_t t = 0; t < terms; ++t) {
          a.push_back(extreme ? Words(rows, q - 1) : words_below<std::uint64_t>(q, rows, t));
        }
        for (const Words& words : a) pa.push_back(words.data());
        const Words weights = extreme ? Words(terms + 1, q - 1) : words_below<std::uint64_t>(q, terms + 1, 9);
        const std::vector<double> inverses(terms, 1.0 / static_cast<double>(q));
        Words out(2 * rows), expected(2 * rows);
        for (const auto& [kernel, to] : {std::pair{&got, &out}, {&want, &expected}}) {
          const kernels::ConversionTarget targets[] = {{row, weights.data(), to->data()},
                                                       {row, weights.data(), to->data() + rows}};
          kernel->convert(pa.data(), inverses.data(), terms, targets, 2, 16, rows);
        }
        CHECK(out == expected);
      }
    }
  }
  std::vector<std::uint32_t> sources;
  for (const std::uint32_t g : {5u, 2u, 0u, 3u, 1u, 4u, 7u, 6u}) sources.push_back(8 * g + (3 * g + 1) % 8);
  const Words a = words_below<std::uint64_t>(kTwo52, 64, 1);
  for (std::uint32_t element = 1; element < 16; element += 2) {
    Words out(64), expected(64);
    got.permute({sources.data(), element}, a.data(), 0, 0, 8, out.data());
    want.permute({sources.data(), element}, a.data(), 0, 0, 8, expected.data());
    CHECK(out == expected);
  }
}

}  // namespace kernel_cases
