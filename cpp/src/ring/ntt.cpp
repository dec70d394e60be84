#include "privtuner/ring/ntt.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace privtuner::ring {
namespace {

constexpr std::size_t kMinSize = 16, kMaxSize = std::size_t{1} << 16;

[[noreturn]] void refuse(std::size_t n, std::uint64_t q, const std::string& reason) {
  throw std::invalid_argument("no transform for N = " + std::to_string(n) + ", q = " + std::to_string(q) + ": " +
                              reason);
}

template <class Word>
std::uint64_t checked_modulus(std::size_t n, std::uint64_t q) {
  constexpr int kBits = sizeof(Word) == 4 ? 32 : 61;
  if (n < kMinSize || n > kMaxSize || (n & (n - 1)) != 0) refuse(n, q, "N must be a power of two in [16, 65536]");
  if ((q >> kBits) != 0) refuse(n, q, "q must be below 2^" + std::to_string(kBits));
  if (q % (2 * n) != 1) refuse(n, q, "q must be 1 modulo 2 N");
  if (!math::is_prime(q)) refuse(n, q, "q must be prime");
  return q;
}

// Inverse of q modulo 2^64, by Newton's iteration: q itself is right modulo 8, each step doubles the bits.
std::uint64_t inverse_mod_two64(std::uint64_t q) {
  std::uint64_t inverse = q;
  for (int bits = 3; bits < 64; bits *= 2) inverse *= 2 - q * inverse;
  return inverse;
}

// How a constant factor is stored: Montgomery form for 32-bit words, plain with Shoup's companion for 64-bit words.
// Free of divisions and branches, as factors may be secret.
template <class Word>
struct Factor {
  static constexpr bool kMontgomery = sizeof(Word) == 4;
  const math::Modulus& modulus;
  const std::uint64_t q_inverse = inverse_mod_two64(modulus.q);
  const std::uint64_t two32 = modulus.reduce(std::uint64_t{1} << 32), two32_shoup = modulus.shoup(two32);

  Word value(std::uint64_t w) const {
    if constexpr (kMontgomery) w = modulus.mul_shoup(w, two32, two32_shoup);
    return static_cast<Word>(w);
  }
  Word companion(std::uint64_t w) const {
    if constexpr (kMontgomery) return static_cast<Word>(value(w) * q_inverse);
    // floor(w 2^64 / q) = (w 2^64 - r) / q with r = w 2^64 mod q; it is below 2^64, so it equals -r / q modulo 2^64.
    return static_cast<Word>((0 - modulus.mul_shoup(w, modulus.two64, modulus.two64_shoup)) * q_inverse);
  }
};

template <class Word>
bool has_centred(std::uint64_t q) {
  return sizeof(Word) == 8 && (q >> 50) == 0;
}

// The bits of the double in [-q/2, q/2] that is w modulo q.
template <class Word>
Word centred(std::uint64_t w, std::uint64_t q) {
  const double value = w > q / 2 ? -static_cast<double>(q - w) : static_cast<double>(w);
  Word bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

std::size_t bit_reverse(std::size_t k, std::size_t n) {
  std::size_t reversed = 0;
  for (; n > 1; n /= 2, k /= 2) reversed = 2 * reversed + (k & 1);
  return reversed;
}

template <class Word>
const kernels::NttKernels<Word>& kernels_for(std::size_t n, [[maybe_unused]] std::uint64_t q, math::Isa isa) {
  // The vector kernels need a few registers' worth of coefficients.
  const kernels::Kernels& all = kernels::kernels_of(n < kernels::kVectorMinimum ? math::Isa::portable : isa);
  if constexpr (sizeof(Word) == 4) {
    return all.ntt32;
  } else {
    return (q >> 50) == 0 ? all.ntt50 : all.ntt61;
  }
}

}  // namespace

template <class Word>
Ntt<Word>::Ntt(std::size_t n, std::uint64_t q)
    : n_(n),
      modulus_(checked_modulus<Word>(n, q)),
      roots_(n),
      roots_companion_(n),
      inverse_roots_(n),
      inverse_roots_companion_(n),
      roots_centred_(has_centred<Word>(q) ? n : 0),
      inverse_roots_centred_(roots_centred_.size()) {
  const Factor<Word> factor{modulus_};
  const std::uint64_t psi = math::primitive_root_of_unity(2 * n, modulus_), psi_inverse = modulus_.inv(psi);
  std::uint64_t power = 1, inverse_power = 1;
  for (std::size_t exponent = 0; exponent < n; ++exponent) {
    const std::size_t k = bit_reverse(exponent, n);
    roots_[k] = factor.value(power);
    roots_companion_[k] = factor.companion(power);
    inverse_roots_[k] = factor.value(inverse_power);
    inverse_roots_companion_[k] = factor.companion(inverse_power);
    if (!roots_centred_.empty()) {
      roots_centred_[k] = centred<Word>(power, q);
      inverse_roots_centred_[k] = centred<Word>(inverse_power, q);
    }
    power = modulus_.mul(power, psi);
    inverse_power = modulus_.mul(inverse_power, psi_inverse);
  }
  n_inverse_ = modulus_.inv(modulus_.reduce(n));
  last_root_ = modulus_.mul(n_inverse_, modulus_.pow(psi_inverse, n / 2));  // brv(1) = N / 2
}

template <class Word>
void Ntt<Word>::forward(Word* a, math::Isa isa) const {
  const kernels::NttView<Word> view{
      n_, static_cast<Word>(modulus_.q), roots_.data(), roots_companion_.data(), roots_centred_.data(), 0, 0, 0, 0};
  kernels_for<Word>(n_, modulus_.q, isa).forward(view, a);
}

template <class Word>
std::array<Word, 4> Ntt<Word>::last_stage(std::uint64_t factor) const {
  const Factor<Word> factors{modulus_};
  const std::uint64_t scale = modulus_.mul(n_inverse_, factor), root = modulus_.mul(last_root_, factor);
  return {factors.value(scale), factors.companion(scale), factors.value(root), factors.companion(root)};
}

template <class Word>
void Ntt<Word>::inverse(Word* a, math::Isa isa, std::uint64_t factor) const {
  const auto [scale, scale_companion, root, root_companion] = last_stage(factor);
  const kernels::NttView<Word> view{n_,
                                    static_cast<Word>(modulus_.q),
                                    inverse_roots_.data(),
                                    inverse_roots_companion_.data(),
                                    inverse_roots_centred_.data(),
                                    scale,
                                    scale_companion,
                                    root,
                                    root_companion};
  kernels_for<Word>(n_, modulus_.q, isa).inverse(view, a);
}

template <class Word>
void Ntt<Word>::prepare(const Word* b, Word* prepared) const {
  const Factor<Word> factor{modulus_};
  for (std::size_t i = 0; i < n_; ++i) {
    const Word w = b[i];
    prepared[i] = factor.value(w);
    prepared[n_ + i] = factor.companion(w);
  }
}

template <class Word>
void Ntt<Word>::multiply(const Word* a, const Word* prepared, Word* out, math::Isa isa) const {
  const Word q = static_cast<Word>(modulus_.q);
  kernels_for<Word>(n_, modulus_.q, isa).multiply(n_, q, a, prepared, prepared + n_, out);
}

template class Ntt<std::uint32_t>;
template class Ntt<std::uint64_t>;

}  // namespace privtuner::ring
