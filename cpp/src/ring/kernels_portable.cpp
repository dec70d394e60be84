// The oracle: plain loops, one word, one block, one term after the other.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "privtuner/math/modular.hpp"
#include "sampling_loops.hpp"

namespace privtuner::ring::kernels {
namespace {

using math::Modulus;
using math::Uint128;

// 32-bit words: every value is in [0, q) between stages. q may use the top bit, so nothing lazy fits the word.
struct Mod32 {
  std::uint32_t q;

  // x in [-q, q): to [0, q).
  std::uint32_t correct(std::int64_t x) const {
    return static_cast<std::uint32_t>(x + (static_cast<std::int64_t>(q) & (x >> 63)));
  }
  std::uint32_t add(std::uint32_t a, std::uint32_t b) const { return correct(std::int64_t{a} + b - q); }
  std::uint32_t sub(std::uint32_t a, std::uint32_t b) const { return correct(std::int64_t{a} - b); }
  // a * w for w in Montgomery form; a any word. The low halves of the two products agree, so they cancel.
  std::uint32_t mul(std::uint32_t a, std::uint32_t w, std::uint32_t w_companion) const {
    const std::uint32_t m = a * w_companion;
    const std::uint64_t high = (std::uint64_t{a} * w) >> 32, high_q = (std::uint64_t{m} * q) >> 32;
    return correct(static_cast<std::int64_t>(high) - static_cast<std::int64_t>(high_q));
  }
};

// 64-bit words: lazy ranges after Harvey, "Faster arithmetic for number-theoretic transforms" (2014). q < 2^61, so 4q
// leaves the sign bit free.
struct Mod64 {
  std::uint64_t q;

  // x in [0, 2 bound) to [0, bound).
  static std::uint64_t subtract_once(std::uint64_t x, std::uint64_t bound) {
    const std::uint64_t r = x - bound;
    return r + (bound & (0 - (r >> 63)));
  }
  // [0, 2q - 1]; a any word.
  std::uint64_t mul_lazy(std::uint64_t a, std::uint64_t w, std::uint64_t w_companion) const {
    return a * w - math::Modulus::mul_high(a, w_companion) * q;
  }
};

void forward(const NttView<std::uint32_t>& ntt, std::uint32_t* a) {
  const Mod32 mod{ntt.q};
  for (std::size_t blocks = 1, half = ntt.n / 2; half != 0; blocks *= 2, half /= 2) {
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::uint32_t w = ntt.roots[blocks + block], w_companion = ntt.companions[blocks + block];
      std::uint32_t* const x = a + 2 * half * block;
      std::uint32_t* const y = x + half;
      for (std::size_t j = 0; j < half; ++j) {
        const std::uint32_t u = x[j], v = mod.mul(y[j], w, w_companion);
        x[j] = mod.add(u, v);
        y[j] = mod.sub(u, v);
      }
    }
  }
}

void inverse(const NttView<std::uint32_t>& ntt, std::uint32_t* a) {
  const Mod32 mod{ntt.q};
  for (std::size_t blocks = ntt.n / 2, half = 1; blocks > 1; blocks /= 2, half *= 2) {
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::uint32_t w = ntt.roots[blocks + block], w_companion = ntt.companions[blocks + block];
      std::uint32_t* const x = a + 2 * half * block;
      std::uint32_t* const y = x + half;
      for (std::size_t j = 0; j < half; ++j) {
        const std::uint32_t u = x[j], v = y[j];
        x[j] = mod.add(u, v);
        y[j] = mod.mul(mod.sub(u, v), w, w_companion);
      }
    }
  }
  std::uint32_t* const y = a + ntt.n / 2;
  for (std::size_t j = 0; j < ntt.n / 2; ++j) {
    const std::uint32_t u = a[j], v = y[j];
    a[j] = mod.mul(mod.add(u, v), ntt.n_inverse, ntt.n_inverse_companion);
    y[j] = mod.mul(mod.sub(u, v), ntt.last_root, ntt.last_root_companion);
  }
}

void multiply_words(std::size_t n, std::uint32_t q, const std::uint32_t* a, const std::uint32_t* b,
                    const std::uint32_t* b_companion, std::uint32_t* out) {
  const Mod32 mod{q};
  for (std::size_t i = 0; i < n; ++i) out[i] = mod.mul(a[i], b[i], b_companion[i]);
}

// Values are in [0, 4q - 1] between stages.
void forward(const NttView<std::uint64_t>& ntt, std::uint64_t* a) {
  const Mod64 mod{ntt.q};
  const std::uint64_t q2 = 2 * ntt.q;
  for (std::size_t blocks = 1, half = ntt.n / 2; half != 0; blocks *= 2, half /= 2) {
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::uint64_t w = ntt.roots[blocks + block], w_companion = ntt.companions[blocks + block];
      std::uint64_t* const x = a + 2 * half * block;
      std::uint64_t* const y = x + half;
      for (std::size_t j = 0; j < half; ++j) {
        const std::uint64_t u = Mod64::subtract_once(x[j], q2);      // [0, 2q - 1]
        const std::uint64_t v = mod.mul_lazy(y[j], w, w_companion);  // [0, 2q - 1]
        x[j] = u + v;
        y[j] = u - v + q2;
      }
    }
  }
  for (std::size_t i = 0; i < ntt.n; ++i) a[i] = Mod64::subtract_once(Mod64::subtract_once(a[i], q2), ntt.q);
}

// Values are in [0, 2q - 1] between stages.
void inverse(const NttView<std::uint64_t>& ntt, std::uint64_t* a) {
  const Mod64 mod{ntt.q};
  const std::uint64_t q2 = 2 * ntt.q;
  for (std::size_t blocks = ntt.n / 2, half = 1; blocks > 1; blocks /= 2, half *= 2) {
    for (std::size_t block = 0; block < blocks; ++block) {
      const std::uint64_t w = ntt.roots[blocks + block], w_companion = ntt.companions[blocks + block];
      std::uint64_t* const x = a + 2 * half * block;
      std::uint64_t* const y = x + half;
      for (std::size_t j = 0; j < half; ++j) {
        const std::uint64_t u = x[j], v = y[j];
        x[j] = Mod64::subtract_once(u + v, q2);
        y[j] = mod.mul_lazy(u - v + q2, w, w_companion);
      }
    }
  }
  std::uint64_t* const y = a + ntt.n / 2;
  for (std::size_t j = 0; j < ntt.n / 2; ++j) {
    const std::uint64_t u = a[j], v = y[j];
    a[j] = Mod64::subtract_once(mod.mul_lazy(u + v, ntt.n_inverse, ntt.n_inverse_companion), ntt.q);
    y[j] = Mod64::subtract_once(mod.mul_lazy(u - v + q2, ntt.last_root, ntt.last_root_companion), ntt.q);
  }
}

void multiply_words(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                    const std::uint64_t* b_companion, std::uint64_t* out) {
  const Mod64 mod{q};
  for (std::size_t i = 0; i < n; ++i) out[i] = Mod64::subtract_once(mod.mul_lazy(a[i], b[i], b_companion[i]), q);
}

void store_le32(std::uint8_t* p, std::uint32_t x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<std::uint8_t>(x >> (8 * i));
}

std::uint32_t rotate_left(std::uint32_t x, int bits) { return x << bits | x >> (32 - bits); }

// RFC 8439, section 2.1.
void quarter_round(std::uint32_t& a, std::uint32_t& b, std::uint32_t& c, std::uint32_t& d) {
  d = rotate_left(d ^ (a += b), 16);
  b = rotate_left(b ^ (c += d), 12);
  d = rotate_left(d ^ (a += b), 8);
  b = rotate_left(b ^ (c += d), 7);
}

// RFC 8439, section 2.3.
void chacha20_blocks(const std::uint32_t state[16], std::uint8_t* out, std::size_t blocks) {
  for (std::uint32_t counter = state[12]; blocks != 0; --blocks, ++counter, out += 64) {
    std::uint32_t x[16];
    std::memcpy(x, state, sizeof(x));
    x[12] = counter;
    for (int round = 0; round < 20; round += 2) {
      quarter_round(x[0], x[4], x[8], x[12]);
      quarter_round(x[1], x[5], x[9], x[13]);
      quarter_round(x[2], x[6], x[10], x[14]);
      quarter_round(x[3], x[7], x[11], x[15]);
      quarter_round(x[0], x[5], x[10], x[15]);
      quarter_round(x[1], x[6], x[11], x[12]);
      quarter_round(x[2], x[7], x[8], x[13]);
      quarter_round(x[3], x[4], x[9], x[14]);
    }
    for (int i = 0; i < 16; ++i) store_le32(out + 4 * i, x[i] + (i == 12 ? counter : state[i]));
  }
}

// Without a table: the words are secret.
std::uint32_t population_count(std::uint32_t x) {
  x -= (x >> 1) & 0x55555555;
  x = (x & 0x33333333) + ((x >> 2) & 0x33333333);
  return (((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101) >> 24;
}

void binomial(const std::uint32_t* words, std::int8_t* out, std::size_t groups) {
  for (; groups != 0; --groups, words += kBinomialWords) {
    for (int part = 0; part < 3; ++part) {
      for (int lane = 0; lane < 16; ++lane) {
        const std::uint32_t bits32 = words[16 * part + lane], bits10 = words[48 + lane] & (0x3ffu << (10 * part));
        *out++ = static_cast<std::int8_t>(static_cast<int>(population_count(bits32) + population_count(bits10)) -
                                          kBinomialEta);
      }
    }
  }
}

std::uint64_t reduce_wide(Uint128 x, const Modulus& modulus) {
  const auto high = static_cast<std::uint64_t>(x >> 64), low = static_cast<std::uint64_t>(x);
  return modulus.add(modulus.mul_shoup(high, modulus.two64, modulus.two64_shoup), modulus.reduce(low));
}

void add(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.add(a[i], b[i]);
}

void subtract(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.sub(a[i], b[i]);
}

void negate(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.neg(a[i]);
}

void multiply(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.mul(a[i], b[i]);
}

void multiply_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  const std::uint64_t w_shoup = modulus.shoup(w);
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.mul_shoup(a[i], w, w_shoup);
}

void add_scalar(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.add(a[i], w);
}

void reduce(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n) {
  const Modulus& modulus = *row.modulus;
  for (std::size_t i = 0; i < n; ++i) out[i] = modulus.reduce(a[i]);
}

void inner_product(const Row& row, const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                   std::uint64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    Uint128 sum = 0;
    for (std::size_t t = 0; t < terms; ++t) sum += static_cast<Uint128>(a[t][i]) * b[t][i];
    out[i] = reduce_wide(sum, *row.modulus);
  }
}

void linear_combination(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                        std::uint64_t* out, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    Uint128 sum = 0;
    for (std::size_t t = 0; t < terms; ++t) sum += static_cast<Uint128>(a[t][i]) * w[t];
    out[i] = reduce_wide(sum, *row.modulus);
  }
}

void convert(const std::uint64_t* const* a, const double* inverse, std::size_t terms, const ConversionTarget* targets,
             std::size_t count, std::size_t begin, std::size_t end) {
  for (std::size_t i = begin; i < end; ++i) {
    double quotient = 0;
    for (std::size_t t = 0; t < terms; ++t) quotient += static_cast<double>(a[t][i]) * inverse[t];
    const auto times = static_cast<std::uint64_t>(std::floor(0.5 + quotient));
    for (std::size_t k = 0; k < count; ++k) {
      const ConversionTarget& target = targets[k];
      Uint128 sum = static_cast<Uint128>(times) * target.weights[terms];
      for (std::size_t t = 0; t < terms; ++t) sum += static_cast<Uint128>(a[t][i]) * target.weights[t];
      target.out[i] = reduce_wide(sum, *target.row.modulus);
    }
  }
}

void permute(const GroupOrder& order, const std::uint64_t* block, std::size_t origin, std::size_t first,
             std::size_t count, std::uint64_t* out) {
  for (std::size_t g = first; g < first + count; ++g, out += kGroupWords) {
    const std::uint64_t* const from = block + (order.sources[g] / kGroupWords - origin) * kGroupWords;
    const std::uint32_t carry = order.sources[g] % kGroupWords;
    for (std::uint32_t j = 0; j < kGroupWords; ++j) out[j] = from[source_word(order.element, carry, j)];
  }
}

constexpr NttKernels<std::uint32_t> kNtt32 = {&forward, &inverse, &multiply_words};
constexpr NttKernels<std::uint64_t> kNtt64 = {&forward, &inverse, &multiply_words};

constexpr Kernels kKernels = {kNtt32,
                              kNtt64,
                              kNtt64,
                              {1, &chacha20_blocks},
                              {&first_rejected_plain<std::uint32_t>, &first_rejected_plain<std::uint64_t>, &binomial},
                              {&add, &subtract, &negate, &multiply, &multiply_scalar, &add_scalar, &reduce,
                               &inner_product, &linear_combination, &convert, &permute}};

}  // namespace

const Kernels& kernels_portable() { return kKernels; }

}  // namespace privtuner::ring::kernels
