// Hybrid key switching (Han, Ki, "Better Bootstrapping for Approximate Homomorphic Encryption", 2020, section 3) on
// rows of the NTT domain, and division by primes of the modulus. Memory is what it costs, so rows are worked on in
// tiles: all that is done to one is done while it is in the first caches.
#include <cstring>

#include "evaluator_work.hpp"

namespace privtuner::ckks {
namespace {

using Rows = std::vector<const std::uint64_t*>;

// The rows from word `begin` on.
const Rows& at(const Rows& rows, std::size_t begin, Rows& moved) {
  moved.clear();
  for (const std::uint64_t* row : rows) moved.push_back(row + begin);
  return moved;
}

// sum over digits of a digit times the key's row, for one target and one component, a tile at a time.
class DigitSums {
 public:
  DigitSums(const ring::ResidueRow& row, Rows digits, Rows key)
      : row_(row), digits_(std::move(digits)), key_(std::move(key)) {}
  void tile(std::size_t begin, std::uint64_t* out) {
    row_.inner_product(at(digits_, begin, left_).data(), at(key_, begin, right_).data(), digits_.size(), out, kTile,
                       math::active_isa());
  }

 private:
  const ring::ResidueRow& row_;
  Rows digits_, key_, left_, right_;
};

}  // namespace

Evaluator::Decomposition::Decomposition(const Evaluator& evaluator, const std::uint64_t* of, std::size_t limb_count)
    : rows(of),
      n(evaluator.parameters_->n()),
      limbs(limb_count),
      targets(limbs + evaluator.parameters_->special_count()),
      digit_limbs(evaluator.parameters_->digit_limbs()),
      digits(evaluator.parameters_->digits(limbs)),
      words(evaluator, digits * targets * n) {}

std::size_t Evaluator::prime_of(std::size_t target, std::size_t limbs) const {
  return target < limbs ? target : parameters_->max_limbs() + (target - limbs);
}

std::size_t Evaluator::target_of(std::size_t prime, std::size_t limbs) const {
  return prime < parameters_->max_limbs() ? prime : limbs + (prime - parameters_->max_limbs());
}

void Evaluator::convert(const Rows& from, const BaseConversion& conversion,
                        const std::vector<ring::kernels::ConversionTarget>& targets) const {
  math::parallel_for(parameters_->n() / kTile, 2, [&](std::size_t begin, std::size_t end) {
    ring::convert_rows(from.data(), conversion.inverse_prime.data(), from.size(), targets.data(), targets.size(),
                       begin * kTile, end * kTile, math::active_isa());
  });
}

void Evaluator::decompose(Decomposition& digits) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n(), limbs = digits.limbs;
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t digit = i / p.digit_limbs();
      std::uint64_t* y = digits.word_row(digit, i);
      std::memcpy(y, digits.rows + i * n, n * sizeof(std::uint64_t));
      p.prime(i).ntt.inverse(y, math::active_isa(),
                             p.digit_conversion(digit, limbs).inverse_cofactor[i - digit * p.digit_limbs()]);
    }
  });
  for (std::size_t d = 0; d < digits.digits; ++d) {
    const BaseConversion& conversion = p.digit_conversion(d, limbs);
    Rows from;
    for (const std::size_t i : conversion.from) from.push_back(digits.word_row(d, i));
    std::vector<ring::kernels::ConversionTarget> targets;
    for (std::size_t t = 0; t < digits.targets; ++t) {
      if (digits.own(d, t)) continue;
      const std::size_t prime = prime_of(t, limbs);
      targets.push_back(p.prime(prime).row.target(conversion.weights[prime].data(), digits.word_row(d, t)));
    }
    convert(from, conversion, targets);
  }
}

void Evaluator::transform_digits(Decomposition& digits, std::size_t target) const {
  for (std::size_t d = 0; d < digits.digits; ++d) {
    if (digits.own(d, target)) continue;
    parameters_->prime(prime_of(target, digits.limbs)).ntt.forward(digits.word_row(d, target), math::active_isa());
  }
}

void Evaluator::switch_key(Decomposition& digits, const SwitchingKey& key, const Switched& to) const {
  const Parameters& p = *parameters_;
  const BaseConversion& division = to.division;
  const std::size_t n = p.n(), limbs = digits.limbs, from = division.from.size();
  const math::Isa isa = math::active_isa();
  const auto sums_of = [&](std::size_t target, int component) {
    const std::size_t prime = prime_of(target, limbs);
    Rows digit_rows, key_rows;
    for (std::size_t d = 0; d < digits.digits; ++d) {
      digit_rows.push_back(digits.row(d, target));
      key_rows.push_back(key.row(d, component, prime));
    }
    return DigitSums(p.prime(prime).row, std::move(digit_rows), std::move(key_rows));
  };

  // The rows that are divided by, as y_j of BaseConversion.
  Scratch divided(*this, 2 * from * n), rests(*this, 2 * to.kept * n);
  const auto divided_row = [&](int c, std::size_t j) { return divided.data() + (c * from + j) * n; };
  const auto rest_row = [&](int c, std::size_t i) { return rests.data() + (c * to.kept + i) * n; };
  math::parallel_for(from, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t j = begin; j < end; ++j) {
      const std::size_t target = target_of(division.from[j], limbs);
      const Prime& prime = p.prime(division.from[j]);
      if (!digits.transformed) transform_digits(digits, target);
      DigitSums sums[2] = {sums_of(target, 0), sums_of(target, 1)};
      for (std::size_t tile = 0; tile < n; tile += kTile) {
        for (int c = 0; c < 2; ++c) {
          std::uint64_t* out = divided_row(c, j) + tile;
          sums[c].tile(tile, out);
          if (target >= limbs || to.added[c] == nullptr) continue;  // P is 0 modulo the special primes
          const std::uint64_t* const terms[2] = {out, to.added[c] + target * n + tile};
          const std::uint64_t weights[2] = {1, p.special_product(target)};
          prime.row.linear_combination(terms, weights, 2, out, kTile, isa);
        }
      }
      for (int c = 0; c < 2; ++c) prime.ntt.inverse(divided_row(c, j), isa, division.inverse_cofactor[j]);
    }
  });
  for (int c = 0; c < 2; ++c) {
    Rows rows;
    for (std::size_t j = 0; j < from; ++j) rows.push_back(divided_row(c, j));
    std::vector<ring::kernels::ConversionTarget> targets;
    for (std::size_t i = 0; i < to.kept; ++i) {
      targets.push_back(p.prime(i).row.target(division.weights[i].data(), rest_row(c, i)));
    }
    convert(rows, division, targets);
  }

  // (sum + P added - rest) / D, limb by limb.
  math::parallel_for(to.kept, 1, [&](std::size_t begin, std::size_t end) {
    alignas(math::kAlignment) std::uint64_t sum[kTile];
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = p.prime(i);
      const math::Modulus& q = prime.row.modulus();
      const std::uint64_t inverse = division.inverse_product[i];
      const std::uint64_t weights[3] = {inverse, q.neg(inverse), q.mul(inverse, p.special_product(i))};
      if (!digits.transformed) transform_digits(digits, i);
      DigitSums sums[2] = {sums_of(i, 0), sums_of(i, 1)};
      for (int c = 0; c < 2; ++c) prime.ntt.forward(rest_row(c, i), isa);
      for (std::size_t tile = 0; tile < n; tile += kTile) {
        const std::size_t source = to.automorphism == nullptr ? tile : to.automorphism->source(tile, kTile);
        for (int c = 0; c < 2; ++c) {
          const bool adds = to.added[c] != nullptr;
          const std::uint64_t* const terms[3] = {sum, rest_row(c, i) + source,
                                                 adds ? to.added[c] + i * n + source : nullptr};
          std::uint64_t* out = to.out[c] + i * n + tile;
          sums[c].tile(source, sum);
          prime.row.linear_combination(terms, weights, adds ? 3 : 2, to.automorphism == nullptr ? out : sum, kTile,
                                       isa);
          if (to.automorphism != nullptr) to.automorphism->permute(sum, tile, kTile, out, isa);
        }
      }
    }
  });
}

void Evaluator::divide(std::uint64_t* rows, const BaseConversion& conversion, std::size_t limbs, std::size_t kept,
                       std::uint64_t* out) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n(), from = conversion.from.size();
  const math::Isa isa = math::active_isa();
  Rows divided;
  for (const std::size_t prime : conversion.from) divided.push_back(rows + target_of(prime, limbs) * n);
  math::parallel_for(from, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t j = begin; j < end; ++j) {
      const std::size_t prime = conversion.from[j];
      p.prime(prime).ntt.inverse(rows + target_of(prime, limbs) * n, isa, conversion.inverse_cofactor[j]);
    }
  });
  Scratch rests(*this, kept * n);
  std::vector<ring::kernels::ConversionTarget> targets;
  for (std::size_t i = 0; i < kept; ++i) {
    targets.push_back(p.prime(i).row.target(conversion.weights[i].data(), rests.data() + i * n));
  }
  convert(divided, conversion, targets);
  math::parallel_for(kept, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = p.prime(i);
      std::uint64_t* rest = rests.data() + i * n;
      prime.ntt.forward(rest, isa);
      const std::uint64_t* const terms[2] = {rows + i * n, rest};
      const std::uint64_t inverse = conversion.inverse_product[i];
      const std::uint64_t weights[2] = {inverse, prime.row.modulus().neg(inverse)};
      prime.row.linear_combination(terms, weights, 2, out + i * n, n, isa);
    }
  });
}

}  // namespace privtuner::ckks
