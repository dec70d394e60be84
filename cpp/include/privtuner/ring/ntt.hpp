// Negacyclic number-theoretic transform over Z_q[X]/(X^N + 1).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/math/modular.hpp"

namespace privtuner::ring {

// Tables of one (N, q): N a power of two in [16, 2^16], q prime, q = 1 mod 2N; q < 2^32 for 32-bit words (the top bit
// may be set), q < 2^61 for 64-bit words. Immutable once built; safe to share between threads.
//
// Order: `forward` takes natural order to bit-reversed order, value i being a(psi^(2 brv(i) + 1)); `inverse` is its
// exact inverse, 1/N included. All words in and out are in [0, q). Every path gives the same words; `isa` must be a
// usable one. No branch and no table index depends on the words.
template <class Word>
class Ntt {
 public:
  // Throws std::invalid_argument naming N and q unless the conditions above hold.
  Ntt(std::size_t n, std::uint64_t q);

  std::size_t size() const { return n_; }
  const math::Modulus& modulus() const { return modulus_; }

  void forward(Word* a, math::Isa isa) const;
  // a = factor times the inverse transform of a; factor, public, in [0, q).
  void inverse(Word* a, math::Isa isa, std::uint64_t factor = 1) const;

  // The second factor of many products: `prepare` once, `multiply` often. prepared holds 2 N words (opaque).
  void prepare(const Word* b, Word* prepared) const;
  // out[i] = a[i] * b[i] mod q; out may be a.
  void multiply(const Word* a, const Word* prepared, Word* out, math::Isa isa) const;

  // The tables, as they are described below: what a transform on another device works with.
  using Table = math::AlignedVector<Word>;
  const Table& roots() const { return roots_; }
  const Table& roots_companion() const { return roots_companion_; }
  const Table& inverse_roots() const { return inverse_roots_; }
  const Table& inverse_roots_companion() const { return inverse_roots_companion_; }
  const Table& roots_centred() const { return roots_centred_; }
  const Table& inverse_roots_centred() const { return inverse_roots_centred_; }
  // factor / N, its companion, inverse_roots[1] as it was times factor / N, its companion: the last inverse stage
  // scales as well.
  std::array<Word, 4> last_stage(std::uint64_t factor = 1) const;

 private:
  std::size_t n_;
  math::Modulus modulus_;
  // Entry k in [1, N): psi^brv(k) and psi^-brv(k) (Longa, Naehrig, "Speeding up the number theoretic transform", 2016).
  // 32-bit words hold Montgomery forms w 2^32 mod q with companions (w 2^32 mod q) q^-1 mod 2^32; 64-bit words hold w
  // with Shoup companions floor(w 2^64 / q).
  Table roots_, roots_companion_, inverse_roots_, inverse_roots_companion_;
  // q < 2^50 in 64-bit words, else empty: the bits of the same as doubles in [-q/2, q/2].
  Table roots_centred_, inverse_roots_centred_;
  std::uint64_t n_inverse_, last_root_;  // 1/N, and psi^(-N/2) / N: plain
};

extern template class Ntt<std::uint32_t>;
extern template class Ntt<std::uint64_t>;

}  // namespace privtuner::ring
