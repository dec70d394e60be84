// The kernels of one instruction-set path. Plain data and declarations alone: the kernels' files are compiled with
// other flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"
#include "privtuner/ring/row.hpp"

namespace privtuner::ring::kernels {

// One direction of one transform. Entry k of roots holds the twiddle of block k (see Ntt), k in [1, n).
template <class Word>
struct NttView {
  std::size_t n;
  Word q;
  const Word* roots;
  const Word* companions;
  const Word* centred;  // q < 2^50 alone, null otherwise: the bits of the double next to 0 that is the root modulo q
  // Inverse only.
  Word n_inverse, n_inverse_companion, last_root, last_root_companion;
};

// The vector kernels take n >= kVectorMinimum; the portable ones take any.
inline constexpr std::size_t kVectorMinimum = 256;

template <class Word>
struct NttKernels {
  void (*forward)(const NttView<Word>& ntt, Word* a);
  void (*inverse)(const NttView<Word>& ntt, Word* a);
  // out[i] = a[i] b[i]
  void (*multiply)(std::size_t n, Word q, const Word* a, const Word* b, const Word* b_companion, Word* out);
};

// Writes `batches` times `width` blocks from the block counter in state[12] on; the counter wraps modulo 2^32.
inline constexpr std::size_t kChaCha20MaxWidth = 16;
struct ChaCha20Kernel {
  std::size_t width;
  void (*batches)(const std::uint32_t state[16], std::uint8_t* out, std::size_t batches);
};

// A binomial group: 64 keystream words make 48 coefficients. See sample_binomial.
inline constexpr std::size_t kBinomialGroup = 48, kBinomialWords = 64;
// The first index i >= begin whose word, masked, is >= q, or n. The words before begin are masked and below q. Masks
// words[begin, i] in place, and perhaps more (masking twice changes nothing).
template <class Word>
using FirstRejected = std::size_t (*)(Word* words, std::size_t begin, std::size_t n, Word mask, Word q);
struct SamplingKernels {
  FirstRejected<std::uint32_t> first_rejected32;
  FirstRejected<std::uint64_t> first_rejected64;
  void (*binomial)(const std::uint32_t* words, std::int8_t* out, std::size_t groups);
};

namespace {  // compiled for every instruction set

// Bits 0, 1, 2 in the order 2, 1, 0.
constexpr std::uint32_t reverse3(std::uint32_t x) { return (x & 1) << 2 | (x & 2) | x >> 2; }
// The word of a group that word `word` of its image comes from: e = reverse3(word) becomes e element + carry, for 8
// consecutive words are the values at powers N / 8 apart, in bit-reversed order.
constexpr std::uint32_t source_word(std::uint32_t element, std::uint32_t carry, std::uint32_t word) {
  return reverse3((reverse3(word) * element + carry) % kGroupWords);
}

}  // namespace

// See ResidueRow and the functions beside it.
struct ResidueKernels {
  void (*add)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*subtract)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*negate)(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n);
  void (*multiply)(const Row& row, const std::uint64_t* a, const std::uint64_t* b, std::uint64_t* out, std::size_t n);
  void (*multiply_scalar)(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n);
  void (*add_scalar)(const Row& row, const std::uint64_t* a, std::uint64_t w, std::uint64_t* out, std::size_t n);
  void (*reduce)(const Row& row, const std::uint64_t* a, std::uint64_t* out, std::size_t n);
  void (*inner_product)(const Row& row, const std::uint64_t* const* a, const std::uint64_t* const* b, std::size_t terms,
                        std::uint64_t* out, std::size_t n);
  void (*linear_combination)(const Row& row, const std::uint64_t* const* a, const std::uint64_t* w, std::size_t terms,
                             std::uint64_t* out, std::size_t n);
  void (*convert)(const std::uint64_t* const* a, const double* inverse, std::size_t terms,
                  const ConversionTarget* targets, std::size_t count, std::size_t begin, std::size_t end);
  // Groups [first, first + count) of the result; the words at `block` are the groups from `origin` on.
  void (*permute)(const GroupOrder& order, const std::uint64_t* block, std::size_t origin, std::size_t first,
                  std::size_t count, std::uint64_t* out);
};

struct Kernels {
  NttKernels<std::uint32_t> ntt32;         // q < 2^32
  NttKernels<std::uint64_t> ntt50, ntt61;  // q < 2^50, q < 2^61
  ChaCha20Kernel chacha20;
  SamplingKernels sampling;
  ResidueKernels residues;
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512ifma();
inline const Kernels& kernels_amx() { return kernels_avx512ifma(); }

// The kernels of a path. Throws std::logic_error when this build holds none.
const Kernels& kernels_of(math::Isa isa);

}  // namespace privtuner::ring::kernels
