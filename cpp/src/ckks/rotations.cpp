// Automorphisms: rotations, conjugation, and monomials beside them.
#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "evaluator_work.hpp"

namespace privtuner::ckks {

std::vector<TensorPtr> Evaluator::rotate(const TensorPtr& x, const std::vector<long long>& steps) const {
  check(*x);
  std::vector<std::uint32_t> elements;
  for (const long long step : steps) elements.push_back(galois_element(*parameters_, step));
  return galois(x, elements);
}

TensorPtr Evaluator::automorphism(const TensorPtr& x, std::uint32_t element) const {
  check(*x);
  return galois(x, {element})[0];
}

TensorPtr Evaluator::conjugate(const TensorPtr& x) const { return automorphism(x, conjugation_element(*parameters_)); }

TensorPtr Evaluator::multiply_monomial(const TensorPtr& x, std::size_t power) const {
  check(*x);
  const std::size_t n = parameters_->n(), limbs = x->limbs();
  if (power >= n)
    throw Error("X^" + std::to_string(power) + " is beyond the ring; pass a power below " + std::to_string(n));
  auto out = result(x->tokens, x->features, x->level, x->planned);
  out->bound = x->bound;
  out->scale = x->scale;
  out->noise = x->noise;
  out->shared = x->shared;
  trace_.count(Work::term, limbs, static_cast<double>(x->features));
  if (x->planned) {
    if (recording_) recording_->add(step::Monomial{out->ref(), x->ref(), power});
    return out;
  }
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    Scratch monomial(*this, n);
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = parameters_->prime(i);
      std::memset(monomial.data(), 0, n * sizeof(std::uint64_t));
      monomial.data()[power] = 1;
      prime.ntt.forward(monomial.data(), math::active_isa());
      for (std::size_t f = 0; f < x->features; ++f) {
        for (int c = 0; c < 2; ++c) {
          prime.row.multiply(x->row(f, c, i), monomial.data(), out->row(f, c, i), n, math::active_isa());
        }
      }
    }
  });
  return out;
}

TensorPtr Evaluator::sum_slots(const TensorPtr& x) const {
  check(*x);
  TensorPtr sum = x;
  for (std::size_t step = 1; step < parameters_->slots(); step *= 2) {
    sum = add(sum, rotate(sum, {static_cast<long long>(step)})[0]);
  }
  return sum;
}

std::vector<TensorPtr> Evaluator::galois(const TensorPtr& x, const std::vector<std::uint32_t>& elements) const {
  const std::size_t n = parameters_->n(), limbs = x->limbs();
  std::vector<std::shared_ptr<Tensor>> outs;
  const double added = norm(switch_noise(limbs), rounding_noise());
  std::size_t switched = 0;
  for (const std::uint32_t element : elements) {
    auto out = result(x->tokens, x->features, x->level, x->planned);
    out->bound = x->bound;
    out->scale = x->scale;
    out->noise = x->noise;
    out->shared = x->shared;
    if (element != 1) {
      ++switched;
      for (double& noise : out->noise) noise = norm(noise, added);
      trace_.need_galois(element);
      if (!x->planned || recording_) require_key(*parameters_, keys_.get(), element);
    }
    outs.push_back(std::move(out));
  }
  trace_.count(Work::decompose, limbs, static_cast<double>(switched == 0 ? 0 : x->features));
  trace_.count(Work::rotate, limbs, static_cast<double>(switched * x->features));
  std::vector<TensorPtr> results(outs.begin(), outs.end());
  if (x->planned) {
    if (recording_ && !outs.empty()) {
      std::vector<TensorRef> refs;
      for (const TensorPtr& out : results) refs.push_back(out->ref());
      recording_->add(step::Galois{x->ref(), std::move(refs), elements});
    }
    return results;
  }

  for_features(x->features, [&](std::size_t f) {
    std::optional<Decomposition> digits;
    if (switched != 0) decompose(digits.emplace(*this, x->row(f, 1, 0), limbs));
    if (switched > 1) {
      math::parallel_for(digits->targets, 1, [&](std::size_t begin, std::size_t end) {
        for (std::size_t t = begin; t < end; ++t) transform_digits(*digits, t);
      });
      digits->transformed = true;
    }
    for (std::size_t e = 0; e < elements.size(); ++e) {
      Tensor& out = *outs[e];
      if (elements[e] == 1) {
        std::memcpy(out.row(f, 0, 0), x->row(f, 0, 0), 2 * limbs * n * sizeof(std::uint64_t));
        continue;
      }
      switch_key(*digits, *keys_->galois.at(elements[e]).key,
                 {parameters_->special_conversion(limbs, false),
                  limbs,
                  {x->row(f, 0, 0), nullptr},
                  &automorphisms_.at(elements[e]),
                  {out.row(f, 0, 0), out.row(f, 1, 0)}});
    }
  });
  return results;
}

}  // namespace privtuner::ckks
