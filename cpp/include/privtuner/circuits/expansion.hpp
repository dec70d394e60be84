// Packed numbers, each alone in all slots of a ciphertext of its own.
#pragma once

#include <cstddef>
#include <vector>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::circuits {

// The numbers `wanted`, rising, of the `count` that stand in the coefficients of x as pack_slot_sums leaves them
// (packed_place), each in every slot of a feature. The first of the automorphisms 2^k + 1, k = log2 count .. 1, keeps
// the even ones and turns the sign of the odd ones, so that sum and difference part them; then the next one does
// (Angel, Chen, Laine, Setty, "PIR with Compressed Queries and Amortized Query Processing", 2018, section 3.3). One key
// switch for each number but the first when all are wanted, and k more when every 2^k-th one is. Every parting doubles:
// count rounded up to a power of two is taken out by the scale. No level. x has one feature, whose
// error is one of coefficients; its other coefficients hold nothing but that.
ckks::TensorPtr expand(const ckks::Evaluator& evaluator, const ckks::TensorPtr& x, std::size_t count,
                       const std::vector<std::size_t>& wanted);

}  // namespace privtuner::circuits
