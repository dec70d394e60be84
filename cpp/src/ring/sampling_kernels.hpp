// What the samplers' kernels share. Declarations alone: the kernels' files are compiled with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace privtuner::ring::kernels {

// A binomial group: 64 keystream words make 48 coefficients. See sample_binomial.
inline constexpr std::size_t kBinomialGroup = 48, kBinomialWords = 64;

// first_rejected: the first index i >= begin whose word, masked, is >= q, or n; masks words[begin, i] in place, and
// perhaps more (masking twice changes nothing). binomial: whole groups.
#define PRIVTUNER_SAMPLING_KERNELS(path)                                                                        \
  std::size_t first_rejected_##path(std::uint32_t* words, std::size_t begin, std::size_t n, std::uint32_t mask, \
                                    std::uint32_t q);                                                           \
  std::size_t first_rejected_##path(std::uint64_t* words, std::size_t begin, std::size_t n, std::uint64_t mask, \
                                    std::uint64_t q);                                                           \
  void binomial_##path(const std::uint32_t* words, std::int8_t* out, std::size_t groups);

PRIVTUNER_SAMPLING_KERNELS(avx2)
PRIVTUNER_SAMPLING_KERNELS(avx512)

#undef PRIVTUNER_SAMPLING_KERNELS

}  // namespace privtuner::ring::kernels
