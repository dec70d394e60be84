// Polynomials of encrypted values: depth, scale and value against the definition.
#include "privtuner/circuits/polynomial.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"
#include "privtuner/ckks/secret.hpp"
#include "privtuner/math/parallel.hpp"

using namespace privtuner::ckks;
using privtuner::circuits::Basis;
using privtuner::circuits::evaluate;
using privtuner::circuits::evaluate_all;
using privtuner::circuits::levels_needed;
using privtuner::circuits::Polynomial;
namespace math = privtuner::math;

namespace {

ParametersPtr insecure(int depth, int scale_bits = 40) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

int depth_of(int degree) { return static_cast<int>(std::ceil(std::log2(degree + 1))); }

Polynomial random_polynomial(Basis basis, int degree, std::mt19937_64& random, double low = -1, double high = 1) {
  Polynomial p{basis, {}, low, high};
  std::uniform_real_distribution<double> uniform(-1, 1);
  // Values stay near 1 whatever the degree.
  for (int i = 0; i <= degree; ++i) p.coefficients.push_back(uniform(random) / (1 + 0.3 * i));
  if (p.coefficients.back() == 0) p.coefficients.back() = 0.5;
  return p;
}

// Horner or Clenshaw.
long double value_at(const Polynomial& p, long double x) {
  if (p.basis == Basis::power) {
    long double sum = 0;
    for (std::size_t i = p.coefficients.size(); i-- > 0;) sum = sum * x + p.coefficients[i];
    return sum;
  }
  const long double u = (2 * x - p.low - p.high) / (static_cast<long double>(p.high) - p.low);
  long double b1 = 0, b2 = 0;
  for (std::size_t i = p.coefficients.size(); i-- > 1;) {
    const long double b0 = p.coefficients[i] + 2 * u * b1 - b2;
    b2 = b1;
    b1 = b0;
  }
  return p.coefficients[0] + u * b1 - b2;
}

struct Session {
  ParametersPtr p;
  SecretKey secret;
  std::shared_ptr<EvaluationKeys> keys = std::make_shared<EvaluationKeys>();
  std::mt19937_64 random{9};

  explicit Session(ParametersPtr parameters) : p(std::move(parameters)), secret(p) {
    keys->parameters = p;
    keys->relinearisation = secret.relinearisation_key();
  }

  std::vector<double> values(std::size_t count, double low, double high) {
    std::uniform_real_distribution<double> uniform(low, high);
    std::vector<double> out(count);
    for (double& value : out) value = uniform(random);
    out[0] = low;
    out[1] = high;
    return out;
  }

  TensorPtr encrypt(const std::vector<double>& values, int level, double bound, const std::vector<double>& scale = {}) {
    const std::size_t features = values.size() / p->slots();
    return secret.encrypt({values.data(), nullptr, p->slots(), features, static_cast<std::ptrdiff_t>(features), 1},
                          {level, bound, scale.empty() ? std::vector<double>(features, p->scale(level)) : scale});
  }

  TensorPtr planned(std::size_t features, int level, double bound, double factor = 1) {
    return planned_tensor(p, 4, features, {level, bound, std::vector<double>(features, p->scale(level) * factor)},
                          false, nullptr);
  }

  // The values, each within the predicted error of the worst slot.
  void check(const Tensor& y, const std::vector<double>& x, const Polynomial& polynomial) {
    std::vector<double> got(x.size());
    secret.decrypt(y, got.data(), nullptr);
    const double allowed = y.worst_error();
    CHECK_LT(allowed, 1e-4);
    for (std::size_t i = 0; i < x.size(); ++i) {
      CHECK_LE(std::fabs(static_cast<double>(value_at(polynomial, x[i]) - got[i])), allowed);
    }
  }
};

}  // namespace

TEST(every_degree_takes_its_optimal_depth) {
  const auto p = insecure(9);
  const Evaluator dry(p);
  Session s(p);
  for (int degree = 0; degree <= 255; ++degree) {
    for (const Basis basis : {Basis::power, Basis::chebyshev}) {
      const Polynomial polynomial = random_polynomial(basis, degree, s.random);
      const int depth = depth_of(degree), levels = std::max(1, depth);
      CHECK_EQ(polynomial.degree(), degree);
      CHECK_EQ(polynomial.depth(), depth);
      for (const int level : {levels, 9}) {
        const auto x = s.planned(1, level, 1);
        CHECK_EQ(levels_needed(*x, polynomial), levels);
        const auto y = evaluate(dry, x, polynomial);
        CHECK_EQ(y->level, level - levels);
        CHECK_LT(std::fabs(y->scale[0] / p->scale(y->level) - 1), 1e-12);
        double sum = 0;  // every power is at most 1 in size
        for (const double c : polynomial.coefficients) sum += std::fabs(c);
        CHECK_LE(y->bound, sum * (1 + 1e-12));
      }
      if (levels < 9) {
        CHECK_THROWS(Error, evaluate(dry, s.planned(1, levels - 1, 1), polynomial),
                     "choose parameters of larger depth");
      }
    }
  }
}

TEST(degree_zeros_at_the_end_do_not_count) {
  const Polynomial p{Basis::chebyshev, {1, 2, 0, 3, 0, 0, 0, 0, 0}, -1, 1};
  CHECK_EQ(p.degree(), 3);
  CHECK_EQ(p.depth(), 2);
  const Polynomial zero{Basis::power, {0, 0, 0}, -1, 1};
  CHECK_EQ(zero.degree(), 0);
  CHECK_EQ(zero.depth(), 0);
}

TEST(values_against_the_definition) {
  Session s(insecure(6));
  const Evaluator e(s.p, s.keys);
  for (const int degree : {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 23, 31, 33, 48, 63}) {
    for (const Basis basis : {Basis::power, Basis::chebyshev}) {
      const Polynomial polynomial = random_polynomial(basis, degree, s.random);
      const auto x = s.values(s.p->slots(), -1, 1);
      const auto y = evaluate(e, s.encrypt(x, 6, 1), polynomial);
      CHECK_EQ(y->level, 6 - std::max(1, depth_of(degree)));
      s.check(*y, x, polynomial);
    }
  }
}

TEST(several_polynomials_share_powers) {
  Session s(insecure(6));
  const Evaluator e(s.p, s.keys);
  const auto products = [](const Evaluator& counted) {
    double sum = 0;
    for (const auto& entry : counted.trace().work()) sum += entry.first.first == Work::relinearise ? entry.second : 0;
    return sum;
  };
  for (const Basis basis : {Basis::power, Basis::chebyshev}) {
    const std::vector<Polynomial> all = {random_polynomial(basis, 47, s.random), random_polynomial(basis, 46, s.random),
                                         random_polynomial(basis, 5, s.random)};
    const auto x = s.values(s.p->slots(), -1, 1);
    const auto encrypted = s.encrypt(x, 6, 1);
    const auto values = evaluate_all(e, encrypted, all);
    CHECK_EQ(values.size(), all.size());
    const Evaluator together(s.p), apart(s.p);
    evaluate_all(together, s.planned(1, 6, 1), all);
    for (std::size_t i = 0; i < all.size(); ++i) {
      CHECK_EQ(values[i]->level, 6 - all[i].depth());
      s.check(*values[i], x, all[i]);
      evaluate(apart, s.planned(1, 6, 1), all[i]);
    }
    CHECK_LE(products(together), 0.8 * products(apart));
  }
  const auto x = s.planned(1, 6, 1);
  const Polynomial p{Basis::chebyshev, {1, 2}, -1, 1}, wider{Basis::chebyshev, {1, 2}, -1, 2},
      other{Basis::power, {1, 2}};
  CHECK_THROWS(Error, evaluate_all(e, x, {}), "no polynomials");
  CHECK_THROWS(Error, evaluate_all(e, x, {p, wider}), "share no powers");
  CHECK_THROWS(Error, evaluate_all(e, x, {p, other}), "share no powers");
}

TEST(large_degrees) {
  Session s(insecure(8, 45));
  const Evaluator e(s.p, s.keys);
  for (const int degree : {64, 100, 127, 128, 200, 255}) {
    const Polynomial polynomial = random_polynomial(Basis::chebyshev, degree, s.random);
    const auto x = s.values(s.p->slots(), -1, 1);
    s.check(*evaluate(e, s.encrypt(x, 8, 1), polynomial), x, polynomial);
  }
}

TEST(odd_even_and_sparse_polynomials) {
  Session s(insecure(5));
  const Evaluator e(s.p, s.keys);
  std::vector<Polynomial> cases;
  for (const Basis basis : {Basis::power, Basis::chebyshev}) {
    for (const std::size_t parity : {0u, 1u}) {
      Polynomial p = random_polynomial(basis, 27 + static_cast<int>(parity), s.random);
      for (std::size_t i = 0; i < p.coefficients.size(); ++i) {
        if (i % 2 != parity) p.coefficients[i] = 0;
      }
      cases.push_back(p);
    }
    for (const std::size_t only : {1u, 2u, 7u, 8u, 16u, 21u, 31u}) {
      Polynomial p{basis, std::vector<double>(only + 1, 0.0), -1, 1};
      p.coefficients[only] = 0.75;
      cases.push_back(p);
    }
    Polynomial gap{basis, std::vector<double>(30, 0.0), -1, 1};
    gap.coefficients[0] = -0.5;
    gap.coefficients[3] = 1;
    gap.coefficients[29] = 1e-3;
    cases.push_back(gap);
    cases.push_back({basis, {0, 0, 0}, -1, 1});
    cases.push_back({basis, {1e-9, 1e-9, 1e-12}, -1, 1});
  }
  for (const Polynomial& polynomial : cases) {
    const auto x = s.values(s.p->slots(), -1, 1);
    const auto y = evaluate(e, s.encrypt(x, 5, 1), polynomial);
    CHECK_EQ(y->level, 5 - std::max(1, polynomial.depth()));
    s.check(*y, x, polynomial);
  }
}

TEST(domains_are_mapped_for_no_level) {
  Session s(insecure(5));
  const Evaluator e(s.p, s.keys);
  const double domains[][2] = {{-8, 8}, {-2, 6}, {0.25, 4}, {-8, 0}, {-0.125, 0.125}, {3, 3.5}};
  for (const auto& [low, high] : domains) {
    const Polynomial polynomial = random_polynomial(Basis::chebyshev, 15, s.random, low, high);
    const double half = (high - low) / 2;
    const auto x = s.values(2 * s.p->slots(), low, high);
    const double reach = std::max(std::fabs(low), std::fabs(high));
    // A scale that is small enough for the width, as a linear layer after a wide bound leaves it.
    const double scale = s.p->scale(5) / std::max(1.0, half);
    const auto small = s.encrypt(x, 5, reach, {scale, scale / 3});
    CHECK_EQ(levels_needed(*small, polynomial), 4);
    const auto y = evaluate(e, small, polynomial);
    CHECK_EQ(y->level, 1);
    s.check(*y, x, polynomial);
    // Else one more; at depth 4 up to 2^(1/4) of the chain's scale will do.
    const auto plain = s.encrypt(x, 5, reach);
    CHECK_EQ(levels_needed(*plain, polynomial), half > 1.1 ? 5 : 4);
    const auto z = evaluate(e, plain, polynomial);
    CHECK_EQ(z->level, half > 1.1 ? 0 : 1);
    s.check(*z, x, polynomial);
  }
}

TEST(features_of_different_scales) {
  Session s(insecure(4));
  const Evaluator e(s.p, s.keys);
  const double base = s.p->scale(4);
  for (const Basis basis : {Basis::power, Basis::chebyshev}) {
    const Polynomial polynomial = random_polynomial(basis, 7, s.random);
    const auto x = s.values(4 * s.p->slots(), -1, 1);
    const auto y = evaluate(e, s.encrypt(x, 4, 1, {base, base * 0.37, base * 1.3, base / 1024}), polynomial);
    CHECK_EQ(y->level, 1);
    for (const double scale : y->scale) CHECK_LT(std::fabs(scale / s.p->scale(1) - 1), 1e-12);
    s.check(*y, x, polynomial);
    // One scale that is too large takes a level, of all of them.
    const auto large = s.encrypt(x, 4, 1, {base, base * 0.37, base * 1.3, base * 100});
    CHECK_EQ(levels_needed(*large, polynomial), 4);
    const auto z = evaluate(e, large, polynomial);
    CHECK_EQ(z->level, 0);
    s.check(*z, x, polynomial);
  }
}

TEST(every_path_and_any_threads_give_the_same_words) {
  Session s(insecure(5));
  const Evaluator e(s.p, s.keys);
  const auto x = s.values(3 * s.p->slots(), -1, 1);
  const auto encrypted = s.encrypt(x, 5, 1);
  for (const Basis basis : {Basis::power, Basis::chebyshev}) {
    const Polynomial polynomial = random_polynomial(basis, 29, s.random);
    math::set_active_isa(math::Isa::portable);
    math::set_num_threads(1);
    const auto wanted = evaluate(e, encrypted, polynomial);
    for (const math::Isa isa : math::usable_isas()) {
      math::set_active_isa(isa);
      for (const int threads : {1, 2}) {
        math::set_num_threads(threads);
        const auto got = evaluate(e, encrypted, polynomial);
        CHECK_EQ(std::memcmp(got->row(0, 0, 0), wanted->row(0, 0, 0), wanted->bytes()), 0);
        CHECK(got->noise == wanted->noise);
      }
    }
    math::set_num_threads(1);
  }
}

TEST(plans_of_polynomials_are_their_runs) {
  Session s(insecure(7));
  const Evaluator e(s.p, s.keys), dry(s.p);
  for (const int degree : {0, 1, 5, 13, 21, 30, 62, 90}) {
    for (const Basis basis : {Basis::power, Basis::chebyshev}) {
      const Polynomial polynomial = random_polynomial(basis, degree, s.random);
      const auto x = s.values(s.p->slots(), -1, 1);
      e.trace().clear();
      dry.trace().clear();
      const auto y = evaluate(e, s.encrypt(x, 7, 1), polynomial),
                 planned = evaluate(dry, s.planned(1, 7, 1), polynomial);
      CHECK(planned->planned);
      CHECK_EQ(planned->level, y->level);
      CHECK_EQ(planned->bound, y->bound);
      CHECK(planned->scale == y->scale && planned->noise == y->noise);
      CHECK(e.trace().work() == dry.trace().work());
      CHECK_EQ(e.trace().relinearisation(), degree > 1);
    }
  }
}

TEST(unusable_polynomials_are_refused) {
  Session s(insecure(3));
  const Evaluator e(s.p, s.keys), bare(s.p);
  const auto x = s.encrypt(s.values(s.p->slots(), -1, 1), 3, 1);
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {}, -1, 1}), "at least one coefficient");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1, nan}, -1, 1}), "a coefficient is NaN");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1, inf}, -1, 1}), "a coefficient is NaN");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, std::vector<double>(257, 1.0), -1, 1}),
               "degree 256 is above 255");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1}, 1, 1}),
               "domain [1.000000, 1.000000] is empty");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1}, 2, 1}), "is empty");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1}, -inf, 1}), "is empty");
  CHECK_THROWS(std::invalid_argument, evaluate(e, x, {Basis::power, {1}, nan, 1}), "is empty");
  const Polynomial narrow{Basis::chebyshev, {1, 2, 3}, -0.5, 0.5};
  CHECK_THROWS(Error, evaluate(e, x, narrow), "values up to 1.000000 may leave the domain [-0.500000, 0.500000]");
  const Polynomial deep = random_polynomial(Basis::power, 8, s.random);
  CHECK_THROWS(Error, evaluate(e, x, deep), "a polynomial of degree 8 takes 4 levels here and the tensor has 3");
  CHECK_THROWS(Error, evaluate(bare, x, {Basis::power, {0, 0, 1}, -1, 1}), "needs the relinearisation key");
  CHECK_EQ(evaluate(bare, x, {Basis::power, {0.5, 0.25}, -1, 1})->level, 2);  // a line takes no key
}

PRIVTUNER_TEST_MAIN
