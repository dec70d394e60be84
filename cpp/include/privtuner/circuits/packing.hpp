// Sums over all slots of many features, packed into few ciphertexts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::circuits {

// The automorphisms that packing needs keys for: 2^k + 1, k = 1 .. log2 N.
std::vector<std::uint32_t> packing_elements(const ckks::Parameters& parameters);

// Where the sum of feature f stands after packing `features` of them.
struct PackedPlace {
  std::size_t feature, coefficient;
};
PackedPlace packed_place(std::size_t n, std::size_t features, std::size_t f);

// A tensor of ceil(features / N) features whose coefficients (not slots) are the sums over all N/2 slots, unused ones
// included, of the real parts of x's features. The sum over the slots of a message is N/2 times its constant
// coefficient; the constant coefficients are merged by one automorphism a feature (Chen, Dai, Kim, Song, "Efficient
// Homomorphic Conversion Between (Ring) LWE Ciphertexts", 2021, algorithms 2 and 3), where a rotation and sum would
// take log2(N/2) rotations a feature and return as many ciphertexts as features. No level. The features' scales must
// agree.
ckks::TensorPtr pack_slot_sums(const ckks::Evaluator& evaluator, const ckks::TensorPtr& x);

}  // namespace privtuner::circuits
