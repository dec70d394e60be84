// Keys, and their place in OpenFHE's tables while they are used.
#include <mutex>
#include <set>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

using Impl = lbcrypto::CryptoContextImpl<DCRTPoly>;

std::size_t bytes_of(const std::vector<DCRTPoly>& polynomials) {
  std::size_t total = 0;
  for (const DCRTPoly& p : polynomials) total += p.GetNumOfElements() * p.GetRingDimension() * sizeof(std::uint64_t);
  return total;
}

// A volatile write, which no compiler may leave out.
void wipe(DCRTPoly& polynomial) {
  for (auto& tower : polynomial.GetAllElements()) {
    for (std::uint32_t i = 0; i < tower.GetLength(); ++i) {
      *reinterpret_cast<volatile std::uint64_t*>(&tower[i]) = 0;
    }
  }
}

}  // namespace

std::size_t EvaluationKeys::bytes() const {
  std::size_t total = 0;
  const auto count = [&](const EvalKey& key) { total += bytes_of(key->GetAVector()) + bytes_of(key->GetBVector()); };
  for (const EvalKey& key : multiplication) count(key);
  if (automorphisms) {
    for (const auto& entry : *automorphisms) count(entry.second);
  }
  return total;
}

KeysInUse::KeysInUse(const Context& context, const EvaluationKeys* keys) : lock_(library_mutex()) {
  take_tables(context);
  std::map<std::string, std::vector<EvalKey>> multiplication;
  std::map<std::string, std::shared_ptr<GaloisKeys>> automorphisms;
  if (keys != nullptr && !keys->multiplication.empty()) multiplication[keys->tag] = keys->multiplication;
  if (keys != nullptr && keys->automorphisms) automorphisms[keys->tag] = keys->automorphisms;
  multiplication_.swap(Impl::GetAllEvalMultKeys());
  automorphisms_.swap(Impl::GetAllEvalAutomorphismKeys());
  Impl::GetAllEvalMultKeys().swap(multiplication);
  Impl::GetAllEvalAutomorphismKeys().swap(automorphisms);
}

KeysInUse::~KeysInUse() {
  Impl::GetAllEvalMultKeys().swap(multiplication_);
  Impl::GetAllEvalAutomorphismKeys().swap(automorphisms_);
}

Secret::Secret(const ContextPtr& context) : context_(context) {
  const Exclusive lock(library_mutex());
  take_tables(*context);
  const auto pair = drawing([&] {
    omp_set_num_threads(threads());
    return context->get()->KeyGen();
  });
  key_ = pair.secretKey;
  public_ = std::make_shared<Public>(Public{context, pair.publicKey});
}

Secret::~Secret() {
  if (key_ && key_.use_count() == 1) wipe(const_cast<DCRTPoly&>(key_->GetPrivateElement()));
}

std::shared_ptr<EvaluationKeys> Secret::evaluation_keys(bool relinearisation,
                                                        const std::vector<std::uint32_t>& elements,
                                                        bool bootstrapping) const {
  // These functions of the scheme return keys without entering them into any table.
  const Exclusive lock(library_mutex());
  take_tables(*context_);
  auto keys = std::make_shared<EvaluationKeys>();
  keys->context = context_;
  keys->tag = key_->GetKeyTag();
  const auto scheme = context_->get()->GetScheme();
  const auto make = [&] {
    omp_set_num_threads(threads());
    if (relinearisation) keys->multiplication = {scheme->EvalMultKeyGen(key_)};
    if (bootstrapping) {
      keys->automorphisms = scheme->EvalBootstrapKeyGen(key_, context_->slots());
    }
    if (!elements.empty()) {
      const auto more = scheme->EvalAutomorphismKeyGen(key_, elements);
      if (keys->automorphisms) {
        keys->automorphisms->insert(more->begin(), more->end());
      } else {
        keys->automorphisms = more;
      }
    }
  };
  try {
    drawing(make);
  } catch (const std::exception& error) {
    throw Error("OpenFHE cannot make these keys: " + reason(error));
  }
  return keys;
}

}  // namespace privtuner::openfhe
