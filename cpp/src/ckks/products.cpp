// Products: of tensors, with clear values, with clear matrices.
#include <algorithm>
#include <cmath>
#include <string>

#include "evaluator_work.hpp"

namespace privtuner::ckks {

TensorPtr Evaluator::multiply_plain(const TensorPtr& x, const Values& values) const {
  check(*x);
  if (x->level < 1) throw Error("a product with clear values needs a level and " + describe(*x) + " has none left");
  if (values.tokens != x->tokens || (values.features != x->features && values.features != 1)) {
    throw Error("clear values of shape (" + std::to_string(values.tokens) + ", " + std::to_string(values.features) +
                ") do not fit a tensor of shape (" + std::to_string(x->tokens) + ", " + std::to_string(x->features) +
                ")");
  }
  const std::size_t n = parameters_->n(), limbs = x->limbs();
  const double q = static_cast<double>(parameters_->prime(limbs - 1).q), target = parameters_->scale(x->level - 1) * q;
  double largest = 0;
  for (std::size_t t = 0; t < values.tokens; ++t) {
    for (std::size_t f = 0; f < values.features; ++f) {
      const auto at =
          static_cast<std::ptrdiff_t>(t) * values.token_stride + static_cast<std::ptrdiff_t>(f) * values.feature_stride;
      const double value = values.im == nullptr ? std::fabs(values.re[at]) : std::hypot(values.re[at], values.im[at]);
      if (!std::isfinite(value)) throw Error("clear values hold NaN or infinity");
      largest = std::max(largest, value);
    }
  }
  auto out = result(x->tokens, x->features, x->level - 1, x->planned);
  out->bound = x->bound * largest;
  const double encoding = std::sqrt(static_cast<double>(n) / 24);  // rounding of N coefficients, in a slot's real part
  for (std::size_t f = 0; f < x->features; ++f) {
    const double factor = target / x->scale[f];
    out->scale[f] = target / q;
    out->noise[f] = norm((largest * factor * x->noise[f] + x->bound * x->scale[f] * encoding) / q, rounding_noise());
    out->shared[f] = largest * factor * x->shared[f] / q;
  }
  trace_.count(Work::plain, limbs, static_cast<double>(x->features));
  trace_.count(Work::rescale, limbs, static_cast<double>(x->features));
  const auto encode_feature = [&](std::size_t f, std::int64_t* coefficients) {
    encode(*parameters_, values, values.features == 1 ? 0 : f, target / x->scale[f], coefficients);
  };
  if (out->planned) {
    if (!recording_) return out;
    math::SecretBuffer<std::int64_t> coefficients(x->features * n);
    for_features(x->features, [&](std::size_t f) { encode_feature(f, coefficients.data() + f * n); });
    recording_->add(step::Plain{out->ref(), x->ref(), std::move(coefficients), limbs});
    return out;
  }
  for_features(x->features, [&](std::size_t f) {
    math::SecretBuffer<std::int64_t> coefficients(n);
    Scratch plain(*this, limbs * n), product(*this, limbs * n);
    encode_feature(f, coefficients.data());
    math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) to_row(*parameters_, i, coefficients.data(), plain.data() + i * n);
    });
    for (int component = 0; component < 2; ++component) {
      for (std::size_t i = 0; i < limbs; ++i) {
        parameters_->prime(i).row.multiply(x->row(f, component, i), plain.data() + i * n, product.data() + i * n, n,
                                           math::active_isa());
      }
      divide(product.data(), parameters_->last_conversion(limbs), limbs, limbs - 1, out->row(f, component, 0));
    }
  });
  return out;
}

TensorPtr Evaluator::multiply(const TensorPtr& left, const TensorPtr& right) const {
  check_pair(*left, *right);
  const auto [x, y] = meet_for_product(left, right);
  return products(x, y, false, {}, {}, x->level, x->bound * y->bound);
}

TensorPtr Evaluator::dot(const TensorPtr& left, const TensorPtr& right) const {
  check_pair(*left, *right);
  if (left->features != right->features) {
    throw Error("a dot product of " + std::to_string(left->features) + " and " + std::to_string(right->features) +
                " features; both must have as many");
  }
  if (2 * left->features > ring::kMaxTerms) {
    throw Error("a dot product of " + std::to_string(left->features) + " features; take at most " +
                std::to_string(ring::kMaxTerms / 2) + " at once and add the results");
  }
  const auto [x, y] = meet_for_product(left, right);
  for (std::size_t f = 1; f < x->features; ++f) {
    if (!same(x->scale[f] * y->scale[f], x->scale[0] * y->scale[0])) {
      throw Error("the features of a dot product have different scales; multiply by 1.0 first (takes a level)");
    }
  }
  return products(x, y, true, {}, {}, x->level, x->bound * y->bound * static_cast<double>(x->features));
}

TensorPtr Evaluator::multiply_add(const TensorPtr& x, const TensorPtr& y, const std::vector<double>& multipliers,
                                  const Combination& addend, int level, double bound) const {
  check_pair(*x, *y);
  return products(x, y, false, multipliers, addend, level, bound);
}

TensorPtr Evaluator::products(const TensorPtr& x, const TensorPtr& y, bool summed,
                              const std::vector<double>& multipliers, const Combination& addend, int level,
                              double bound) const {
  if (level < 1) {
    throw Error("a product needs a level and tensors " + describe(*x) + " and " + describe(*y) +
                " leave none; choose parameters of larger depth");
  }
  const std::size_t features = summed ? 1 : std::max(x->features, y->features), n = parameters_->n();
  const std::size_t limbs = parameters_->limbs(level);
  const double q = static_cast<double>(parameters_->prime(limbs - 1).q);
  const auto of = [](const Tensor& t, std::size_t f) { return t.features == 1 ? 0 : f; };
  const auto multiplier = [&](std::size_t f) { return multipliers.empty() ? 1.0 : multipliers[f]; };

  auto out = result(x->tokens, features, level - 1, x->planned);
  out->bound = bound;
  const std::size_t terms = summed ? x->features : 1;
  const double switched = switch_noise(limbs);
  for (std::size_t f = 0; f < features; ++f) {
    double square = 0, shared = 0;
    for (std::size_t t = 0; t < terms; ++t) {
      const std::size_t i = of(*x, summed ? t : f), j = of(*y, summed ? t : f), all = summed ? terms : features;
      const auto error = [&](double of_x, double of_y) {
        return x->bound * x->scale[i] * of_y + y->bound * y->scale[j] * of_x + of_x * of_y;
      };
      const double both = error(x->noise[i], y->noise[j]);
      const double common = error(shared_noise(*x, i, all, x->overlaps(*y)), shared_noise(*y, j, all, x->overlaps(*y)));
      square += std::max(0.0, both * both - common * common);
      shared += common;
    }
    double noise = multiplier(f) * (summed ? std::sqrt(square) + shared : std::sqrt(square + shared * shared));
    shared *= multiplier(f);
    for (std::size_t t = 0; t < addend.tensors.size(); ++t) {
      const Tensor& a = *addend.tensors[t];
      noise += std::fabs(addend.weights[t][f]) * a.noise[of(a, f)] + 0.3 * a.bound * a.scale[of(a, f)];
      shared += std::fabs(addend.weights[t][f]) * shared_noise(a, of(a, f), features, false);
    }
    out->scale[f] = x->scale[of(*x, f)] * y->scale[of(*y, f)] * multiplier(f) / q;
    out->noise[f] = norm(norm(noise, switched) / q, rounding_noise());
    out->shared[f] = summed ? 0 : shared / q;
  }
  trace_.count(Work::product, limbs, static_cast<double>(features * terms));
  trace_.count(Work::relinearise, limbs, static_cast<double>(features));
  if (!addend.tensors.empty()) {
    trace_.count(Work::term, limbs, static_cast<double>(features * addend.tensors.size()));
  }
  trace_.need_relinearisation();
  if (out->planned && !recording_) return out;
  const SwitchingKey& key = require_key(*parameters_, keys_.get(), kRelinearisation);
  if (out->planned) {
    step::Product product{out->ref(), x->ref(), y->ref(), summed, {}, terms_of(addend, features, limbs), limbs};
    for (std::size_t limb = 0; limb < limbs; ++limb) {
      const math::Modulus& modulus = parameters_->prime(limb).row.modulus();
      for (const double value : multipliers) product.multipliers.push_back(residue_of(value, modulus));
    }
    recording_->add(std::move(product));
    return out;
  }

  for_features(features, [&](std::size_t f) {
    Scratch degree(*this, 3 * limbs * n);
    std::uint64_t *d0 = degree.data(), *d1 = d0 + limbs * n, *d2 = d1 + limbs * n;
    const math::Isa isa = math::active_isa();
    math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
      std::vector<const std::uint64_t*> a(2 * terms), b(2 * terms);
      for (std::size_t i = begin; i < end; ++i) {
        const ring::ResidueRow& row = parameters_->prime(i).row;
        const std::uint64_t w = residue_of(multiplier(f), row.modulus());
        // A tile at a time: the four rows of a pair of features are read once.
        for (std::size_t tile = 0; tile < n; tile += kTile) {
          const auto fill = [&](std::size_t offset, int ca, int cb) {
            for (std::size_t t = 0; t < terms; ++t) {
              a[offset + t] = x->row(of(*x, summed ? t : f), ca, i) + tile;
              b[offset + t] = y->row(of(*y, summed ? t : f), cb, i) + tile;
            }
          };
          const auto sum = [&](std::size_t count, std::uint64_t* d) {
            row.inner_product(a.data(), b.data(), count, d + i * n + tile, kTile, isa);
            if (w != 1) row.multiply_scalar(d + i * n + tile, w, d + i * n + tile, kTile, isa);
          };
          fill(0, 0, 0);
          sum(terms, d0);
          fill(0, 1, 1);
          sum(terms, d2);
          fill(0, 0, 1);
          fill(terms, 1, 0);
          sum(2 * terms, d1);
        }
        combine_row(addend, f, 0, i, d0 + i * n);
        combine_row(addend, f, 1, i, d1 + i * n);
      }
    });
    Decomposition digits(*this, d2, limbs);
    decompose(digits);
    // P d + switched, divided by P and the last prime at once.
    switch_key(digits, key,
               {parameters_->special_conversion(limbs, true),
                limbs - 1,
                {d0, d1},
                nullptr,
                {out->row(f, 0, 0), out->row(f, 1, 0)}});
  });
  return out;
}

TensorPtr Evaluator::linear(const TensorPtr& x, const Matrix& matrix, gemm::Operand operand) const {
  check(*x);
  const bool plain = operand == gemm::Operand::plain;
  const std::size_t depth = plain ? matrix.cols() : matrix.rows(), rows = plain ? matrix.rows() : matrix.cols();
  if (x->features != depth) {
    throw Error("a matrix of shape (" + std::to_string(rows) + ", " + std::to_string(depth) +
                ") cannot be applied to a tensor of " + std::to_string(x->features) + " features");
  }
  const gemm::Weights& weights = matrix.weights();
  // values_out[r] = sum_j integers * raw[j] / scale: raw scales must agree once delta is taken out.
  const auto unit = [&](std::size_t j) { return plain ? x->scale[j] : x->scale[j] / matrix.delta()[j]; };
  for (std::size_t j = 1; j < depth; ++j) {
    if (!same(unit(j), unit(0))) {
      throw Error("the input's scales do not agree" +
                  std::string(plain ? "" : " with the transposed matrix's row scales") +
                  "; encrypt with one scale, quantise the matrix with one delta, or multiply by 1.0 first");
    }
  }
  auto out = result(x->tokens, rows, x->level, x->planned);
  double widest = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    double square = 0, shared = 0, sum = 0;
    for (std::size_t j = 0; j < depth; ++j) {
      const double w = plain ? weights.at(r, j) : weights.at(j, r);
      square += w * w * x->own_noise(j) * x->own_noise(j);
      shared += std::fabs(w) * x->shared[j];
      sum += std::fabs(w) * (plain ? matrix.delta()[r] : matrix.delta()[j]);
    }
    out->scale[r] = plain ? unit(0) / matrix.delta()[r] : unit(0);
    out->noise[r] = std::sqrt(square) + shared;
    out->shared[r] = out->noise[r];  // every output has the same inputs' errors
    widest = std::max(widest, sum);
  }
  out->bound = x->bound * widest;
  const std::size_t n = parameters_->n(), limbs = x->limbs(), stride = 2 * limbs * n;
  trace_.count(Work::matrix, limbs,
               static_cast<double>(weights.bytes_per_weight()) * static_cast<double>(rows) *
                   static_cast<double>(depth) * static_cast<double>(2 * limbs * n) / 1e6);
  if (x->planned) {
    if (recording_) recording_->add(step::Matrix{out->ref(), x->ref(), !plain});
    return out;
  }
  // Columns at a time: the packed copy stays small whatever the depth.
  constexpr std::size_t kPackedWords = std::size_t{1} << 23;
  const std::size_t columns = std::clamp<std::size_t>(kPackedWords / depth / 256 * 256, 256, n);
  gemm::PackedResidues<std::uint64_t> packed;
  for (std::size_t limb = 0; limb < limbs; ++limb) {
    const math::Modulus& q = parameters_->prime(limb).row.modulus();
    for (int component = 0; component < 2; ++component) {
      for (std::size_t column = 0; column < n; column += columns) {
        const std::size_t count = std::min(columns, n - column);
        packed.assign(x->row(0, component, limb) + column, depth, count, stride, math::active_isa(), q.bits());
        gemm::multiply(weights, operand, packed, q, 0, rows, out->row(0, component, limb) + column, stride);
      }
    }
  }
  return out;
}

}  // namespace privtuner::ckks
