// The oracle: plain loops, one block of butterflies after the other.
#include "ntt_kernels.hpp"
#include "privtuner/math/modular.hpp"

namespace privtuner::ring::kernels {
namespace {

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

}  // namespace

void forward_portable(const NttView<std::uint32_t>& ntt, std::uint32_t* a) {
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

void inverse_portable(const NttView<std::uint32_t>& ntt, std::uint32_t* a) {
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

void multiply_portable(std::size_t n, std::uint32_t q, const std::uint32_t* a, const std::uint32_t* b,
                       const std::uint32_t* b_companion, std::uint32_t* out) {
  const Mod32 mod{q};
  for (std::size_t i = 0; i < n; ++i) out[i] = mod.mul(a[i], b[i], b_companion[i]);
}

// Values are in [0, 4q - 1] between stages.
void forward_portable(const NttView<std::uint64_t>& ntt, std::uint64_t* a) {
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
void inverse_portable(const NttView<std::uint64_t>& ntt, std::uint64_t* a) {
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

void multiply_portable(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                       const std::uint64_t* b_companion, std::uint64_t* out) {
  const Mod64 mod{q};
  for (std::size_t i = 0; i < n; ++i) out[i] = Mod64::subtract_once(mod.mul_lazy(a[i], b[i], b_companion[i]), q);
}

}  // namespace privtuner::ring::kernels
