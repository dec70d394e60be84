// What the kernels know of a prime. Plain data: the kernels' files are compiled with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace privtuner::math {
struct Modulus;
}

namespace privtuner::ring::kernels {

// Of q, k bits long, for products of 52-bit words. The companion of w is floor(w 2^52 / q).
struct Words52 {
  std::uint64_t reciprocal;                // floor(2^2k / q)
  std::uint64_t one_companion;             // of 1
  std::uint64_t two52, two52_companion;    // 2^52 modulo q
  std::uint64_t two104, two104_companion;  // 2^104 modulo q
};

struct Row {
  std::uint64_t q;
  double inverse;                // 1 / q rounded
  const math::Modulus* modulus;  // for the portable kernels
  const Words52* words52;        // for those of 52-bit words
};

inline constexpr std::size_t kMaxConverted = 64;  // rows that a base conversion starts from
// Where it leads, see convert_rows.
struct ConversionTarget {
  Row row;
  const std::uint64_t* weights;
  std::uint64_t* out;
};

// Of an automorphism X -> X^element of rows in the NTT's order: group g of 8 words is group sources[g] / 8 with its
// words in another order, that of sources[g] % 8. See Automorphism.
inline constexpr std::size_t kGroupWords = 8;
struct GroupOrder {
  const std::uint32_t* sources;
  std::uint32_t element;
};

}  // namespace privtuner::ring::kernels
