#include "privtuner/ring/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "privtuner/ring/chacha20.hpp"

using namespace privtuner::ring;
using privtuner::math::Isa;
using privtuner::math::usable_isas;

namespace {

constexpr std::uint32_t kPreset32 = 4293918721;
constexpr std::uint64_t kPreset50 = 1125899903827969;
// Around the widths of blocks, groups and batches, and the most that one call gives.
const std::size_t kCounts[] = {0,  1,  7,   8,   9,   15,  16,  17,  47,   48,   49,   63,    64,
                               65, 96, 255, 256, 257, 767, 768, 769, 1000, 2048, 4099, 65536, kMaxSamples};

Seed counting_seed() {
  Seed seed;
  for (std::size_t i = 0; i < 32; ++i) seed.bytes[i] = static_cast<std::uint8_t>(i);
  return seed;
}

std::vector<std::uint32_t> draw(Stream stream, std::uint32_t q, std::size_t n, Isa isa) {
  std::vector<std::uint32_t> out(n);
  sample_uniform(counting_seed(), stream, q, out.data(), n, isa);
  return out;
}

std::vector<std::uint64_t> draw(Stream stream, std::uint64_t q, std::size_t n, Isa isa) {
  std::vector<std::uint64_t> out(n);
  sample_uniform(counting_seed(), stream, q, out.data(), n, isa);
  return out;
}

std::vector<std::int8_t> draw_ternary(Stream stream, std::size_t n, Isa isa) {
  std::vector<std::int8_t> out(n);
  sample_ternary(counting_seed(), stream, out.data(), n, isa);
  return out;
}

std::vector<std::int8_t> draw_binomial(Stream stream, std::size_t n, Isa isa) {
  std::vector<std::int8_t> out(n);
  sample_binomial(counting_seed(), stream, out.data(), n, isa);
  return out;
}

// The samplers' definitions again, word by word from an endless keystream.
class NaiveKeystream {
 public:
  explicit NaiveKeystream(Stream stream) {
    const std::uint32_t parts[3] = {static_cast<std::uint32_t>(stream.domain), stream.index, stream.sub_index};
    for (std::size_t i = 0; i < 12; ++i) nonce_[i] = static_cast<std::uint8_t>(parts[i / 4] >> (8 * (i % 4)));
  }
  std::uint8_t byte(std::size_t i) {
    while (i >= bytes_.size()) {
      const std::size_t blocks = bytes_.size() / 64, more = blocks + 16;
      bytes_.resize(64 * (blocks + more));
      chacha20_keystream(counting_seed().bytes.data(), nonce_, static_cast<std::uint32_t>(blocks),
                         bytes_.data() + 64 * blocks, more, Isa::portable);
    }
    return bytes_[i];
  }
  std::uint64_t word(std::size_t i, std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t k = size; k-- > 0;) value = value << 8 | byte(i * size + k);
    return value;
  }

 private:
  ChaChaNonce nonce_;
  std::vector<std::uint8_t> bytes_;
};

template <class Word>
std::vector<Word> naive_uniform(Stream stream, Word q, std::size_t n) {
  NaiveKeystream keystream(stream);
  int bits = 0;
  while (bits < static_cast<int>(8 * sizeof(Word)) && q >> bits != 0) ++bits;
  const std::size_t per_block = 64 / sizeof(Word);
  std::size_t next = (n + per_block - 1) / per_block * per_block;
  const auto masked = [&](std::size_t i) {
    const std::uint64_t word = keystream.word(i, sizeof(Word));
    return bits == 64 ? word : word & ((std::uint64_t{1} << bits) - 1);
  };
  std::vector<Word> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::uint64_t word = masked(i);
    while (word >= q) word = masked(next++);
    out[i] = static_cast<Word>(word);
  }
  return out;
}

std::vector<std::int8_t> naive_ternary(Stream stream, std::size_t n) {
  NaiveKeystream keystream(stream);
  std::size_t next = (n + 63) / 64 * 64;
  std::vector<std::int8_t> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    std::uint8_t byte = keystream.byte(i);
    while (byte == 255) byte = keystream.byte(next++);
    out[i] = static_cast<std::int8_t>(byte % 3 - 1);
  }
  return out;
}

std::vector<std::int8_t> naive_binomial(Stream stream, std::size_t n) {
  NaiveKeystream keystream(stream);
  std::vector<std::int8_t> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t group = i / 48, part = i % 48 / 16, lane = i % 16;
    std::uint64_t ones = 0;
    for (int bit = 0; bit < 32; ++bit) ones += keystream.word(64 * group + 16 * part + lane, 4) >> bit & 1;
    for (std::size_t bit = 10 * part; bit < 10 * part + 10; ++bit) {
      ones += keystream.word(64 * group + 48 + lane, 4) >> bit & 1;
    }
    out[i] = static_cast<std::int8_t>(static_cast<int>(ones) - 21);
  }
  return out;
}

// FNV-1a over the values' bytes, low byte first.
template <class T>
std::uint64_t digest(const std::vector<T>& values) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const T value : values) {
    for (std::size_t k = 0; k < sizeof(T); ++k) {
      hash = (hash ^ (static_cast<std::uint64_t>(value) >> (8 * k) & 255)) * 0x100000001b3;
    }
  }
  return hash;
}

// Both bounds at six standard deviations: a right sampler misses one with probability 2e-9 (the mean of so many values
// is normal), and the seed is fixed. The sample variance about the known mean m has variance (m4 - v^2) / n.
void check_moments(const std::vector<double>& values, double mean, double variance, double fourth_moment) {
  const double n = static_cast<double>(values.size());
  double sum = 0, squares = 0;
  for (const double x : values) {
    sum += x - mean;
    squares += (x - mean) * (x - mean);
  }
  CHECK_LT(std::fabs(sum / n), 6 * std::sqrt(variance / n));
  CHECK_LT(std::fabs(squares / n - variance), 6 * std::sqrt((fourth_moment - variance * variance) / n));
}

// Pearson's statistic with k degrees of freedom exceeds k + 2 sqrt(k x) + 2 x with probability at most exp(-x)
// (Laurent, Massart, 2000); x = 20 gives 2e-9. Every expected count is at least 16, so that the statistic is near its
// limit law.
void check_chi_square(const std::vector<double>& counts, const std::vector<double>& probabilities) {
  double n = 0, statistic = 0;
  for (const double count : counts) n += count;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double expected = n * probabilities[i];
    CHECK_LE(16, expected);
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  const double k = static_cast<double>(counts.size() - 1), x = 20;
  CHECK_LT(statistic, k + 2 * std::sqrt(k * x) + 2 * x);
}

}  // namespace

TEST(uniform_follows_its_definition_on_every_path) {
  for (const Isa isa : usable_isas()) {
    for (const std::size_t n : kCounts) {
      const Stream stream{Domain::mask, 17, static_cast<std::uint32_t>(n)};
      CHECK(draw(stream, kPreset32, n, isa) == naive_uniform(stream, kPreset32, n));
      CHECK(draw(stream, kPreset50, n, isa) == naive_uniform(stream, kPreset50, n));
    }
    // Moduli that refuse nearly half of all words (2^k + 1), none (2^k - 1, with its one refused word), or few.
    for (const std::size_t n :
         {std::size_t{0}, std::size_t{1}, std::size_t{50}, std::size_t{2048}, std::size_t{4099}}) {
      const Stream stream{Domain::error, 0xffffffff, 0x01020304};
      for (const std::uint32_t q :
           {2u, 3u, 97u, 12289u, 0x10001u, 0x7fffffffu, 0x80000000u, 0x80000001u, 0xffffffffu}) {
        CHECK(draw(stream, q, n, isa) == naive_uniform(stream, q, n));
      }
      for (const std::uint64_t q :
           {std::uint64_t{2}, std::uint64_t{97}, std::uint64_t{1} << 32, (std::uint64_t{1} << 40) + 1,
            (std::uint64_t{1} << 61) - 1, (std::uint64_t{1} << 63) + 1, ~std::uint64_t{0}}) {
        CHECK(draw(stream, q, n, isa) == naive_uniform(stream, q, n));
      }
    }
  }
}

TEST(ternary_follows_its_definition_on_every_path) {
  for (const Isa isa : usable_isas()) {
    for (const std::size_t n : kCounts) {
      const Stream stream{Domain::secret, static_cast<std::uint32_t>(n), 3};
      CHECK(draw_ternary(stream, n, isa) == naive_ternary(stream, n));
    }
  }
}

TEST(binomial_follows_its_definition_on_every_path) {
  for (const Isa isa : usable_isas()) {
    for (const std::size_t n : kCounts) {
      const Stream stream{Domain::error, 5, static_cast<std::uint32_t>(n)};
      CHECK(draw_binomial(stream, n, isa) == naive_binomial(stream, n));
    }
  }
}

// A definition that changes breaks every stored mask: these values are frozen.
TEST(known_answers) {
  const Stream stream{Domain::mask, 0, 0};
  for (const Isa isa : usable_isas()) {
    CHECK_EQ(digest(draw(stream, kPreset32, 2048, isa)), std::uint64_t{0xfe738639c31cb2b2});
    CHECK_EQ(digest(draw(stream, kPreset50, 2048, isa)), std::uint64_t{0x783316867e1e0d1d});
    CHECK_EQ(digest(draw_ternary({Domain::secret, 1, 2}, 2048, isa)), std::uint64_t{0xb9f9744cd97d7b0e});
    CHECK_EQ(digest(draw_binomial({Domain::error, 3, 4}, 2048, isa)), std::uint64_t{0x440c5e71a3197242});
  }
}

TEST(uniform_is_in_range_and_uniform) {
  const std::vector<std::uint32_t> narrow = draw({Domain::mask, 1, 0}, kPreset32, kMaxSamples, Isa::portable);
  const std::vector<std::uint64_t> wide = draw({Domain::mask, 2, 0}, kPreset50, kMaxSamples, Isa::portable);
  std::vector<double> a, b, a_bins(256), b_bins(256), low_bins(97);
  for (const std::uint32_t x : narrow) {
    CHECK_LT(x, kPreset32);
    a.push_back((x + 0.5) / kPreset32);
    ++a_bins[static_cast<std::size_t>(256 * a.back())];
  }
  for (const std::uint64_t x : wide) {
    CHECK_LT(x, kPreset50);
    b.push_back((static_cast<double>(x) + 0.5) / static_cast<double>(kPreset50));
    ++b_bins[static_cast<std::size_t>(256 * b.back())];
  }
  for (const std::uint32_t x : draw({Domain::mask, 3, 0}, std::uint32_t{97}, kMaxSamples, Isa::portable)) ++low_bins[x];
  // Of (x + 1/2) / q: mean 1/2, variance 1/12, fourth moment 1/80, up to 1/q^2. The bins' probabilities differ from
  // 1/256 by less than 1/q, which moves the statistic by less than n 256 / q^2.
  check_moments(a, 0.5, 1.0 / 12, 1.0 / 80);
  check_moments(b, 0.5, 1.0 / 12, 1.0 / 80);
  check_chi_square(a_bins, std::vector<double>(256, 1.0 / 256));
  check_chi_square(b_bins, std::vector<double>(256, 1.0 / 256));
  check_chi_square(low_bins, std::vector<double>(97, 1.0 / 97));
}

TEST(ternary_is_in_range_and_uniform) {
  std::vector<double> values, bins(3);
  for (const std::int8_t x : draw_ternary({Domain::secret, 0, 0}, kMaxSamples, Isa::portable)) {
    CHECK_LE(-1, x);
    CHECK_LE(x, 1);
    values.push_back(x);
    ++bins[static_cast<std::size_t>(x + 1)];
  }
  check_moments(values, 0, 2.0 / 3, 2.0 / 3);
  check_chi_square(bins, std::vector<double>(3, 1.0 / 3));
}

TEST(binomial_is_in_range_and_binomial) {
  std::vector<double> values, counts(43), probabilities(43);
  for (const std::int8_t x : draw_binomial({Domain::error, 0, 0}, kMaxSamples, Isa::portable)) {
    CHECK_LE(-kBinomialEta, x);
    CHECK_LE(x, kBinomialEta);
    values.push_back(x);
    ++counts[static_cast<std::size_t>(x + kBinomialEta)];
  }
  // 42 fair coins: variance 42/4; fourth moment 3 v^2 + v (1 - 6/4).
  check_moments(values, 0, 10.5, 3 * 10.5 * 10.5 - 10.5 / 2);
  probabilities[0] = std::ldexp(1, -42);
  for (int k = 1; k <= 42; ++k) {
    probabilities[static_cast<std::size_t>(k)] = probabilities[static_cast<std::size_t>(k - 1)] * (43 - k) / k;
  }
  // Values beyond +-12 are pooled: P(|e| > 12) = 8e-5 makes 5 on each side for the 2^17 values drawn here, and
  // P(|e| = 12) makes 17 more.
  constexpr std::size_t kLow = 21 - 12, kHigh = 21 + 12;
  std::vector<double> pooled_counts(counts.begin() + kLow, counts.begin() + kHigh + 1);
  std::vector<double> pooled(probabilities.begin() + kLow, probabilities.begin() + kHigh + 1);
  for (std::size_t i = 0; i < kLow; ++i) {
    pooled_counts.front() += counts[i];
    pooled_counts.back() += counts[42 - i];
    pooled.front() += probabilities[i];
    pooled.back() += probabilities[42 - i];
  }
  check_chi_square(pooled_counts, pooled);
}

// Neighbours, and values 16, 48 and 64 apart (the layout's strides), are uncorrelated: the mean of n products of
// independent values of variance v has standard deviation v / sqrt(n).
TEST(binomial_values_are_uncorrelated) {
  const std::vector<std::int8_t> values = draw_binomial({Domain::error, 9, 9}, kMaxSamples, Isa::portable);
  for (const std::size_t lag : {1, 16, 32, 48, 64, 192, 768}) {
    double sum = 0;
    for (std::size_t i = 0; i + lag < values.size(); ++i) sum += values[i] * values[i + lag];
    const double n = static_cast<double>(values.size() - lag);
    CHECK_LT(std::fabs(sum / n), 6 * 10.5 / std::sqrt(n));
  }
}

TEST(streams_and_seeds_are_independent) {
  const Stream streams[] = {{Domain::mask, 0, 0},         {Domain::secret, 0, 0}, {Domain::error, 0, 0},
                            {Domain::mask, 1, 0},         {Domain::mask, 0, 1},   {Domain::mask, 256, 0},
                            {Domain::mask, 0, 0x80000000}};
  std::vector<std::uint64_t> digests;
  for (const Stream& stream : streams) digests.push_back(digest(draw(stream, kPreset32, 64, Isa::portable)));
  CHECK_EQ(digests[0], digest(draw(streams[0], kPreset32, 64, Isa::portable)));
  Seed other = counting_seed();
  other.bytes[31] ^= 1;
  std::vector<std::uint32_t> from_other(64);
  sample_uniform(other, streams[0], kPreset32, from_other.data(), 64, Isa::portable);
  digests.push_back(digest(from_other));
  std::sort(digests.begin(), digests.end());
  CHECK(std::unique(digests.begin(), digests.end()) == digests.end());
}

TEST(a_longer_draw_that_refuses_nothing_begins_with_the_shorter_one) {
  // With q = 2^32 - 1 a refusal has probability 2^-32 a word: none among these.
  const std::vector<std::uint32_t> longer = draw({Domain::mask, 0, 0}, 0xffffffffu, 500, Isa::portable);
  const std::vector<std::uint32_t> shorter = draw({Domain::mask, 0, 0}, 0xffffffffu, 123, Isa::portable);
  CHECK(std::equal(shorter.begin(), shorter.end(), longer.begin()));
}

TEST(nothing_is_written_behind_the_last_value) {
  for (const Isa isa : usable_isas()) {
    for (const std::size_t n : {0, 1, 15, 47, 49, 100, 770}) {
      std::vector<std::uint32_t> u(n + 70, 7);
      std::vector<std::uint64_t> v(n + 70, 7);
      std::vector<std::int8_t> t(n + 70, 7), e(n + 70, 77);
      sample_uniform(counting_seed(), {Domain::mask, 0, 0}, 0x80000001u, u.data(), n, isa);
      sample_uniform(counting_seed(), {Domain::mask, 0, 0}, (std::uint64_t{1} << 40) + 1, v.data(), n, isa);
      sample_ternary(counting_seed(), {Domain::mask, 0, 0}, t.data(), n, isa);
      sample_binomial(counting_seed(), {Domain::mask, 0, 0}, e.data(), n, isa);
      for (std::size_t i = n; i < n + 70; ++i) {
        CHECK_EQ(u[i], 7u);
        CHECK_EQ(v[i], 7u);
        CHECK_EQ(t[i], 7);
        CHECK_EQ(e[i], 77);
      }
    }
  }
}

TEST(counts_and_moduli_out_of_range_are_refused) {
  std::vector<std::uint64_t> out(4);
  std::uint32_t narrow = 0;
  std::int8_t small = 0;
  const Stream stream{Domain::mask, 0, 0};
  const Seed seed;
  CHECK_THROWS(std::invalid_argument, sample_uniform(seed, stream, 97u, &narrow, kMaxSamples + 1, Isa::portable),
               "131073 samples in one call");
  CHECK_THROWS(std::invalid_argument,
               sample_uniform(seed, stream, kPreset50, out.data(), kMaxSamples + 1, Isa::portable),
               "draw at most 131072");
  CHECK_THROWS(std::invalid_argument, sample_ternary(seed, stream, &small, kMaxSamples + 1, Isa::portable), "131073");
  CHECK_THROWS(std::invalid_argument, sample_binomial(seed, stream, &small, kMaxSamples + 1, Isa::portable), "131073");
  for (const std::uint32_t q : {0u, 1u}) {
    CHECK_THROWS(std::invalid_argument, sample_uniform(seed, stream, q, &narrow, 1, Isa::portable), "pass q >= 2");
    CHECK_THROWS(std::invalid_argument, sample_uniform(seed, stream, std::uint64_t{q}, out.data(), 1, Isa::portable),
                 "pass q >= 2");
  }
}

TEST(seeds_come_from_the_system_and_are_wiped) {
  CHECK(Seed::from_os().bytes != Seed::from_os().bytes);
  std::vector<std::uint8_t> bytes(1000, 0), again(1000, 0);
  os_random(bytes.data(), bytes.size());
  os_random(again.data(), again.size());
  CHECK(bytes != again);
  for (std::size_t i = 0; i < 1000; i += 100) {  // every piece is filled: 100 zeros have probability 2^-800
    CHECK(std::any_of(bytes.begin() + static_cast<long>(i), bytes.begin() + static_cast<long>(i) + 100,
                      [](std::uint8_t byte) { return byte != 0; }));
  }
  alignas(Seed) unsigned char storage[sizeof(Seed)];
  Seed* const seed = new (storage) Seed(counting_seed());
  CHECK_EQ(seed->bytes[31], 31);
  seed->~Seed();
  CHECK(std::all_of(std::begin(storage), std::end(storage), [](unsigned char byte) { return byte == 0; }));
}

PRIVTUNER_TEST_MAIN
