// Masked refresh: the owner of the key makes a fresh ciphertext of one that it cannot read (Mouchet,
// Troncoso-Pastoriza, Bossuat, Hubaux, IACR ePrint 2020/304, for several parties; Sav et al., "POSEIDON", 2021).
#pragma once

#include <cstddef>

#include "privtuner/ckks/parameters.hpp"
#include "privtuner/ckks/tensor.hpp"

namespace privtuner::ckks {

inline constexpr int kRefreshLevel = 2;     // three primes: room for masks that drown every message
inline constexpr int kLogRefreshes = 24;    // ciphertexts that are refreshed under one key
inline constexpr double kWrapBits = 40;     // a wrap among all of them has a probability below 2^-40
inline constexpr int kMaxFloodBits = 40;

// Throws Error if a tensor at `from` cannot be refreshed to `level`.
void check_refresh_levels(const Parameters& parameters, int from, int level);

// Throws Error if a mask could wrap more often than kWrapBits allows. The coefficients of the message m are at most B;
// m + r for r uniform modulo q passes q / 2 with a probability of |m| / q each.
void check_wrap(const Tensor& x);

// What the coefficients of feature f are flooded with before the owner decrypts them: uniform noise of up to this size,
// 2^flood_bits times what the error of any coefficient stays below, but for one case in a million. A value then says at
// most 2^-flood_bits (in statistical distance) about the error under it.
double flood_of(const Tensor& x, std::size_t f, int flood_bits);

}  // namespace privtuner::ckks
