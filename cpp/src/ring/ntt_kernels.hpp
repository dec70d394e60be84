// What the NTT kernels share. Plain data and declarations alone: the kernels' files are compiled with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace privtuner::ring::kernels {

// One direction of one transform. Entry k of roots holds the twiddle of block k (see Ntt), k in [1, n).
template <class Word>
struct NttView {
  std::size_t n;
  Word q;
  const Word* roots;
  const Word* companions;
  // Inverse only.
  Word n_inverse, n_inverse_companion, last_root, last_root_companion;
};

// The vector kernels take n >= kVectorMinimum; the portable ones take any.
inline constexpr std::size_t kVectorMinimum = 256;

#define PRIVTUNER_NTT_KERNELS(path)                                                                    \
  void forward_##path(const NttView<std::uint32_t>& ntt, std::uint32_t* a);                            \
  void forward_##path(const NttView<std::uint64_t>& ntt, std::uint64_t* a);                            \
  void inverse_##path(const NttView<std::uint32_t>& ntt, std::uint32_t* a);                            \
  void inverse_##path(const NttView<std::uint64_t>& ntt, std::uint64_t* a);                            \
  void multiply_##path(std::size_t n, std::uint32_t q, const std::uint32_t* a, const std::uint32_t* b, \
                       const std::uint32_t* b_companion, std::uint32_t* out);                          \
  void multiply_##path(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b, \
                       const std::uint64_t* b_companion, std::uint64_t* out);

PRIVTUNER_NTT_KERNELS(portable)
PRIVTUNER_NTT_KERNELS(avx2)
PRIVTUNER_NTT_KERNELS(avx512)

#undef PRIVTUNER_NTT_KERNELS

// q < 2^50.
void forward_avx512ifma(const NttView<std::uint64_t>& ntt, std::uint64_t* a);
void inverse_avx512ifma(const NttView<std::uint64_t>& ntt, std::uint64_t* a);
void multiply_avx512ifma(std::size_t n, std::uint64_t q, const std::uint64_t* a, const std::uint64_t* b,
                         const std::uint64_t* b_companion, std::uint64_t* out);

}  // namespace privtuner::ring::kernels
