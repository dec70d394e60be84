#include "privtuner/ckks/centred_lift.hpp"

namespace privtuner::ckks {

CentredLift::CentredLift(const Parameters& parameters, std::size_t limbs)
    : parameters_(parameters), limbs_(limbs), inverse_(limbs * limbs) {
  for (std::size_t i = 0; i < limbs; ++i) {
    const math::Modulus& q = parameters.prime(i).row.modulus();
    for (std::size_t j = 0; j < i; ++j) inverse_[i * limbs + j] = q.inv(q.reduce(parameters.prime(j).q));
  }
  for (std::size_t i = 0; i < parameters.prime_count(); ++i) {
    const math::Modulus& p = parameters.prime(i).row.modulus();
    std::vector<std::uint64_t> products;
    std::uint64_t product = 1;
    for (std::size_t j = 0; j < limbs; ++j) {
      products.push_back(product);
      product = p.mul(product, p.reduce(parameters.prime(j).q));
    }
    products_.push_back(std::move(products));
    minus_half_.push_back(p.mul(p.sub(1, product), (p.q + 1) / 2));
  }
}

void CentredLift::to_digits(std::uint64_t* rows) const {
  const std::size_t n = parameters_.n();
  const math::Isa isa = math::active_isa();
  for (std::size_t i = 0; i < limbs_; ++i) {
    const ring::ResidueRow& q = parameters_.prime(i).row;
    std::uint64_t* row = rows + i * n;
    q.add_scalar(row, q.modulus().q / 2, row, n, isa);  // (q - 1) / 2 for the product of the primes too
    for (std::size_t j = 0; j < i; ++j) {               // (row - digit j) / q_j
      const std::uint64_t* terms[2] = {row, rows + j * n};
      const std::uint64_t inverse = inverse_[i * limbs_ + j], weights[2] = {inverse, q.modulus().q - inverse};
      q.linear_combination(terms, weights, 2, row, n, isa);
    }
  }
}

void CentredLift::residues(const std::uint64_t* digits, std::size_t i, std::uint64_t* out) const {
  const std::size_t n = parameters_.n();
  const math::Isa isa = math::active_isa();
  const ring::ResidueRow& p = parameters_.prime(i).row;
  std::vector<const std::uint64_t*> terms(limbs_);
  for (std::size_t j = 0; j < limbs_; ++j) terms[j] = digits + j * n;
  p.linear_combination(terms.data(), products_[i].data(), limbs_, out, n, isa);
  p.add_scalar(out, minus_half_[i], out, n, isa);
}

}  // namespace privtuner::ckks
