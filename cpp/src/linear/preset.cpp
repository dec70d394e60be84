#include "privtuner/linear/preset.hpp"

#include <cmath>
#include <stdexcept>

#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {
namespace {

std::uint64_t fnv1a(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325u;  // Fowler, Noll, Vo: FNV-1a, 64 bits
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

Preset with_hash(Preset p) {
  p.hash = fnv1a(std::string(p.name) + "|N=" + std::to_string(p.n) + "|q=" + std::to_string(p.q) +
                 "|secret=ternary|error=binomial-" + std::to_string(ring::kBinomialEta) +
                 "|weight=" + std::to_string(p.max_weight) + "|drop=" + std::to_string(p.dropped_bits) +
                 "|mask=chacha20-bitreversed");
  return p;
}

}  // namespace

const Preset& preset(const std::string& name) {
  // q = 2^32 - 2^20 + 1, and the largest prime 1 mod 2^17 that leaves 2^17 below 2^50 free for rounding.
  static const Preset w8 = with_hash({"linear-w8", 2048, 4293918721u, 4, 1, 127, 8, 3, 0});
  static const Preset w16 = with_hash({"linear-w16", 2048, 1125899903827969u, 8, 2, gemm::kMaxWeight16, 18, 4, 0});
  for (const Preset* p : {&w8, &w16}) {
    if (name == p->name) return *p;
  }
  throw std::invalid_argument("unknown preset '" + name + "': choose linear-w8 or linear-w16");
}

double noise_bound(const Preset& preset, std::size_t depth, double norm) {
  // |sum_j W_j (e_j + rounding_j)| <= |W|_2 sqrt(depth) max|.| (Cauchy-Schwarz), then the bits the reply leaves out.
  return (ring::kBinomialEta + 0.5) * std::sqrt(static_cast<double>(depth)) * norm +
         std::ldexp(1.0, preset.dropped_bits - 1);
}

}  // namespace privtuner::linear
