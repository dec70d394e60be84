// OpenFHE's CKKS behind objects that own what OpenFHE keeps in process-wide tables.
//
// Written against the public interface of OpenFHE 1.2 and later. Nothing here knows of Python.
#pragma once

#include <omp.h>

#include <algorithm>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "openfhe.h"

namespace privtuner::openfhe {

using lbcrypto::DCRTPoly;
using Ciphertext = lbcrypto::Ciphertext<DCRTPoly>;
using CryptoContext = lbcrypto::CryptoContext<DCRTPoly>;
using EvalKey = lbcrypto::EvalKey<DCRTPoly>;
using GaloisKeys = std::map<std::uint32_t, EvalKey>;
using PrivateKey = lbcrypto::PrivateKey<DCRTPoly>;
using PublicKey = lbcrypto::PublicKey<DCRTPoly>;

// An operation on ciphertexts that cannot be done; OpenFHE's own exceptions become this with their text.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes that are no object of OpenFHE, or one of another context.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What OpenFHE says, without the source line in front.
std::string reason(const std::exception& error);

// OpenFHE's tables of contexts, keys and transforms belong to the process and have no lock. Shared for operations that
// only read tables which stay, exclusive for those that change a table or use keys. Throws std::runtime_error unless
// usable().
std::shared_mutex& library_mutex();

// Once, before anything else: after this, forks are noticed, whoever calls fork.
void watch_forks();
bool forked();  // this process is a child of a fork that was noticed
bool usable();  // not so in a child made while another thread used OpenFHE

// draw(), for whatever takes random numbers from OpenFHE. Its generator is state of a thread, seeded by the operating
// system when the thread first draws; the one thread that a child has is a copy of a thread of the parent, and so is
// its generator. In a child every draw is made on a thread of its own.
template <class Draw>
auto drawing(const Draw& draw) -> decltype(draw()) {
  if (!forked()) return draw();
  return std::async(std::launch::async, draw).get();
}

using Shared = std::shared_lock<std::shared_mutex>;
using Exclusive = std::unique_lock<std::shared_mutex>;

std::string library_version();
int threads();
// Of OpenFHE's loops and of ours over features. Throws std::invalid_argument outside 1 to kMaxThreads.
inline constexpr int kMaxThreads = 1024;
void set_threads(int count);

// What OpenFHE's tables hold now: for finding leaks.
struct Counts {
  std::size_t contexts, multiplication_keys, automorphism_keys;
};
Counts counts();

// run(f) for f < count on the threads in force; the first exception is thrown again when all have ended.
template <class Run>
void for_each(std::size_t count, const Run& run) {
  std::exception_ptr first;
  omp_set_num_threads(threads());  // for OpenFHE's own loops where there is one feature
  const int team = static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(threads()), count));
#pragma omp parallel for schedule(dynamic) num_threads(team) if (count > 1)
  for (std::size_t f = 0; f < count; ++f) {
    try {
      run(f);
    } catch (...) {
#pragma omp critical(privtuner_first_exception)
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
}

// OpenFHE's names and meanings; 0 or an empty text leaves OpenFHE's default.
struct Settings {
  std::uint32_t depth = 0, scaling_bits = 0, first_bits = 0, ring_dimension = 0, batch_size = 0, digits = 0,
                digit_bits = 0;
  std::string scaling_technique, key_switching;
  bool complex_data = false, secure = true;
};

// A context, held in OpenFHE's table of contexts as long as any of these objects lives.
class Context {
 public:
  // With OpenFHE's own check of 128 bits (HEStd_128_classic) unless settings.secure is false. Throws
  // std::invalid_argument with OpenFHE's reason.
  static std::shared_ptr<Context> make(const Settings& settings);
  // What OpenFHE serialised. Throws FormatError.
  static std::shared_ptr<Context> from_bytes(const std::string& data);

  // Takes hold of a context that is in the table; `fresh` if it was not there before. Under the exclusive lock.
  Context(CryptoContext context, bool fresh);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  std::string to_bytes() const;

  const CryptoContext& get() const { return context_; }
  const std::shared_ptr<lbcrypto::CryptoParametersRNS>& parameters() const { return parameters_; }
  std::uint32_t ring_dimension() const { return context_->GetRingDimension(); }
  std::uint32_t slots() const;
  std::uint32_t depth() const { return depth_; }
  std::uint32_t scaling_bits() const;
  bool manual() const;    // the user rescales
  bool flexible() const;  // every level has a scale of its own
  bool complex() const;   // slots hold complex numbers
  bool secure() const;    // OpenFHE's check of 128 bits or more was on
  std::vector<std::uint64_t> moduli() const;
  std::vector<std::uint64_t> special_moduli() const;
  std::uint32_t digits() const;
  std::uint32_t digit_bits() const;  // of BV key switching, 0 for whole towers
  std::string scaling_technique() const, key_switching() const;

  // Precomputes what bootstrapping needs. Throws std::invalid_argument if there are too few levels, or if it was done
  // for another budget.
  void enable_bootstrapping(const std::vector<std::uint32_t>& budget);

 private:
  CryptoContext context_;
  std::shared_ptr<lbcrypto::CryptoParametersRNS> parameters_;
  std::uint32_t depth_ = 0;
};

using ContextPtr = std::shared_ptr<const Context>;

// Takes contexts that a reading brought into OpenFHE's table out of it again. Under the exclusive lock.
class TableGuard {
 public:
  TableGuard();
  ~TableGuard();
  TableGuard(const TableGuard&) = delete;
  TableGuard& operator=(const TableGuard&) = delete;
  bool grown() const;  // there are such contexts
  void keep() { keep_ = true; }

 private:
  std::size_t before_;
  bool keep_ = false;
};

// Relinearisation and automorphism keys of one secret. OpenFHE sees them only inside a `KeysInUse`.
struct EvaluationKeys {
  ContextPtr context;
  std::string tag;
  std::vector<EvalKey> multiplication;
  std::shared_ptr<GaloisKeys> automorphisms;

  std::size_t bytes() const;
  // OpenFHE's two formats, as SerializeEvalMultKey and SerializeEvalAutomorphismKey write them; empty without such
  // keys.
  std::string multiplication_bytes() const, automorphism_bytes() const;
  // Either may be empty. Throws FormatError.
  static std::shared_ptr<EvaluationKeys> from_bytes(const ContextPtr& context, const std::string& multiplication,
                                                    const std::string& automorphisms);
};

// Held by every operation of a context. Shared by all, unless contexts of two rings have a prime in common: OpenFHE
// keeps one transform table a prime, of the ring that used it last, and fills it anew while others read it. Then
// operations run one at a time, with the tables filled before they start.
class ContextInUse {
 public:
  explicit ContextInUse(const Context& context);

 private:
  Shared shared_;
  Exclusive exclusive_;
};

// Fills OpenFHE's transform tables for this context if another ring may have taken them. Under the exclusive lock.
void take_tables(const Context& context);

// Puts these keys, and no others, into OpenFHE's tables, and puts back what was there when it ends.
class KeysInUse {
 public:
  KeysInUse(const Context& context, const EvaluationKeys* keys);
  ~KeysInUse();
  KeysInUse(const KeysInUse&) = delete;
  KeysInUse& operator=(const KeysInUse&) = delete;

 private:
  Exclusive lock_;
  std::map<std::string, std::vector<EvalKey>> multiplication_;
  std::map<std::string, std::shared_ptr<GaloisKeys>> automorphisms_;
};

struct Public {
  ContextPtr context;
  PublicKey key;

  std::string to_bytes() const;
  static std::shared_ptr<Public> from_bytes(const ContextPtr& context, const std::string& data);
};

// A secret key, wiped when the last holder lets go of it. Copies that OpenFHE makes for itself are out of reach.
class Secret {
 public:
  explicit Secret(const ContextPtr& context);
  Secret(const ContextPtr& context, PrivateKey key) : context_(context), key_(std::move(key)) {}
  ~Secret();
  Secret(const Secret&) = delete;
  Secret& operator=(const Secret&) = delete;

  const ContextPtr& context() const { return context_; }
  const PrivateKey& key() const { return key_; }
  // Null for a key that was read from bytes: the pair is made at once.
  const std::shared_ptr<Public>& public_key() const { return public_; }
  // elements: of the Galois group. bootstrapping: the keys of EvalBootstrap too.
  std::shared_ptr<EvaluationKeys> evaluation_keys(bool relinearisation, const std::vector<std::uint32_t>& elements,
                                                  bool bootstrapping) const;

  std::string to_bytes() const;
  static std::shared_ptr<Secret> from_bytes(const ContextPtr& context, const std::string& data);

 private:
  ContextPtr context_;
  PrivateKey key_;
  std::shared_ptr<Public> public_;
};

// One ciphertext a feature. Never changed once made.
struct Ciphertexts {
  ContextPtr context;
  std::vector<Ciphertext> features;

  const lbcrypto::CiphertextImpl<DCRTPoly>& first() const { return *features.front(); }
  std::vector<std::uint64_t> moduli() const;
  std::size_t components() const { return first().GetElements().size(); }
  std::size_t bytes() const;

  // OpenFHE's format of a std::vector of ciphertexts.
  std::string to_bytes() const;
  // Throws FormatError.
  static std::shared_ptr<Ciphertexts> from_bytes(const ContextPtr& context, const std::string& data);
};

using CiphertextsPtr = std::shared_ptr<Ciphertexts>;

// Clear values, [feature][token]; imaginary parts or null.
struct Values {
  const double *re = nullptr, *im = nullptr;
  std::size_t features = 0, tokens = 0;
};

lbcrypto::Plaintext encode(const Context& context, const Values& values, std::size_t feature, std::uint32_t level);
CiphertextsPtr encrypt(const Secret& key, const Values& values, std::uint32_t level);
CiphertextsPtr encrypt(const Public& key, const Values& values, std::uint32_t level);
// re, and im unless it is null: [feature][token], tokens <= slots.
void decrypt(const Secret& key, const Ciphertexts& x, std::size_t tokens, double* re, double* im);

// A range of one polynomial of every feature, modulo one prime: [feature][count].
struct Range {
  std::size_t tower, component, begin, count;
};
void residues_of(const Ciphertexts& x, const Range& range, std::uint64_t* out);

// Builds ciphertexts from residues, tower by tower.
class Builder {
 public:
  // Like `like` in all but the number of ciphertexts and their residues. moduli: those of `like` when empty.
  Builder(const Ciphertexts& like, std::size_t features, const std::vector<std::uint64_t>& moduli);
  // As fresh ciphertexts of `key`, at the level that has so many towers.
  Builder(const Secret& key, std::size_t features, std::size_t towers);
  // words: [feature][count], each below the tower's modulus, in the evaluation format.
  void set(const Range& range, const std::uint64_t* words);
  CiphertextsPtr finish();

  std::size_t features() const { return features_.size(); }
  std::size_t towers() const { return moduli_.size(); }
  std::size_t components() const { return components_; }
  std::size_t ring_dimension() const { return ring_dimension_; }
  std::uint64_t modulus(std::size_t tower) const { return moduli_[tower]; }

 private:
  void start(const Ciphertext& prototype, std::size_t features, const std::shared_ptr<DCRTPoly::Params>& parameters);

  ContextPtr context_;
  std::vector<Ciphertext> features_;
  std::vector<std::uint64_t> moduli_;
  std::size_t components_ = 2, ring_dimension_ = 0;
};

// Arithmetic. Two operands have as many features each, or one of them has one. keys may be null where none is needed.
// Constants: one a feature, or one for all.
CiphertextsPtr add(const Ciphertexts& x, const Ciphertexts& y);
CiphertextsPtr subtract(const Ciphertexts& x, const Ciphertexts& y);
CiphertextsPtr negate(const Ciphertexts& x);
CiphertextsPtr add_constant(const Ciphertexts& x, const std::vector<double>& constants);
CiphertextsPtr multiply_constant(const Ciphertexts& x, const std::vector<double>& constants);
CiphertextsPtr multiply_plain(const Ciphertexts& x, const Values& values);
// times: how often, for measuring.
CiphertextsPtr multiply(const Ciphertexts& x, const Ciphertexts& y, const EvaluationKeys* keys, int times);
CiphertextsPtr dot(const Ciphertexts& x, const Ciphertexts& y, const EvaluationKeys* keys);
CiphertextsPtr sum_features(const Ciphertexts& x);
CiphertextsPtr linear_combination(const std::vector<CiphertextsPtr>& terms,
                                  const std::vector<std::vector<double>>& weights);
CiphertextsPtr rescale(const Ciphertexts& x);
// With the rescaling done that automatic scaling puts off.
CiphertextsPtr settle(const Ciphertexts& x);
// A settled tensor to the level, counted from the top, that `level` names, with that level's scale.
CiphertextsPtr drop(const Ciphertexts& x, std::uint32_t level);
std::vector<CiphertextsPtr> rotate(const Ciphertexts& x, const std::vector<std::int32_t>& steps,
                                   const EvaluationKeys* keys);
CiphertextsPtr conjugate(const Ciphertexts& x, const EvaluationKeys* keys);
CiphertextsPtr sum_slots(const Ciphertexts& x, const EvaluationKeys* keys);
CiphertextsPtr power_series(const Ciphertexts& x, const std::vector<double>& coefficients, const EvaluationKeys* keys);
// sum_k coefficients[k] T_k((2 x - low - high) / (high - low)).
CiphertextsPtr chebyshev_series(const Ciphertexts& x, const std::vector<double>& coefficients, double low, double high,
                                const EvaluationKeys* keys);
CiphertextsPtr bootstrap(const Ciphertexts& x, const EvaluationKeys* keys);

// The textbook product W x, one scalar multiplication and one addition a weight: the oracle of the fast one. weights:
// [row][feature]. By integers it takes no level; by reals the products carry the scale twice.
CiphertextsPtr textbook_product(const Ciphertexts& x, const std::int64_t* weights, std::size_t rows);
CiphertextsPtr textbook_product(const Ciphertexts& x, const double* weights, std::size_t rows);

std::uint32_t galois_element(const Context& context, std::int32_t step);

}  // namespace privtuner::openfhe
