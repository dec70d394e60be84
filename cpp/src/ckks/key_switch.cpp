// Hybrid key switching (Han, Ki, "Better Bootstrapping for Approximate Homomorphic Encryption", 2020, section 3) on
// rows of the NTT domain, and division by primes of the modulus.
#include <cstring>

#include "evaluator_work.hpp"

namespace privtuner::ckks {

std::size_t Evaluator::prime_of(std::size_t target, std::size_t limbs) const {
  return target < limbs ? target : parameters_->max_limbs() + (target - limbs);
}

void Evaluator::decompose(const std::uint64_t* rows, std::size_t limbs, Decomposition& out) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n(), digits = p.digits(limbs);
  const math::Isa isa = math::active_isa();
  out.rows = rows;
  out.limbs = limbs;
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      std::uint64_t* y = out.scaled + i * n;
      std::memcpy(y, rows + i * n, n * sizeof(std::uint64_t));
      p.prime(i).ntt.inverse(y, isa);
      const std::size_t digit = i / p.digit_limbs();
      p.prime(i).row.multiply_scalar(y, p.digit_conversion(digit, limbs).inverse_cofactor[i - digit * p.digit_limbs()],
                                     y, n, isa);
    }
  });
  math::parallel_for(digits, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t d = begin; d < end; ++d) {
      const BaseConversion& conversion = p.digit_conversion(d, limbs);
      std::vector<const std::uint64_t*> terms;
      for (const std::size_t i : conversion.from) terms.push_back(out.scaled + i * n);
      ring::quotient_row(terms.data(), conversion.inverse_prime.data(), terms.size(), out.quotients + d * n, n, isa);
    }
  });
}

void Evaluator::extend_digit(const Decomposition& decomposition, std::size_t digit, std::size_t target,
                             std::uint64_t* out) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n();
  const math::Isa isa = math::active_isa();
  const BaseConversion& conversion = p.digit_conversion(digit, decomposition.limbs);
  std::vector<const std::uint64_t*> terms;
  for (const std::size_t i : conversion.from) terms.push_back(decomposition.scaled + i * n);
  terms.push_back(decomposition.quotients + digit * n);
  const std::size_t prime = prime_of(target, decomposition.limbs);
  p.prime(prime).row.linear_combination(terms.data(), conversion.weights[prime].data(), terms.size(), out, n, isa);
  p.prime(prime).ntt.forward(out, isa);
}

void Evaluator::switch_key(const Decomposition& decomposition, const std::uint64_t* extended, const SwitchingKey& key,
                           std::uint64_t* out0, std::uint64_t* out1) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n(), limbs = decomposition.limbs, digits = p.digits(limbs);
  const std::size_t targets = limbs + p.special_count();
  math::parallel_for(targets, 1, [&](std::size_t begin, std::size_t end) {
    Scratch own(*this, extended == nullptr ? digits * n : 0);
    std::vector<const std::uint64_t*> digit_rows(digits), key0(digits), key1(digits);
    for (std::size_t t = begin; t < end; ++t) {
      const std::size_t prime = prime_of(t, limbs);
      for (std::size_t d = 0; d < digits; ++d) {
        if (t < limbs && t / p.digit_limbs() == d) {
          digit_rows[d] = decomposition.rows + t * n;  // the digit's own limbs are its residues
        } else if (extended != nullptr) {
          digit_rows[d] = extended + (d * targets + t) * n;
        } else {
          extend_digit(decomposition, d, t, own.data() + d * n);
          digit_rows[d] = own.data() + d * n;
        }
        key0[d] = key.row(d, 0, prime);
        key1[d] = key.row(d, 1, prime);
      }
      const ring::ResidueRow& row = p.prime(prime).row;
      row.inner_product(digit_rows.data(), key0.data(), digits, out0 + t * n, n, math::active_isa());
      row.inner_product(digit_rows.data(), key1.data(), digits, out1 + t * n, n, math::active_isa());
    }
  });
}

void Evaluator::add_raised(const std::uint64_t* rows, std::size_t limbs, std::uint64_t* sum) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n();
  math::parallel_for(limbs, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint64_t weights[2] = {1, p.special_product(i)};
      const std::uint64_t* terms[2] = {sum + i * n, rows + i * n};
      p.prime(i).row.linear_combination(terms, weights, 2, sum + i * n, n, math::active_isa());
    }
  });
}

void Evaluator::divide(std::uint64_t* rows, const BaseConversion& conversion, std::size_t limbs, std::size_t kept,
                       std::uint64_t* out) const {
  const Parameters& p = *parameters_;
  const std::size_t n = p.n(), from = conversion.from.size();
  const math::Isa isa = math::active_isa();
  std::vector<const std::uint64_t*> terms(from + 1);
  math::parallel_for(from, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t j = begin; j < end; ++j) {
      const std::size_t prime = conversion.from[j];
      std::uint64_t* y = rows + (prime < p.max_limbs() ? prime : limbs + prime - p.max_limbs()) * n;
      p.prime(prime).ntt.inverse(y, isa);
      p.prime(prime).row.multiply_scalar(y, conversion.inverse_cofactor[j], y, n, isa);
      terms[j] = y;
    }
  });
  Scratch quotient(*this, n);
  ring::quotient_row(terms.data(), conversion.inverse_prime.data(), from, quotient.data(), n, isa);
  terms[from] = quotient.data();
  math::parallel_for(kept, 1, [&](std::size_t begin, std::size_t end) {
    Scratch rest(*this, n);
    for (std::size_t i = begin; i < end; ++i) {
      const Prime& prime = p.prime(i);
      prime.row.linear_combination(terms.data(), conversion.weights[i].data(), from + 1, rest.data(), n, isa);
      prime.ntt.forward(rest.data(), isa);
      prime.row.subtract_multiply(rows + i * n, rest.data(), conversion.inverse_product[i], out + i * n, n, isa);
    }
  });
}

}  // namespace privtuner::ckks
