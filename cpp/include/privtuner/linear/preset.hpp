// Parameter sets of the linear scheme.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace privtuner::linear {

// Ring Z_q[X]/(X^N + 1), secrets uniform ternary, errors centred binomial with eta = 21.
struct Preset {
  const char* name;
  std::size_t n;     // N: also the tokens of one group
  std::uint64_t q;   // prime, q = 1 mod 2N
  int max_weight;    // |W_int| <= max_weight
  int dropped_bits;  // low bits the server's reply leaves out
  int word_bytes;    // of a residue on the wire: 4 or 8
  int weight_bytes;  // 1 or 2
  int reply_bytes;  // of one output in a reply, a row of them being 3: [tokens] u16, [tokens] u8 (low); 4: [tokens] u32
  std::uint64_t hash;  // of everything above and the samplers: two sides with the same hash speak of the same scheme
};

// What follows from the other numbers is filled in. Throws std::invalid_argument if these kernels cannot compute it.
Preset make_preset(const char* name, std::size_t n, std::uint64_t q, int max_weight, int dropped_bits);

// All that can be named.
const std::vector<Preset>& presets();

// Throws std::invalid_argument naming the known presets.
const Preset& preset(const std::string& name);

// Calls run(Word{}) with the word that holds a residue: the one place where its size chooses code.
template <class Run>
auto with_word(const Preset& preset, Run&& run) {
  return preset.word_bytes == 4 ? run(std::uint32_t{}) : run(std::uint64_t{});
}

// Largest |output error| of one product, in units of the scaled integers: noise, rounding of x and dropped bits.
// depth = features of the input, norm = the largest Euclidean norm of a row of the matrix that is applied.
double noise_bound(const Preset& preset, std::size_t depth, double norm);

}  // namespace privtuner::linear
