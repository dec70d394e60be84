// Samplers: one operating-system seed, expanded by ChaCha20 into independent streams.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "privtuner/math/cpu.hpp"

namespace privtuner::ring {

// 32 bytes of key material; wiped when released.
struct Seed {
  std::array<std::uint8_t, 32> bytes{};
  Seed() = default;
  Seed(const Seed&) = default;
  Seed& operator=(const Seed&) = default;
  ~Seed();
  // From the operating system (getentropy). Throws std::runtime_error if it fails.
  static Seed from_os();
};

// Fills from the operating system's generator. Throws std::runtime_error if it fails.
void os_random(void* out, std::size_t bytes);

// What a stream is for; part of the nonce, so that no two uses share keystream.
enum class Domain : std::uint32_t { mask = 0, secret = 1, error = 2, key = 3 };

// One keystream: nonce = LE32(domain) || LE32(index) || LE32(sub_index).
struct Stream {
  Domain domain;
  std::uint32_t index;
  std::uint32_t sub_index;
};

inline constexpr int kBinomialEta = 21;               // |e| <= 21, sigma = sqrt(21 / 2) = 3.24
inline constexpr std::size_t kMaxSamples = 1u << 17;  // one call; keeps the block counter far from 2^32

// Every sampler throws std::invalid_argument for n > kMaxSamples, gives the same values on every path (`isa` must be a
// usable one), and treats a value that is kept without a branch or a table index that depends on it; branches on values
// that are thrown away reveal how many there were, which says nothing of the others. Words are little-endian.

// n residues uniform in [0, q), by rejection; q >= 2, else std::invalid_argument. Definition (parallel by design):
// coefficient i takes keystream word i, masked to q's bit length. Words that are >= q are replaced, in order of i, by
// the next accepted words from position n' on, where n' is n rounded up to whole 64-byte blocks.
void sample_uniform(const Seed& seed, Stream stream, std::uint32_t q, std::uint32_t* out, std::size_t n, math::Isa isa);
void sample_uniform(const Seed& seed, Stream stream, std::uint64_t q, std::uint64_t* out, std::size_t n, math::Isa isa);

// n values uniform in {-1, 0, 1}, by rejection. Coefficient i takes keystream byte i: its residue modulo 3, minus 1.
// Bytes of 255 are replaced as above, n' being n rounded up to whole blocks of bytes.
void sample_ternary(const Seed& seed, Stream stream, std::int8_t* out, std::size_t n, math::Isa isa);

// n values of the centred binomial distribution with eta = 21: popcount of 42 uniform bits, minus 21. 64 words make 48
// coefficients: coefficient 48 g + 16 k + l, with k < 3 and l < 16, counts the 32 bits of word 64 g + 16 k + l and the
// bits 10 k to 10 k + 9 of word 64 g + 48 + l.
void sample_binomial(const Seed& seed, Stream stream, std::int8_t* out, std::size_t n, math::Isa isa);

}  // namespace privtuner::ring
