// Parameter sets of the linear scheme.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "privtuner/gemm/gemm.hpp"

namespace privtuner::linear {

// Ring Z_q[X]/(X^N + 1), secrets uniform ternary, errors centred binomial with eta = 21.
struct Preset {
  const char* name;
  std::size_t n;       // N: also the tokens of one group
  std::uint64_t q;     // prime, q = 1 mod 2N
  int word_bytes;      // of a residue on the wire: 4 or 8
  int weight_bytes;    // 1 or 2
  int max_weight;      // |W_int| <= max_weight
  int dropped_bits;    // low bits the server's reply leaves out
  int reply_bytes;     // of one output in a reply: 3 (16 + 8 bits) or 4
  std::uint64_t hash;  // of everything above and the samplers: two sides with the same hash speak of the same scheme
};

// Throws std::invalid_argument naming the known presets.
const Preset& preset(const std::string& name);

inline constexpr const char* kPresetNames[] = {"linear-w8", "linear-w16"};

// Largest |output error| of one product, in units of the scaled integers: noise, rounding of x and dropped bits.
// depth = features of the input, norm = the largest Euclidean norm of a row of the matrix that is applied.
double noise_bound(const Preset& preset, std::size_t depth, double norm);

}  // namespace privtuner::linear
