// OpenFHE's own binary serialisation. A file of its own: the templates take a minute to compile.
//
// It trusts what it reads. Damaged bytes throw as a rule, made-up ones may do anything: use it on what you wrote.
#include <mutex>
#include <set>
#include <sstream>

#include "objects.hpp"
// After openfhe.h, in this order.
#include "ciphertext-ser.h"
#include "cryptocontext-ser.h"
#include "key/key-ser.h"
#include "scheme/ckksrns/ckksrns-ser.h"

namespace privtuner::openfhe {
namespace {

using Impl = lbcrypto::CryptoContextImpl<DCRTPoly>;
namespace Serial = lbcrypto::Serial;
using lbcrypto::SerType::BINARY;

template <class Write>
std::string written(const Write& write) {
  const Exclusive lock(library_mutex());  // contexts and keys are read from the tables
  std::ostringstream stream;
  write(stream);
  return stream.str();
}

// What read(stream) returns; the whole of the data must be used.
template <class Read>
auto taken(const std::string& data, const char* what, const Read& read) {
  std::istringstream stream(data);
  try {
    auto result = read(stream);
    if (stream.peek() != std::istringstream::traits_type::eof()) {
      throw FormatError(std::string("bytes are left over after OpenFHE's ") + what);
    }
    return result;
  } catch (const FormatError&) {
    throw;
  } catch (const std::exception& error) {
    throw FormatError(std::string("this is no ") + what + " of OpenFHE, or it is damaged: " + reason(error));
  }
}

template <class T>
T object(const std::string& data, const char* what) {
  // One byte for the order of bytes, then the number of the first pointer: 0 is null, which OpenFHE takes for granted.
  if (data.size() < 5 || data.compare(1, 4, std::string(4, '\0')) == 0) {
    throw FormatError(std::string("this is no ") + what + " of OpenFHE: it begins with nothing");
  }
  return taken(data, what, [&](std::istream& stream) {
    T result;
    Serial::Deserialize(result, stream, BINARY);
    if (!result) throw FormatError(std::string("an empty ") + what);
    return result;
  });
}

void require(const CryptoContext& found, const ContextPtr& context) {
  if (found != context->get()) throw FormatError("it belongs to another context: load that context and pass it");
}

}  // namespace

std::string Context::to_bytes() const {
  return written([&](std::ostream& stream) { Serial::Serialize(context_, stream, BINARY); });
}

std::shared_ptr<Context> Context::from_bytes(const std::string& data) {
  const Exclusive lock(library_mutex());
  TableGuard guard;
  const auto context = object<CryptoContext>(data, "context");
  auto made = std::make_shared<Context>(context, guard.grown());
  guard.keep();
  return made;
}

std::string Public::to_bytes() const {
  return written([&](std::ostream& stream) { Serial::Serialize(key, stream, BINARY); });
}

std::shared_ptr<Public> Public::from_bytes(const ContextPtr& context, const std::string& data) {
  const Exclusive lock(library_mutex());
  const TableGuard guard;
  auto key = object<PublicKey>(data, "public key");
  require(key->GetCryptoContext(), context);
  return std::make_shared<Public>(Public{context, std::move(key)});
}

std::string Secret::to_bytes() const {
  return written([&](std::ostream& stream) { Serial::Serialize(key_, stream, BINARY); });
}

std::shared_ptr<Secret> Secret::from_bytes(const ContextPtr& context, const std::string& data) {
  const Exclusive lock(library_mutex());
  const TableGuard guard;
  auto key = object<PrivateKey>(data, "secret key");
  require(key->GetCryptoContext(), context);
  return std::make_shared<Secret>(context, std::move(key));
}

std::string Ciphertexts::to_bytes() const {
  return written([&](std::ostream& stream) { Serial::Serialize(features, stream, BINARY); });
}

std::shared_ptr<Ciphertexts> Ciphertexts::from_bytes(const ContextPtr& context, const std::string& data) {
  const Exclusive lock(library_mutex());
  const TableGuard guard;
  auto out = std::make_shared<Ciphertexts>();
  out->context = context;
  out->features = taken(data, "vector of ciphertexts", [&](std::istream& stream) {
    std::vector<Ciphertext> features;
    Serial::Deserialize(features, stream, BINARY);
    return features;
  });
  if (out->features.empty()) throw FormatError("no ciphertexts");
  for (const auto& feature : out->features) {
    if (!feature || feature->GetElements().empty()) throw FormatError("an empty ciphertext");
    require(feature->GetCryptoContext(), context);
    const auto& first = out->first();
    if (feature->GetElements().size() != first.GetElements().size() || feature->GetLevel() != first.GetLevel() ||
        feature->GetNoiseScaleDeg() != first.GetNoiseScaleDeg() || feature->GetKeyTag() != first.GetKeyTag() ||
        feature->GetElements()[0].GetNumOfElements() != first.GetElements()[0].GetNumOfElements()) {
      throw FormatError("ciphertexts of different levels, scales, sizes or keys; make them alike first");
    }
    if (feature->GetElements().size() != 2) {
      throw FormatError("a ciphertext of " + std::to_string(feature->GetElements().size()) +
                        " components: relinearise it first");
    }
    if (feature->GetSlots() != context->slots()) {
      throw FormatError("a ciphertext of " + std::to_string(feature->GetSlots()) + " slots in a context of " +
                        std::to_string(context->slots()) + "; encode with the context's own number");
    }
  }
  return out;
}

std::string EvaluationKeys::multiplication_bytes() const {
  if (multiplication.empty()) return {};
  const KeysInUse in_use(*context, this);
  std::ostringstream stream;
  Impl::SerializeEvalMultKey(stream, BINARY, tag);
  return stream.str();
}

std::string EvaluationKeys::automorphism_bytes() const {
  if (!automorphisms) return {};
  const KeysInUse in_use(*context, this);
  std::ostringstream stream;
  Impl::SerializeEvalAutomorphismKey(stream, BINARY, tag);
  return stream.str();
}

std::shared_ptr<EvaluationKeys> EvaluationKeys::from_bytes(const ContextPtr& context,
                                                           const std::string& multiplication_data,
                                                           const std::string& automorphism_data) {
  const KeysInUse empty(*context, nullptr);  // OpenFHE reads into its tables, which are emptied for that and restored
  const TableGuard guard;
  auto keys = std::make_shared<EvaluationKeys>();
  keys->context = context;
  std::set<std::string> tags;
  const auto accept = [&](const EvalKey& key) {
    if (!key) throw FormatError("an empty evaluation key");
    require(key->GetCryptoContext(), context);
  };
  if (!multiplication_data.empty()) {
    taken(multiplication_data, "multiplication key",
          [](std::istream& stream) { return Impl::DeserializeEvalMultKey(stream, BINARY); });
    for (const auto& [tag, vector] : Impl::GetAllEvalMultKeys()) {
      tags.insert(tag);
      for (const auto& key : vector) accept(key);
      keys->multiplication = vector;
    }
  }
  if (!automorphism_data.empty()) {
    taken(automorphism_data, "automorphism key",
          [](std::istream& stream) { return Impl::DeserializeEvalAutomorphismKey(stream, BINARY); });
    for (const auto& [tag, map] : Impl::GetAllEvalAutomorphismKeys()) {
      tags.insert(tag);
      for (const auto& entry : *map) accept(entry.second);
      keys->automorphisms = map;
    }
  }
  if (tags.size() != 1) {
    throw FormatError("evaluation keys of " + std::to_string(tags.size()) + " secret keys; give those of one");
  }
  keys->tag = *tags.begin();
  return keys;
}

}  // namespace privtuner::openfhe
