#include "privtuner/math/modular.hpp"

#include <stdexcept>
#include <string>

namespace privtuner::math {
namespace {

std::uint64_t checked_modulus(std::uint64_t q) {
  if (q < 3 || (q >> 61) != 0 || !is_prime(q)) {
    throw std::invalid_argument("modulus " + std::to_string(q) + " is not an odd prime in (2, 2^61); choose one");
  }
  return q;
}

std::uint64_t mul_mod(std::uint64_t a, std::uint64_t b, std::uint64_t n) {
  return static_cast<std::uint64_t>(static_cast<Uint128>(a) * b % n);
}

std::uint64_t pow_mod(std::uint64_t base, std::uint64_t exponent, std::uint64_t n) {
  std::uint64_t result = 1 % n;
  for (base %= n; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result = mul_mod(result, base, n);
    base = mul_mod(base, base, n);
  }
  return result;
}

}  // namespace

Modulus::Modulus(std::uint64_t prime) : q(checked_modulus(prime)) {
  two64 = (~std::uint64_t{0} % q + 1) % q;
  two64_shoup = shoup(two64);
  one_shoup = ~std::uint64_t{0} / q;  // floor(2^64 / q): q is odd, so it does not divide 2^64
}

std::uint64_t Modulus::pow(std::uint64_t base, std::uint64_t exponent) const {
  std::uint64_t result = 1;
  for (; exponent != 0; exponent >>= 1) {
    if (exponent & 1) result = mul(result, base);
    base = mul(base, base);
  }
  return result;
}

std::uint64_t Modulus::inv(std::uint64_t a) const {
  if (a == 0) throw std::invalid_argument("0 has no inverse modulo " + std::to_string(q) + "; pass 1 <= a < q");
  return pow(a, q - 2);  // Fermat
}

bool is_prime(std::uint64_t n) {
  if (n < 2) return false;
  for (std::uint64_t p : {2u, 3u, 5u, 7u, 11u, 13u, 17u, 19u, 23u, 29u, 31u, 37u}) {
    if (n % p == 0) return n == p;
  }
  std::uint64_t odd = n - 1;
  int twos = 0;
  for (; (odd & 1) == 0; odd >>= 1) ++twos;
  // Jim Sinclair's seven bases: no composite below 2^64 passes all of them (checked against Feitsma's table).
  for (std::uint64_t base : {2u, 325u, 9375u, 28178u, 450775u, 9780504u, 1795265022u}) {
    std::uint64_t x = pow_mod(base, odd, n);
    if (x == 0 || x == 1 || x == n - 1) continue;  // x = 0: n divides the base, which says nothing
    bool passes = false;
    for (int i = 1; i < twos && !passes; ++i) {
      x = mul_mod(x, x, n);
      passes = x == n - 1;
    }
    if (!passes) return false;
  }
  return true;
}

std::uint64_t primitive_root_of_unity(std::uint64_t m, const Modulus& q) {
  if (m == 0 || (m & (m - 1)) != 0 || (q.q - 1) % m != 0) {
    throw std::invalid_argument("order " + std::to_string(m) +
                                " is not a power of two that divides q - 1 for q = " + std::to_string(q.q));
  }
  if (m == 1) return 1;
  // base^((q-1)/m) has order m exactly when its (m/2)-th power is -1: half of all bases, those that are no square.
  for (std::uint64_t base = 2;; ++base) {
    const std::uint64_t root = q.pow(base, (q.q - 1) / m);
    if (q.pow(root, m / 2) == q.q - 1) return root;
  }
}

}  // namespace privtuner::math
