// What stands before and behind a masked refresh: levels, scales, and two features in one ciphertext.
#pragma once

#include <cstddef>

#include "privtuner/ckks/evaluator.hpp"

namespace privtuner::circuits {

// x as it is masked, at ckks::kRefreshLevel. From above that level it comes at the scale that its fresh ciphertexts
// shall have, the chain's of `level`, and two features travel as one: f + i g, f of the first half and g of the
// second, at half of that scale; an odd one behind them stands alone, and so do those of a `packed` tensor, whose
// numbers are coefficients. Already there, x has no level to spare and stays as it is.
ckks::TensorPtr lower_for_refresh(const ckks::Evaluator& evaluator, const ckks::TensorPtr& x, int level, bool packed);

// The `features` features that lower_for_refresh paired, with |value| <= bound: (z + conj z) / 2 and
// (z - conj z) / 2i, one automorphism a pair. No level.
ckks::TensorPtr split_pairs(const ckks::Evaluator& evaluator, const ckks::TensorPtr& z, std::size_t features,
                            double bound);

}  // namespace privtuner::circuits
