#include "privtuner/linear/preset.hpp"

#include <cmath>
#include <stdexcept>

#include "privtuner/gemm/gemm.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {
namespace {

std::uint64_t fnv1a(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // Fowler, Noll, Vo: FNV-1a, 64 bits
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

void require(bool condition, const char* name, const std::string& text) {
  if (!condition) throw std::invalid_argument("preset '" + std::string(name) + "': " + text);
}

}  // namespace

Preset make_preset(const char* name, std::size_t n, std::uint64_t q, int max_weight, int dropped_bits) {
  require(max_weight >= 1 && max_weight <= gemm::kMaxWeight16, name,
          "weights up to " + std::to_string(max_weight) + ", not in [1, " + std::to_string(gemm::kMaxWeight16) + "]");
  require(dropped_bits >= 1 && dropped_bits < 32, name, std::to_string(dropped_bits) + " bits dropped, not in [1, 31]");
  const int word_bits = q >> 32 == 0 ? 32 : 50;  // scaled integers are doubles on their way, exact below 2^51
  const std::uint64_t largest = q - 1 + (std::uint64_t{1} << (dropped_bits - 1));  // before the shift of a reply
  require(largest >> word_bits == 0, name,
          "q = " + std::to_string(q) + " leaves no room to round below 2^" + std::to_string(word_bits));
  require(largest >> dropped_bits >> 32 == 0, name, "a reply keeps at most 32 bits of an output: drop more");
  Preset p{};
  p.name = name;
  p.n = n;
  p.q = q;
  p.max_weight = max_weight;
  p.dropped_bits = dropped_bits;
  p.word_bytes = word_bits == 32 ? 4 : 8;
  p.weight_bytes = max_weight <= 127 ? 1 : 2;
  p.reply_bytes = largest >> dropped_bits >> 24 == 0 ? 3 : 4;
  p.hash = fnv1a(std::string(name) + "|N=" + std::to_string(n) + "|q=" + std::to_string(q) +
                 "|secret=ternary|error=binomial-" + std::to_string(ring::kBinomialEta) + "|weight=" +
                 std::to_string(max_weight) + "|drop=" + std::to_string(dropped_bits) + "|mask=chacha20-bitreversed");
  return p;
}

const std::vector<Preset>& presets() {
  // q = 2^32 - 2^20 + 1, and the largest prime 1 mod 2^17 that leaves 2^17 below 2^50 free for rounding.
  static const std::vector<Preset> all = {
      make_preset("linear-w8", 2048, 4293918721u, 127, 8),
      make_preset("linear-w16", 2048, 1125899903827969u, gemm::kMaxWeight16, 18),
  };
  return all;
}

const Preset& preset(const std::string& name) {
  std::string known;
  for (const Preset& p : presets()) {
    if (name == p.name) return p;
    known += (known.empty() ? "" : ", ") + std::string(p.name);
  }
  throw std::invalid_argument("unknown preset '" + name + "': choose one of " + known);
}

double noise_bound(const Preset& preset, std::size_t depth, double norm) {
  // |sum_j W_j (e_j + rounding_j)| <= |W|_2 sqrt(depth) max|.| (Cauchy-Schwarz), then the bits the reply leaves out.
  return (ring::kBinomialEta + 0.5) * std::sqrt(static_cast<double>(depth)) * norm +
         std::ldexp(1.0, preset.dropped_bits - 1);
}

}  // namespace privtuner::linear
