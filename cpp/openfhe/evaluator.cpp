// Arithmetic on ciphertexts, a loop over features around OpenFHE's own operations.
#include <algorithm>
#include <mutex>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

// run(f) gives feature f; OpenFHE's exceptions keep their text.
template <class Run>
CiphertextsPtr mapped(const ContextPtr& context, std::size_t features, const char* what, const Run& run) {
  auto out = std::make_shared<Ciphertexts>();
  out->context = context;
  out->features.resize(features);
  try {
    for_each(features, [&](std::size_t f) { out->features[f] = run(f); });
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(std::string("OpenFHE cannot ") + what + ": " + reason(error));
  }
  return out;
}

const Ciphertext& of(const Ciphertexts& x, std::size_t f) { return x.features[x.features.size() == 1 ? 0 : f]; }

std::size_t broadcast(const Ciphertexts& x, const Ciphertexts& y) {
  const std::size_t a = x.features.size(), b = y.features.size();
  if (a != b && a != 1 && b != 1) {
    throw Error("tensors of " + std::to_string(a) + " and " + std::to_string(b) + " features do not fit");
  }
  return std::max(a, b);
}

double constant(const std::vector<double>& constants, std::size_t f) {
  return constants[constants.size() == 1 ? 0 : f];
}

void need_relinearisation(const EvaluationKeys* keys) {
  if (keys == nullptr || keys->multiplication.empty()) {
    throw Error("a product of ciphertexts needs the relinearisation key; make evaluation keys with it");
  }
}

Ciphertext automorphism(const Ciphertexts& x, std::size_t f, std::uint32_t element, const EvaluationKeys& keys) {
  return x.context->get()->EvalAutomorphism(x.features[f], element, *keys.automorphisms);
}

void need_galois(const EvaluationKeys* keys, std::uint32_t element, const std::string& what) {
  if (keys == nullptr || !keys->automorphisms || keys->automorphisms->count(element) == 0) {
    throw Error(what + " needs a key that is not among the evaluation keys; make them with it");
  }
}

// The ciphertext to adjust others to: of this level, with its scale.
Ciphertext at_level(const Ciphertexts& x, std::uint32_t level) {
  auto reference = x.first().Clone();
  x.context->get()->GetScheme()->LevelReduceInternalInPlace(reference, level - x.first().GetLevel());
  reference->SetNoiseScaleDeg(1);
  reference->SetScalingFactor(x.context->parameters()->GetScalingFactorReal(level));
  return reference;
}

}  // namespace

std::uint32_t galois_element(const Context& context, std::int32_t step) {
  const auto slots = static_cast<std::int64_t>(context.ring_dimension() / 2);
  return context.get()->GetScheme()->FindAutomorphismIndex(static_cast<std::uint32_t>(((step % slots) + slots) % slots),
                                                           2 * context.ring_dimension());
}

CiphertextsPtr add(const Ciphertexts& x, const Ciphertexts& y) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, broadcast(x, y), "add these",
                [&](std::size_t f) { return x.context->get()->EvalAdd(of(x, f), of(y, f)); });
}

CiphertextsPtr subtract(const Ciphertexts& x, const Ciphertexts& y) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, broadcast(x, y), "subtract these",
                [&](std::size_t f) { return x.context->get()->EvalSub(of(x, f), of(y, f)); });
}

CiphertextsPtr negate(const Ciphertexts& x) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, x.features.size(), "negate this",
                [&](std::size_t f) { return x.context->get()->EvalNegate(x.features[f]); });
}

CiphertextsPtr add_constant(const Ciphertexts& x, const std::vector<double>& constants) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, std::max(x.features.size(), constants.size()), "add a constant",
                [&](std::size_t f) { return x.context->get()->EvalAdd(of(x, f), constant(constants, f)); });
}

CiphertextsPtr multiply_constant(const Ciphertexts& x, const std::vector<double>& constants) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, std::max(x.features.size(), constants.size()), "multiply by a constant", [&](std::size_t f) {
    return x.context->get()->Rescale(x.context->get()->EvalMult(of(x, f), constant(constants, f)));
  });
}

CiphertextsPtr multiply_plain(const Ciphertexts& x, const Values& values) {
  const ContextInUse in_use(*x.context);
  const auto& context = x.context->get();
  return mapped(x.context, x.features.size(), "multiply by clear values", [&](std::size_t f) {
    const auto level = static_cast<std::uint32_t>(x.features[f]->GetLevel());
    const auto plain = encode(*x.context, values, values.features == 1 ? 0 : f, level);
    return context->Rescale(context->EvalMult(x.features[f], plain));
  });
}

CiphertextsPtr multiply(const Ciphertexts& x, const Ciphertexts& y, const EvaluationKeys* keys, int times) {
  const std::size_t features = broadcast(x, y);
  need_relinearisation(keys);
  const KeysInUse in_use(*x.context, keys);
  const auto& context = x.context->get();
  CiphertextsPtr out;
  for (int i = 0; i < std::max(times, 1); ++i) {
    out = mapped(x.context, features, "multiply these",
                 [&](std::size_t f) { return context->Rescale(context->EvalMult(of(x, f), of(y, f))); });
  }
  return out;
}

CiphertextsPtr dot(const Ciphertexts& x, const Ciphertexts& y, const EvaluationKeys* keys) {
  if (x.features.size() != y.features.size()) {
    throw Error("a dot product of " + std::to_string(x.features.size()) + " and " + std::to_string(y.features.size()) +
                " features; both must have as many");
  }
  need_relinearisation(keys);
  const KeysInUse in_use(*x.context, keys);
  const auto& context = x.context->get();
  const auto products = mapped(x.context, x.features.size(), "multiply these",
                               [&](std::size_t f) { return context->EvalMultNoRelin(x.features[f], y.features[f]); });
  return mapped(x.context, 1, "add products", [&](std::size_t) {
    auto sum = products->features[0]->Clone();
    for (std::size_t f = 1; f < products->features.size(); ++f) context->EvalAddInPlace(sum, products->features[f]);
    return context->Rescale(context->Relinearize(sum));
  });
}

CiphertextsPtr sum_features(const Ciphertexts& x) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, 1, "add features", [&](std::size_t) {
    auto sum = x.features[0]->Clone();
    for (std::size_t f = 1; f < x.features.size(); ++f) x.context->get()->EvalAddInPlace(sum, x.features[f]);
    return sum;
  });
}

CiphertextsPtr linear_combination(const std::vector<CiphertextsPtr>& terms,
                                  const std::vector<std::vector<double>>& weights) {
  const ContextInUse in_use(*terms.front()->context);
  std::size_t features = 1;
  for (const auto& term : terms) features = std::max(features, term->features.size());
  for (const auto& row : weights) features = std::max(features, row.size());
  const ContextPtr& owner = terms.front()->context;
  const auto& context = owner->get();
  return mapped(owner, features, "combine these", [&](std::size_t f) {
    Ciphertext sum;
    for (std::size_t t = 0; t < terms.size(); ++t) {
      const auto product = context->EvalMult(of(*terms[t], f), constant(weights[t], f));
      if (t == 0) {
        sum = product;
      } else {
        context->EvalAddInPlace(sum, product);
      }
    }
    return context->Rescale(sum);
  });
}

CiphertextsPtr rescale(const Ciphertexts& x) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, x.features.size(), "rescale this",
                [&](std::size_t f) { return x.context->get()->Rescale(x.features[f]); });
}

CiphertextsPtr settle(const Ciphertexts& x) {
  const ContextInUse in_use(*x.context);
  return mapped(x.context, x.features.size(), "rescale this", [&](std::size_t f) {
    const auto scheme = x.context->get()->GetScheme();
    const auto degree = x.features[f]->GetNoiseScaleDeg();
    return degree > 1 ? scheme->ModReduceInternal(x.features[f], degree - 1) : x.features[f];
  });
}

CiphertextsPtr drop(const Ciphertexts& x, std::uint32_t level) {
  const ContextInUse in_use(*x.context);
  const auto& context = x.context->get();
  const auto now = static_cast<std::uint32_t>(x.first().GetLevel());
  if (level == now) return std::make_shared<Ciphertexts>(x);
  if (!x.context->flexible()) {  // one scale at every level
    return mapped(x.context, x.features.size(), "drop levels",
                  [&](std::size_t f) { return context->GetScheme()->LevelReduceInternal(x.features[f], level - now); });
  }
  const Ciphertext reference = at_level(x, level);
  return mapped(x.context, x.features.size(), "drop levels", [&](std::size_t f) {
    auto dropped = x.features[f]->Clone();
    auto unchanged = reference;
    context->GetScheme()->AdjustLevelsAndDepthInPlace(dropped, unchanged);
    return dropped;
  });
}

std::vector<CiphertextsPtr> rotate(const Ciphertexts& x, const std::vector<std::int32_t>& steps,
                                   const EvaluationKeys* keys) {
  std::vector<std::uint32_t> elements;
  for (const std::int32_t step : steps) {
    elements.push_back(galois_element(*x.context, step));
    if (elements.back() != 1) need_galois(keys, elements.back(), "a rotation by " + std::to_string(step));
  }
  const KeysInUse in_use(*x.context, keys);
  const auto& context = x.context->get();
  const auto slots = static_cast<std::int64_t>(x.context->ring_dimension() / 2);
  std::vector<CiphertextsPtr> out;
  const bool hoisted = std::count_if(elements.begin(), elements.end(), [](std::uint32_t e) { return e != 1; }) > 1;
  std::vector<std::shared_ptr<std::vector<DCRTPoly>>> digits(hoisted ? x.features.size() : 0);
  for_each(digits.size(), [&](std::size_t f) { digits[f] = context->EvalFastRotationPrecompute(x.features[f]); });
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (elements[i] == 1) {
      out.push_back(std::make_shared<Ciphertexts>(x));
      continue;
    }
    const auto step = static_cast<std::uint32_t>(((steps[i] % slots) + slots) % slots);
    out.push_back(mapped(x.context, x.features.size(), "rotate this", [&](std::size_t f) {
      return hoisted ? context->EvalFastRotation(x.features[f], step, static_cast<std::uint32_t>(4 * slots), digits[f])
                     : automorphism(x, f, elements[i], *keys);
    }));
  }
  return out;
}

CiphertextsPtr conjugate(const Ciphertexts& x, const EvaluationKeys* keys) {
  const std::uint32_t element = 2 * x.context->ring_dimension() - 1;
  need_galois(keys, element, "a conjugation");
  const KeysInUse in_use(*x.context, keys);
  return mapped(x.context, x.features.size(), "conjugate this",
                [&](std::size_t f) { return automorphism(x, f, element, *keys); });
}

CiphertextsPtr sum_slots(const Ciphertexts& x, const EvaluationKeys* keys) {
  const auto slots = static_cast<std::int32_t>(x.context->slots());
  std::vector<std::uint32_t> elements;
  for (std::int32_t step = 1; step < slots; step *= 2) {
    elements.push_back(galois_element(*x.context, step));
    need_galois(keys, elements.back(), "the sum of slots rotates by " + std::to_string(step) + " and");
  }
  const KeysInUse in_use(*x.context, keys);
  const auto& context = x.context->get();
  return mapped(x.context, x.features.size(), "sum slots", [&](std::size_t f) {
    auto sum = x.features[f]->Clone();
    for (const std::uint32_t element : elements) {
      context->EvalAddInPlace(sum, context->EvalAutomorphism(sum, element, *keys->automorphisms));
    }
    return sum;
  });
}

CiphertextsPtr power_series(const Ciphertexts& x, const std::vector<double>& coefficients, const EvaluationKeys* keys) {
  need_relinearisation(keys);
  const KeysInUse in_use(*x.context, keys);
  return mapped(x.context, x.features.size(), "evaluate a polynomial",
                [&](std::size_t f) { return x.context->get()->EvalPoly(x.features[f], coefficients); });
}

CiphertextsPtr chebyshev_series(const Ciphertexts& x, const std::vector<double>& coefficients, double low, double high,
                                const EvaluationKeys* keys) {
  need_relinearisation(keys);
  std::vector<double> halved = coefficients;  // OpenFHE's series has c_0 / 2
  halved[0] *= 2;
  const KeysInUse in_use(*x.context, keys);
  return mapped(x.context, x.features.size(), "evaluate a Chebyshev series",
                [&](std::size_t f) { return x.context->get()->EvalChebyshevSeries(x.features[f], halved, low, high); });
}

CiphertextsPtr bootstrap(const Ciphertexts& x, const EvaluationKeys* keys) {
  need_relinearisation(keys);
  need_galois(keys, 2 * x.context->ring_dimension() - 1, "bootstrapping");
  const KeysInUse in_use(*x.context, keys);
  return mapped(x.context, x.features.size(), "bootstrap this",
                [&](std::size_t f) { return x.context->get()->EvalBootstrap(x.features[f]); });
}

CiphertextsPtr textbook_product(const Ciphertexts& x, const std::int64_t* weights, std::size_t rows) {
  const ContextInUse in_use(*x.context);
  const std::size_t features = x.features.size();
  const auto& context = x.context->get();
  const auto scheme = context->GetScheme();
  return mapped(x.context, rows, "multiply by a matrix", [&](std::size_t r) {
    Ciphertext sum;
    for (std::size_t f = 0; f < features; ++f) {
      const std::int64_t weight = weights[r * features + f];
      // OpenFHE multiplies by integers that are not negative.
      const auto magnitude = static_cast<std::uint64_t>(weight < 0 ? -weight : weight);
      auto product = scheme->MultByInteger(x.features[f], magnitude);
      if (weight < 0) context->EvalNegateInPlace(product);
      if (f == 0) {
        sum = product;
      } else {
        context->EvalAddInPlace(sum, product);
      }
    }
    return sum;
  });
}

CiphertextsPtr textbook_product(const Ciphertexts& x, const double* weights, std::size_t rows) {
  const ContextInUse in_use(*x.context);
  const std::size_t features = x.features.size();
  const auto& context = x.context->get();
  return mapped(x.context, rows, "multiply by a matrix", [&](std::size_t r) {
    auto sum = context->EvalMult(x.features[0], weights[r * features]);
    for (std::size_t f = 1; f < features; ++f) {
      context->EvalAddInPlace(sum, context->EvalMult(x.features[f], weights[r * features + f]));
    }
    return sum;
  });
}

}  // namespace privtuner::openfhe
