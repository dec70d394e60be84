// Arithmetic on encrypted tensors. Every operation carries level, scale, bound and predicted error; on planned tensors
// it carries nothing else, so a dry run is the run itself without the words; it may record what happens to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "privtuner/ckks/keys.hpp"
#include "privtuner/ckks/plaintext.hpp"
#include "privtuner/ckks/recording.hpp"
#include "privtuner/ckks/tensor.hpp"
#include "privtuner/gemm/gemm.hpp"

namespace privtuner::ckks {

// Units of work, each of one feature at a number of limbs.
enum class Work {
  product,      // one product of two ciphertexts before relinearisation
  relinearise,  // key switch of the third component, with rescale
  decompose,    // digits of a ciphertext for one or several rotations
  rotate,       // one rotation of a decomposed ciphertext
  rescale,
  term,     // one ciphertext times a number, or added
  plain,    // encoding clear values and one product with them
  matrix,   // 10^6 multiply-adds of one byte of a clear matrix with a residue
  mask,     // one ciphertext masked for a refresh
  unmask,   // the mask taken off a refreshed one
  refresh,  // the owner's part between them
};
const char* work_name(Work work);

// One masked refresh: ciphertexts that go to the key's owner and come back at a level.
struct RefreshCount {
  std::size_t ciphertexts;
  int level;
};

// What was done, or in a dry run would be.
class Trace {
 public:
  void count(Work work, std::size_t limbs, double amount);
  void count_refresh(std::size_t ciphertexts, int level);
  void need_relinearisation();
  void need_galois(std::uint32_t element);
  std::map<std::pair<Work, std::size_t>, double> work() const;
  bool relinearisation() const;
  std::set<std::uint32_t> galois() const;
  std::vector<RefreshCount> refreshes() const;  // in order
  void clear();

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<Work, std::size_t>, double> work_;
  bool relinearisation_ = false;
  std::set<std::uint32_t> galois_;
  std::vector<RefreshCount> refreshes_;
};

// A clear matrix [rows][cols] in small integers: W[k][j] ~ delta[k] integers[k][j].
class Matrix {
 public:
  Matrix(gemm::Weights weights, std::vector<double> delta);
  const gemm::Weights& weights() const { return weights_; }
  const std::vector<double>& delta() const { return delta_; }
  std::size_t rows() const { return weights_.rows(); }
  std::size_t cols() const { return weights_.cols(); }

 private:
  gemm::Weights weights_;
  std::vector<double> delta_;
};

// sum_t weights[t][f] tensors[t] + constants[f], all as raw integers: what a linear combination adds up.
struct Combination {
  std::vector<TensorPtr> tensors;
  std::vector<std::vector<double>> weights;  // [t][feature], whole numbers
  std::vector<double> constants;             // [feature], whole numbers; empty: none
  bool exact = false;                        // the weights are meant as they are, not rounded from others
};

// Every operation throws Error when it cannot be done; the message names the values and the fix. Two tensors at
// different levels meet at the lower one, the higher being brought to the scale the other has there. A tensor of one
// feature combines with one of many.
class Evaluator {
 public:
  // keys may be null: then only operations without keys, or dry runs. With a recording, operations on planned tensors
  // add their steps to it, and need the keys that the steps need.
  explicit Evaluator(ParametersPtr parameters, std::shared_ptr<const EvaluationKeys> keys = nullptr,
                     std::shared_ptr<Recording> recording = nullptr);

  const ParametersPtr& parameters() const { return parameters_; }
  Trace& trace() const { return trace_; }
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }
  Recording* recording() const { return recording_.get(); }  // null: none
  // Features of x that a circuit takes at a time where it goes through them one after the other.
  std::size_t batch(const Tensor& x) const { return recording_ && x.planned ? recording_->batch() : 1; }

  TensorPtr add(const TensorPtr& x, const TensorPtr& y) const;
  TensorPtr subtract(const TensorPtr& x, const TensorPtr& y) const;
  TensorPtr negate(const TensorPtr& x) const;
  // constants: one, or one a feature.
  TensorPtr add_constant(const TensorPtr& x, const std::vector<double>& constants) const;
  TensorPtr multiply_constant(const TensorPtr& x, const std::vector<double>& constants) const;
  TensorPtr multiply_plain(const TensorPtr& x, const Values& values) const;
  TensorPtr multiply(const TensorPtr& x, const TensorPtr& y) const;
  TensorPtr dot(const TensorPtr& x, const TensorPtr& y) const;
  TensorPtr sum_features(const TensorPtr& x) const;
  // independent: the tensors are known to come from different features of one tensor.
  TensorPtr concatenate(const std::vector<TensorPtr>& tensors, bool independent = false) const;
  // A tensor put together of parts, none of which is needed afterwards.
  class Assembly;
  // Features [begin, end): a view.
  TensorPtr select(const TensorPtr& x, std::size_t begin, std::size_t end) const;
  TensorPtr linear(const TensorPtr& x, const Matrix& matrix, gemm::Operand operand) const;
  TensorPtr linear_combination(const std::vector<TensorPtr>& tensors, const std::vector<std::vector<double>>& weights,
                               const std::vector<double>& constants) const;
  TensorPtr rescale(const TensorPtr& x) const;
  // To a lower level at the same scale: limbs are dropped, no level is used up.
  TensorPtr drop(const TensorPtr& x, int level) const;
  // To `level` at scale `scale` (one a feature), through a product with a constant: needs x above `level`.
  TensorPtr bring(const TensorPtr& x, int level, const std::vector<double>& scale) const;
  std::vector<TensorPtr> rotate(const TensorPtr& x, const std::vector<long long>& steps) const;
  TensorPtr conjugate(const TensorPtr& x) const;
  TensorPtr sum_slots(const TensorPtr& x) const;
  // The ring automorphism X -> X^element, and the product with X^power: what slots are made of is coefficients.
  TensorPtr automorphism(const TensorPtr& x, std::uint32_t element) const;
  TensorPtr multiply_monomial(const TensorPtr& x, std::size_t power) const;
  // The caller's promise that values are within `bound`, and that no slot is off by more than `error` (worst_error).
  TensorPtr assume(const TensorPtr& x, double bound, double error = std::numeric_limits<double>::infinity()) const;
  // What a masked refresh (refresh.hpp) makes of x, which is at kRefreshLevel: planned, or with room for the words. The
  // errors of a packed tensor are those of coefficients.
  std::shared_ptr<Tensor> refreshed(const TensorPtr& x, int level, bool packed) const;
  // The same of revealing x (refresh.hpp) under a flood of `flood_bits`. Throws Error if more than one value in a
  // million is then off by more than `error`.
  std::shared_ptr<Tensor> revealed(const TensorPtr& x, int flood_bits, double error, bool packed) const;
  // The same words read as values times `factor`, which are within `bound`.
  TensorPtr reinterpret(const TensorPtr& x, double factor, double bound) const;

  // Building blocks of circuits, in raw integers.
  // The combination at `level`, whose scale is declared to be `scale`; rescaled if wanted.
  TensorPtr combine(const Combination& combination, int level, const std::vector<double>& scale, double bound,
                    bool rescaled) const;
  // multipliers[f] x y + combination, relinearised and rescaled; level: of the product before.
  TensorPtr multiply_add(const TensorPtr& x, const TensorPtr& y, const std::vector<double>& multipliers,
                         const Combination& addend, int level, double bound) const;
  // The same words with another error: what a first-order analysis starts from.
  TensorPtr with_noise(const TensorPtr& x, const std::vector<double>& noise, const std::vector<double>& shared) const;

  // Error of a key switch and of a rounding, in raw units of the real part of a slot.
  double switch_noise(std::size_t limbs) const;
  double rounding_noise() const;

 private:
  class Scratch;
  struct Decomposition;
  struct Switched;
  std::shared_ptr<Tensor> result(std::size_t tokens, std::size_t features, int level, bool planned) const;
  void check(const Tensor& x) const;
  void check_pair(const Tensor& x, const Tensor& y) const;
  std::pair<TensorPtr, TensorPtr> meet(TensorPtr x, TensorPtr y) const;
  std::pair<TensorPtr, TensorPtr> meet_for_product(TensorPtr x, TensorPtr y) const;
  TensorPtr add_rows(const TensorPtr& x, const TensorPtr& y, bool minus) const;
  TensorPtr products(const TensorPtr& x, const TensorPtr& y, bool summed, const std::vector<double>& multipliers,
                     const Combination& addend, int level, double bound) const;
  std::vector<TensorPtr> galois(const TensorPtr& x, const std::vector<std::uint32_t>& elements) const;
  step::Terms terms_of(const Combination& c, std::size_t features, std::size_t limbs) const;
  void combine_row(const Combination& c, std::size_t feature, int component, std::size_t limb,
                   std::uint64_t* accumulator) const;

  // Of rows [limb][N] in the NTT domain; targets are the limbs, then the special primes.
  std::size_t prime_of(std::size_t target, std::size_t limbs) const;
  std::size_t target_of(std::size_t prime, std::size_t limbs) const;
  void convert(const std::vector<const std::uint64_t*>& from, const BaseConversion& conversion,
               const std::vector<ring::kernels::ConversionTarget>& targets) const;
  void decompose(Decomposition& digits) const;
  void transform_digits(Decomposition& digits, std::size_t target) const;
  void switch_key(Decomposition& digits, const SwitchingKey& key, const Switched& to) const;
  // out = rows divided by the primes of the conversion, whose rows are used up.
  void divide(std::uint64_t* rows, const BaseConversion& conversion, std::size_t limbs, std::size_t kept,
              std::uint64_t* out) const;

  ParametersPtr parameters_;
  std::shared_ptr<const EvaluationKeys> keys_;
  std::shared_ptr<Recording> recording_;
  std::map<std::uint32_t, ring::Automorphism> automorphisms_;
  mutable Trace trace_;
  std::shared_ptr<Ledger> ledger_;
  mutable std::mutex pool_mutex_;
  mutable std::vector<math::AlignedVector<std::uint64_t>> pool_;  // work space that is kept between operations
};

class Evaluator::Assembly {
 public:
  // like: its tokens, and whether it is planned.
  Assembly(const Evaluator& evaluator, const Tensor& like, std::size_t features, int level);
  // The features of `part`, of the same level or above, from feature `at` on. independent: as that of concatenate.
  void put(const TensorPtr& part, std::size_t at, bool independent);
  // All features have been put: the tensor, |value| <= bound.
  TensorPtr finish(double bound);

 private:
  const Evaluator& evaluator_;
  std::shared_ptr<Tensor> out_;
  std::map<std::size_t, TensorPtr> parts_;  // of a recording, which takes them all in one step
};

}  // namespace privtuner::ckks
