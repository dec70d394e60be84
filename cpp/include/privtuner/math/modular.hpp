// Arithmetic modulo a fixed odd prime below 2^61.
#pragma once

#include <cstdint>

namespace privtuner::math {

__extension__ typedef unsigned __int128 Uint128;

// Constants of one modulus q, 2 < q < 2^61, q odd. Every function below takes inputs in [0, q) and returns [0, q)
// unless it says otherwise. add, sub, neg, reduce, mul and mul_shoup take no branch on their operands.
struct Modulus {
  std::uint64_t q = 0;
  std::uint64_t two64 = 0;        // 2^64 mod q
  std::uint64_t two64_shoup = 0;  // floor(two64 * 2^64 / q)
  std::uint64_t one_shoup = 0;    // floor(2^64 / q)

  // Throws std::invalid_argument unless q is an odd prime in (2, 2^61).
  explicit Modulus(std::uint64_t q);

  // The length of q: 2^(bits - 1) < q < 2^bits.
  int bits() const {
    int length = 0;
    while ((q >> length) != 0) ++length;
    return length;
  }

  std::uint64_t add(std::uint64_t a, std::uint64_t b) const { return add_if_negative(a + b - q); }
  std::uint64_t sub(std::uint64_t a, std::uint64_t b) const { return add_if_negative(a - b); }
  std::uint64_t neg(std::uint64_t a) const { return add_if_negative(0 - a); }

  // x any 64-bit word.
  std::uint64_t reduce(std::uint64_t x) const {
    return add_if_negative(x - mul_high(x, one_shoup) * q - q);  // Shoup's quotient is at most one short
  }
  // x any signed 64-bit word.
  std::uint64_t reduce_signed(std::int64_t x) const {
    // x + 2^63 as an unsigned word, less 2^63 = two64 / 2 mod q (two64 is even or two64 + q is).
    const std::uint64_t half = (two64 + ((two64 & 1) != 0 ? q : 0)) / 2;
    return sub(reduce(static_cast<std::uint64_t>(x) ^ (std::uint64_t{1} << 63)), half);
  }
  std::uint64_t mul(std::uint64_t a, std::uint64_t b) const {
    const Uint128 p = static_cast<Uint128>(a) * b;
    const std::uint64_t high = static_cast<std::uint64_t>(p >> 64), low = static_cast<std::uint64_t>(p);
    return add(mul_shoup(high, two64, two64_shoup), reduce(low));
  }
  // floor(w * 2^64 / q), for mul_shoup. w < q.
  std::uint64_t shoup(std::uint64_t w) const { return static_cast<std::uint64_t>((static_cast<Uint128>(w) << 64) / q); }
  // a * w mod q for any 64-bit a (Shoup; Harvey, "Faster arithmetic for number-theoretic transforms", 2014, alg. 2).
  std::uint64_t mul_shoup(std::uint64_t a, std::uint64_t w, std::uint64_t w_shoup) const {
    return add_if_negative(a * w - mul_high(a, w_shoup) * q - q);
  }
  std::uint64_t pow(std::uint64_t base, std::uint64_t exponent) const;
  // Throws std::invalid_argument for a = 0.
  std::uint64_t inv(std::uint64_t a) const;

  // x in [-q, q) as a two's complement word, to [0, q): the sign bit is the borrow because q < 2^61.
  std::uint64_t add_if_negative(std::uint64_t x) const { return x + (q & (0 - (x >> 63))); }

  static std::uint64_t mul_high(std::uint64_t a, std::uint64_t b) {
    return static_cast<std::uint64_t>((static_cast<Uint128>(a) * b) >> 64);
  }
};

// Deterministic Miller-Rabin, exact for every 64-bit n (bases of Sinclair, 2011).
bool is_prime(std::uint64_t n);

// A primitive m-th root of unity modulo q; m a power of two that divides q - 1 (else std::invalid_argument). The
// smallest-base one: deterministic, so that every machine uses the same transform.
std::uint64_t primitive_root_of_unity(std::uint64_t m, const Modulus& q);

}  // namespace privtuner::math
