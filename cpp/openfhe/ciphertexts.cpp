// Ciphertexts: encryption, decryption, and their residues.
#include <algorithm>
#include <cmath>
#include <mutex>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

template <class Key>
CiphertextsPtr encrypted(const ContextPtr& context, const Key& key, const Values& values, std::uint32_t level) {
  const ContextInUse in_use(*context);
  auto out = std::make_shared<Ciphertexts>();
  out->context = context;
  out->features.resize(values.features);
  try {
    drawing([&] {
      for_each(values.features, [&](std::size_t f) {
        out->features[f] = context->get()->Encrypt(key, encode(*context, values, f, level));
      });
    });
  } catch (const std::exception& error) {
    throw Error("OpenFHE cannot encrypt this: " + reason(error));
  }
  return out;
}

std::shared_ptr<DCRTPoly::Params> params_of(std::uint32_t ring_dimension, const std::vector<std::uint64_t>& moduli) {
  std::vector<lbcrypto::NativeInteger> primes, roots;
  for (const std::uint64_t q : moduli) {
    primes.emplace_back(q);
    roots.push_back(lbcrypto::RootOfUnity<lbcrypto::NativeInteger>(2 * ring_dimension, lbcrypto::NativeInteger(q)));
  }
  return std::make_shared<DCRTPoly::Params>(2 * ring_dimension, primes, roots);
}

}  // namespace

lbcrypto::Plaintext encode(const Context& context, const Values& values, std::size_t feature, std::uint32_t level) {
  const double* re = values.re + feature * values.tokens;
  const double* im = values.im == nullptr ? nullptr : values.im + feature * values.tokens;
  const auto make = [&](double factor) {
    if (im == nullptr) {
      std::vector<double> slots(re, re + values.tokens);
      for (double& slot : slots) slot *= factor;
      return context.get()->MakeCKKSPackedPlaintext(slots, 1, level);
    }
    std::vector<std::complex<double>> slots(values.tokens);
    for (std::size_t t = 0; t < values.tokens; ++t) slots[t] = {factor * re[t], factor * im[t]};
    return context.get()->MakeCKKSPackedPlaintext(slots, 1, level);
  };
  try {
    return make(1.0);
  } catch (const std::exception&) {
    // OpenFHE refuses polynomials whose coefficients are all below 1, which would round to nothing. By Parseval that
    // takes slots below N / scale.
    double largest = 0;
    for (std::size_t t = 0; t < values.tokens; ++t) {
      largest = std::max(largest, im == nullptr ? std::fabs(re[t]) : std::hypot(re[t], im[t]));
    }
    if (largest * context.parameters()->GetScalingFactorReal(level) >= context.ring_dimension()) throw;
    return make(0.0);
  }
}

std::vector<std::uint64_t> Ciphertexts::moduli() const {
  std::vector<std::uint64_t> out;
  for (const auto& tower : first().GetElements()[0].GetAllElements()) {
    out.push_back(tower.GetModulus().ConvertToInt());
  }
  return out;
}

std::size_t Ciphertexts::bytes() const {
  return features.size() * components() * moduli().size() * context->ring_dimension() * sizeof(std::uint64_t);
}

CiphertextsPtr encrypt(const Secret& key, const Values& values, std::uint32_t level) {
  return encrypted(key.context(), key.key(), values, level);
}

CiphertextsPtr encrypt(const Public& key, const Values& values, std::uint32_t level) {
  return encrypted(key.context, key.key, values, level);
}

void decrypt(const Secret& key, const Ciphertexts& x, std::size_t tokens, double* re, double* im) {
  const ContextInUse in_use(*key.context());
  try {
    const auto one = [&](std::size_t f) {
      lbcrypto::Plaintext plain;
      key.context()->get()->Decrypt(key.key(), x.features[f], &plain);
      const auto& slots = plain->GetCKKSPackedValue();
      if (slots.size() < tokens) {
        throw Error("a ciphertext of " + std::to_string(slots.size()) + " slots does not hold " +
                    std::to_string(tokens) + " tokens");
      }
      for (std::size_t t = 0; t < tokens; ++t) re[f * tokens + t] = slots[t].real();
      if (im == nullptr) return;
      for (std::size_t t = 0; t < tokens; ++t) im[f * tokens + t] = slots[t].imag();
    };
    drawing([&] { for_each(x.features.size(), one); });  // decryption adds noise
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error("OpenFHE cannot decrypt this: " + reason(error));
  }
}

void residues_of(const Ciphertexts& x, const Range& range, std::uint64_t* out) {
  for_each(x.features.size(), [&](std::size_t f) {
    const auto& words = x.features[f]->GetElements()[range.component].GetAllElements()[range.tower].GetValues();
    std::uint64_t* to = out + f * range.count;
    for (std::size_t i = 0; i < range.count; ++i) to[i] = words[range.begin + i].ConvertToInt();
  });
}

void Builder::start(const Ciphertext& prototype, std::size_t features,
                    const std::shared_ptr<DCRTPoly::Params>& parameters) {
  ring_dimension_ = parameters->GetRingDimension();
  moduli_.clear();
  for (const auto& tower : parameters->GetParams()) moduli_.push_back(tower->GetModulus().ConvertToInt());
  features_.resize(features);
  for_each(features, [&](std::size_t f) {
    features_[f] = prototype->CloneEmpty();
    std::vector<DCRTPoly> elements;
    for (std::size_t c = 0; c < components_; ++c) elements.emplace_back(parameters, Format::EVALUATION, true);
    features_[f]->SetElements(std::move(elements));
  });
}

Builder::Builder(const Ciphertexts& like, std::size_t features, const std::vector<std::uint64_t>& moduli)
    : context_(like.context), components_(like.components()) {
  const auto& parameters = like.first().GetElements()[0].GetParams();
  start(like.features.front(), features,
        moduli.empty() ? parameters : params_of(parameters->GetRingDimension(), moduli));
}

Builder::Builder(const Secret& key, std::size_t features, std::size_t towers) : context_(key.context()) {
  const auto all = context_->parameters()->GetElementParams();
  const std::size_t count = all->GetParams().size();
  if (towers < 1 || towers > count) {
    throw std::invalid_argument(std::to_string(towers) + " towers; this context has " + std::to_string(count));
  }
  auto parameters = std::make_shared<DCRTPoly::Params>(*all);
  for (std::size_t i = towers; i < count; ++i) parameters->PopLastParam();
  const auto prototype = std::make_shared<lbcrypto::CiphertextImpl<DCRTPoly>>(context_->get(), key.key()->GetKeyTag(),
                                                                              lbcrypto::CKKS_PACKED_ENCODING);
  prototype->SetElements(
      std::vector<DCRTPoly>(components_, DCRTPoly(parameters, Format::EVALUATION)));  // SetLevel looks
  prototype->SetLevel(count - towers);
  prototype->SetNoiseScaleDeg(1);
  prototype->SetScalingFactor(context_->parameters()->GetScalingFactorReal(static_cast<std::uint32_t>(count - towers)));
  prototype->SetSlots(context_->slots());
  start(prototype, features, parameters);
}

void Builder::set(const Range& range, const std::uint64_t* words) {
  for_each(features_.size(), [&](std::size_t f) {
    auto& polynomial = features_[f]->GetElements()[range.component].GetAllElements()[range.tower];
    const std::uint64_t* from = words + f * range.count;
    for (std::size_t i = 0; i < range.count; ++i) {
      polynomial[static_cast<std::uint32_t>(range.begin + i)] = lbcrypto::NativeInteger(from[i]);
    }
  });
}

CiphertextsPtr Builder::finish() {
  auto out = std::make_shared<Ciphertexts>();
  out->context = context_;
  out->features = std::move(features_);
  return out;
}

}  // namespace privtuner::openfhe
