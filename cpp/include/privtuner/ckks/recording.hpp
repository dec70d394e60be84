// What an evaluator would have done to the words of planned tensors, step by step: enough to do it on another device.
//
// A step names its operands by TensorRef: features [first, first + features) of the words in one storage, which lie as
// [feature][component][limb][N] in the NTT domain at the ref's level. Every `out` is a whole storage that no earlier
// step wrote; every operand was an `out` before or is a tensor that came planned from elsewhere. A result at a lower
// level than an operand takes the operand's first limbs. Operations that only read words otherwise (select, assume,
// reinterpret, with_noise) are no steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <variant>
#include <vector>

#include "privtuner/ckks/tensor.hpp"
#include "privtuner/math/memory.hpp"

namespace privtuner::ckks {
namespace step {

// sum_t weights[limb][t][f] terms[t] + constants[limb][f], the constants added to component 0 alone. A term of one
// feature serves every f.
struct Terms {
  std::vector<TensorRef> terms;
  std::vector<std::uint64_t> weights;    // [limb][term][feature], residues
  std::vector<std::uint64_t> constants;  // [limb][feature], residues; empty: none
};
// The terms at `limbs` limbs; then divided by the last prime, if rescaled.
struct Combine {
  TensorRef out;
  Terms sum;
  bool rescaled;
  std::size_t limbs;
};
// x + y or x - y; one of them may have a single feature.
struct Add {
  TensorRef out, x, y;
  bool minus;
};
// The sum over the features of x.
struct Sum {
  TensorRef out, x;
};
// The features of all parts, one after the other.
struct Copy {
  TensorRef out;
  std::vector<TensorRef> parts;
};
// x times ring elements of these coefficients, at `limbs` limbs; divided by the last prime.
struct Plain {
  TensorRef out, x;
  math::SecretBuffer<std::int64_t> coefficients;  // [feature][N]; clear values are as secret as keys
  std::size_t limbs;
};
// multipliers[limb][f] x y (summed over the features, if `summed`) + addend at `limbs` limbs; relinearised, and divided
// by the last prime.
struct Product {
  TensorRef out, x, y;
  bool summed;
  std::vector<std::uint64_t> multipliers;  // [limb][feature], residues; empty: ones
  Terms addend;                            // no terms: none
  std::size_t limbs;
};
// A clear matrix, which the caller knows, times the features of x.
struct Matrix {
  TensorRef out, x;
  bool transpose;
};
// x under the automorphisms X -> X^elements[i], switched back to the secret. Element 1 is a copy.
struct Galois {
  TensorRef x;
  std::vector<TensorRef> outs;
  std::vector<std::uint32_t> elements;
};
// x times X^power.
struct Monomial {
  TensorRef out, x;
  std::size_t power;
};

}  // namespace step

using Step = std::variant<step::Combine, step::Add, step::Sum, step::Copy, step::Plain, step::Product, step::Matrix,
                          step::Galois, step::Monomial>;

// Thread-safe. A step stands behind those that its operands come from: they were added before the operand was returned.
class Recording {
 public:
  // batch: features that a circuit takes through one step where it could go feature by feature: words that are alive
  // at once against the size of a step. Throws std::invalid_argument for 0.
  explicit Recording(std::size_t batch);
  std::size_t batch() const { return batch_; }
  void add(Step step);
  // The steps since the last call.
  std::vector<Step> take();

 private:
  const std::size_t batch_;
  std::mutex mutex_;
  std::vector<Step> steps_;
};

}  // namespace privtuner::ckks
