// Operations from encryption to decryption, what each refuses, and dry runs beside the runs they stand for.
#include <algorithm>
#include <cmath>
#include <complex>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "privtuner/circuits/polynomial.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/ckks/secret.hpp"

using namespace privtuner::ckks;
namespace gemm = privtuner::gemm;
namespace circuits = privtuner::circuits;

namespace {

using Complex = std::complex<double>;
using Clear = std::vector<Complex>;  // [token][feature]
using Results = std::vector<TensorPtr>;

ParametersPtr insecure(int depth, int scale_bits = 40) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

Matrix matrix_of(std::size_t rows, std::size_t cols, std::vector<double> delta) {
  std::vector<std::int8_t> weights(rows * cols);
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = static_cast<std::int8_t>(static_cast<int>(i * 37 % 255) - 127);
  return {gemm::Weights(weights.data(), rows, cols), std::move(delta)};
}

// Both parties. All slots are in use unless `tokens` says otherwise.
struct Session {
  ParametersPtr p;
  SecretKey secret;
  std::shared_ptr<EvaluationKeys> keys = std::make_shared<EvaluationKeys>();
  std::mt19937_64 random{5};

  explicit Session(ParametersPtr parameters, const std::vector<long long>& steps = {})
      : p(std::move(parameters)), secret(p) {
    keys->parameters = p;
    keys->relinearisation = secret.relinearisation_key();
    for (const long long step : steps) {
      const std::uint32_t element = galois_element(*p, step);
      if (element != 1) keys->galois.emplace(element, secret.galois_key(element));
    }
    keys->galois.emplace(conjugation_element(*p), secret.galois_key(conjugation_element(*p)));
  }

  Clear values(std::size_t tokens, std::size_t features) {
    std::uniform_real_distribution<double> uniform(-0.7, 0.7);
    Clear out(tokens * features);
    for (auto& value : out) value = {uniform(random), uniform(random)};
    return out;
  }

  TensorPtr encrypt(const Clear& clear, std::size_t tokens, int level, double bound = 1,
                    const PublicKey* key = nullptr) {
    const std::size_t features = clear.size() / tokens;
    const auto* parts = reinterpret_cast<const double*>(clear.data());
    const Values view{parts, parts + 1, tokens, features, static_cast<std::ptrdiff_t>(2 * features), 2};
    const double scale = p->scale(std::clamp(level, 0, p->depth()));  // some tests ask for a level that is not there
    const Fresh fresh{level, bound, std::vector<double>(features, scale)};
    return key == nullptr ? secret.encrypt(view, fresh) : privtuner::ckks::encrypt(*key, view, fresh);
  }

  Clear decrypt(const Tensor& x) {
    std::vector<double> re(x.tokens * x.features), im(re.size());
    secret.decrypt(x, re.data(), im.data());
    Clear out(re.size());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = {re[i], im[i]};
    return out;
  }

  // Real and imaginary part of every value are within the predicted error of the worst slot.
  void check(const TensorPtr& x, const std::function<Complex(std::size_t, std::size_t)>& wanted) {
    const Clear got = decrypt(*x);
    const double allowed = x->worst_error();
    CHECK_LT(allowed, 1e-2);
    for (std::size_t t = 0; t < x->tokens; ++t) {
      for (std::size_t f = 0; f < x->features; ++f) {
        const Complex error = got[t * x->features + f] - wanted(t, f);
        CHECK_LE(std::fabs(error.real()), allowed);
        CHECK_LE(std::fabs(error.imag()), allowed);
      }
    }
  }
};

void check_same_plan(const Tensor& planned, const Tensor& real) {
  CHECK(planned.planned && !real.planned);
  CHECK_EQ(planned.tokens, real.tokens);
  CHECK_EQ(planned.features, real.features);
  CHECK_EQ(planned.level, real.level);
  CHECK_EQ(planned.bound, real.bound);
  CHECK(planned.scale == real.scale);
  CHECK(planned.noise == real.noise);
  CHECK_EQ(planned.bytes(), real.bytes());
  CHECK(planned.row(0, 0, 0) == nullptr);
}

}  // namespace

TEST(operations_decrypt_to_their_values) {
  const std::vector<long long> steps{1, -2, 100};
  for (const auto& p : {insecure(1), insecure(3, 35), insecure(6), insecure(4, 47)}) {
    Session s(p, steps);
    const Evaluator e(p, s.keys);
    const std::size_t tokens = p->slots();
    for (int level = 1; level <= p->depth(); ++level) {
      const Clear a = s.values(tokens, 3), b = s.values(tokens, 3), c = s.values(tokens, 1);
      const auto x = s.encrypt(a, tokens, level), y = s.encrypt(b, tokens, level), one = s.encrypt(c, tokens, level);
      const auto A = [&](std::size_t t, std::size_t f) { return a[t % tokens * 3 + f]; };
      const auto B = [&](std::size_t t, std::size_t f) { return b[t * 3 + f]; };
      s.check(x, A);
      s.check(e.add(x, y), [&](auto t, auto f) { return A(t, f) + B(t, f); });
      s.check(e.subtract(one, x), [&](auto t, auto f) { return c[t] - A(t, f); });
      s.check(e.multiply(x, y), [&](auto t, auto f) { return A(t, f) * B(t, f); });
      s.check(e.multiply(one, x), [&](auto t, auto f) { return c[t] * A(t, f); });
      s.check(e.dot(x, y), [&](auto t, auto) { return A(t, 0) * B(t, 0) + A(t, 1) * B(t, 1) + A(t, 2) * B(t, 2); });
      s.check(e.conjugate(x), [&](auto t, auto f) { return std::conj(A(t, f)); });
      const auto rotated = e.rotate(x, steps);
      for (std::size_t i = 0; i < steps.size(); ++i) {
        const auto shift =
            static_cast<std::size_t>((steps[i] + static_cast<long long>(tokens)) % static_cast<long long>(tokens));
        s.check(rotated[i], [&](auto t, auto f) { return A(t + shift, f); });
      }
      s.check(e.multiply_constant(x, {0.5, -1, 0.001}), [&](auto t, auto f) {
        return A(t, f) * (f == 0 ? 0.5 : f == 1 ? -1 : 0.001);
      });
      s.check(e.add_constant(x, {-0.25}), [&](auto t, auto f) { return A(t, f) - 0.25; });
      const auto* parts = reinterpret_cast<const double*>(b.data());
      s.check(e.multiply_plain(x, {parts, parts + 1, tokens, 3, 6, 2}),
              [&](auto t, auto f) { return A(t, f) * B(t, f); });
      s.check(e.multiply_plain(x, {parts, nullptr, tokens, 1, 6, 2}),
              [&](auto t, auto f) { return A(t, f) * B(t, 0).real(); });
      s.check(e.linear_combination({x, y}, {{0.5}, {-0.25}}, {0.125}),
              [&](auto t, auto f) { return 0.5 * A(t, f) - 0.25 * B(t, f) + 0.125; });
      if (p->wish().scale_bits <= 42) {  // the products' scales need seven bits more at level 0
        const Matrix matrix = matrix_of(4, 3, {0.001, 0.002, 0.003, 0.004});
        s.check(e.linear(x, matrix, gemm::Operand::plain), [&](auto t, auto r) {
          Complex sum = 0;
          for (std::size_t j = 0; j < 3; ++j) sum += A(t, j) * (matrix.weights().at(r, j) * matrix.delta()[r]);
          return sum;
        });
      }
      s.check(e.drop(x, 0), A);
      if (level >= 2) {
        // Tensors of two levels meet at the lower.
        const auto low = e.multiply(y, one);
        s.check(e.add(x, low), [&](auto t, auto f) { return A(t, f) + B(t, f) * c[t]; });
        s.check(e.subtract(low, one), [&](auto t, auto f) { return B(t, f) * c[t] - c[t]; });
        const auto product = e.multiply(x, low);
        CHECK_EQ(product->level, level - 2);
        CHECK(std::fabs(product->scale[0] / p->scale(level - 2) - 1) < 1e-9);
        s.check(product, [&](auto t, auto f) { return A(t, f) * B(t, f) * c[t]; });
      }
    }
  }
}

TEST(a_public_key_encrypts_too) {
  const auto p = insecure(2);
  Session s(p);
  const auto key = s.secret.public_key();
  for (const std::size_t tokens : {std::size_t{1}, std::size_t{5}, p->slots()}) {
    for (int level = 0; level <= 2; ++level) {
      const Clear a = s.values(tokens, 2);
      const auto x = s.encrypt(a, tokens, level, 1, key.get());
      CHECK(!x->seed);
      s.check(x, [&](auto t, auto f) { return a[t * 2 + f]; });
    }
  }
}

TEST(slots_that_are_not_in_use_hold_zero_and_all_of_them_are_summed) {
  const auto p = insecure(1);
  std::vector<long long> steps;
  for (std::size_t step = 1; step < p->slots(); step *= 2) steps.push_back(static_cast<long long>(step));
  Session s(p, steps);
  const Evaluator e(p, s.keys);
  const Clear a = s.values(9, 2);
  const auto sum = e.sum_slots(s.encrypt(a, 9, 1));
  s.check(sum, [&](auto, auto f) {
    Complex total = 0;
    for (std::size_t t = 0; t < 9; ++t) total += a[t * 2 + f];
    return total;
  });
}

TEST(a_value_beyond_the_bound_is_told) {
  const auto p = insecure(2);
  Session s(p);
  const Evaluator e(p, s.keys);
  const auto x = s.encrypt(Clear(3, 0.9), 3, 2);
  CHECK_THROWS(Error, s.decrypt(*e.assume(x, 0.5)), "beyond the tensor's bound of 0.500000");
  CHECK_THROWS(Error, s.decrypt(*e.multiply(e.assume(x, 0.5), x)), "beyond the tensor's bound");
  s.decrypt(*e.assume(x, 0.9));
  Session other(p);
  CHECK_THROWS(Error, other.decrypt(*x), "beyond the tensor's bound");
}

TEST(encryption_refuses) {
  const auto p = insecure(1);
  Session s(p);
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  CHECK_THROWS(Error, s.encrypt(Clear(p->slots() + 1, 0.5), p->slots() + 1, 1), "513 tokens do not fit the 512 slots");
  CHECK_THROWS(Error, s.encrypt({1.5}, 1, 1), "above the declared bound 1.000000");
  CHECK_THROWS(Error, s.encrypt({Complex(0.9, 0.9)}, 1, 1), "above the declared bound 1.000000");
  CHECK_THROWS(Error, s.encrypt({nan}, 1, 1), "NaN or infinity");
  CHECK_THROWS(Error, s.encrypt({Complex(0, inf)}, 1, 1), "NaN or infinity");
  CHECK_THROWS(Error, s.encrypt({0.5}, 1, 2), "level 2 is outside [0, 1]");
  CHECK_THROWS(Error, s.encrypt({0.5}, 1, -1), "level -1 is outside [0, 1]");
  CHECK_THROWS(Error, s.encrypt(Clear(p->slots(), 0.9e9), p->slots(), 1, 1e9), "pass 2^62; encrypt smaller values");
  const auto key = s.secret.public_key();
  CHECK_THROWS(Error, s.encrypt({1.5}, 1, 1, 1, key.get()), "above the declared bound");
  CHECK_THROWS(Error, s.secret.galois_key(4), "4 is no automorphism");
  CHECK_THROWS(Error, s.secret.galois_key(2049), "2049 is no automorphism");
}

TEST(operations_refuse) {
  const auto p = insecure(2), other = insecure(3);
  Session s(p), stranger(other);
  const Evaluator e(p, s.keys), bare(p);
  const auto x = s.encrypt(Clear(10, 0.5), 5, 2), wide = s.encrypt(Clear(15, 0.5), 5, 2);
  const auto low = s.encrypt(Clear(10, 0.5), 5, 0), short_one = s.encrypt(Clear(8, 0.5), 4, 2);
  const auto alien = stranger.encrypt(Clear(10, 0.5), 5, 2);
  const auto planned = planned_tensor(p, 5, 2, {2, 1, {p->scale(2), p->scale(2)}}, false, nullptr);
  const double nan = std::numeric_limits<double>::quiet_NaN();

  CHECK_THROWS(Error, Evaluator(p, stranger.keys), "evaluation keys of " + other->name() + " do not fit " + p->name());
  CHECK_THROWS(Error, e.add(x, alien), "does not fit an evaluator of " + p->name());
  CHECK_THROWS(Error, e.negate(alien), "does not fit an evaluator of");
  CHECK_THROWS(Error, e.rotate(alien, {1}), "does not fit an evaluator of");
  CHECK_THROWS(Error, s.decrypt(*alien), "cannot be decrypted with a key of " + p->name());
  CHECK_THROWS(Error, s.decrypt(*planned), "a planned tensor holds no ciphertext");
  CHECK_THROWS(Error, e.add(x, planned), "a planned tensor cannot be combined with an encrypted one");
  CHECK_THROWS(Error, e.add(x, wide), "shapes (5, 2) and (5, 3) cannot be combined");
  CHECK_THROWS(Error, e.multiply(x, short_one), "shapes (5, 2) and (4, 2) cannot be combined");
  CHECK_THROWS(Error, e.dot(x, e.select(x, 0, 1)), "a dot product of 2 and 1 features");
  CHECK_THROWS(Error, e.concatenate({x, short_one}), "tensors of 5 and 4 tokens cannot be concatenated");
  CHECK_THROWS(Error, e.concatenate({}), "no tensors to concatenate");
  CHECK_THROWS(Error, e.select(x, 1, 1), "features [1, 1) of 2");
  CHECK_THROWS(Error, e.select(x, 1, 3), "features [1, 3) of 2");
  CHECK_THROWS(Error, e.add_constant(x, {1, 2, 3}), "3 constants for 2 features");
  CHECK_THROWS(Error, e.add_constant(x, {nan}), "constants hold NaN or infinity");
  CHECK_THROWS(Error, e.multiply_constant(x, {nan}), "weights hold NaN or infinity");
  CHECK_THROWS(Error, e.multiply_constant(low, {2}), "needs a level and (5, 2) at level 0 has none left");
  CHECK_THROWS(Error, e.linear_combination({}, {}, {}), "0 rows of weights for 0 tensors");
  CHECK_THROWS(Error, e.linear_combination({x}, {{1}, {2}}, {}), "2 rows of weights for 1 tensors");
  CHECK_THROWS(Error, e.linear_combination({x}, {{1}}, {nan}), "constants hold NaN or infinity");
  CHECK_THROWS(Error, e.multiply(low, low), "a product needs a level");
  CHECK_THROWS(Error, e.rescale(low), "a tensor at level 0 cannot be rescaled");
  CHECK_THROWS(Error, e.drop(low, 1), "a tensor at level 0 cannot be brought to level 1");
  CHECK_THROWS(Error, e.drop(x, -1), "a tensor at level 2 cannot be brought to level -1");
  CHECK_THROWS(Error, e.bring(x, 2, {1e12}), "cannot change its scale at level 2");
  CHECK_THROWS(Error, e.bring(x, 1, {1e3}), "is too large to become");
  CHECK_THROWS(Error, bare.multiply(x, x), "needs the relinearisation key");
  CHECK_THROWS(Error, bare.rotate(x, {1}), "a rotation by 1 needs its key");
  CHECK_THROWS(Error, e.rotate(x, {-3}), "a rotation by 509 needs its key");
  CHECK_THROWS(Error, bare.conjugate(x), "conjugation needs its key");
  CHECK_THROWS(Error, e.assume(x, 0), "bound 0.000000 is not a positive number");
  CHECK_THROWS(Error, e.assume(x, nan), "is not a positive number");
  CHECK_THROWS(Error, e.assume(x, 1, 0), "error 0.000000 is not a positive number");
  CHECK_THROWS(Error, e.assume(x, 1, nan), "is not a positive number");
  CHECK_THROWS(Error, e.reinterpret(x, 0, 1), "values cannot be read times");

  const double clear[10] = {};
  CHECK_THROWS(Error, e.multiply_plain(low, {clear, nullptr, 5, 2, 2, 1}), "has none left");
  CHECK_THROWS(Error, e.multiply_plain(x, {clear, nullptr, 4, 2, 2, 1}), "clear values of shape (4, 2) do not fit");
  CHECK_THROWS(Error, e.multiply_plain(x, {clear, nullptr, 2, 5, 2, 1}), "clear values of shape (2, 5) do not fit");
  const double wrong[2] = {nan, 1};
  CHECK_THROWS(Error, e.multiply_plain(e.select(x, 0, 1), {wrong, nullptr, 5, 1, 0, 1}), "clear values hold NaN");

  const Matrix square = matrix_of(3, 2, {1, 2, 3});
  CHECK_THROWS(Error, e.linear(wide, square, gemm::Operand::plain), "a matrix of shape (3, 2) cannot be applied");
  CHECK_THROWS(Error, e.linear(x, square, gemm::Operand::transpose), "a matrix of shape (2, 3) cannot be applied");
  const auto skewed = e.linear(x, matrix_of(2, 2, {0.1, 0.2}), gemm::Operand::plain);
  CHECK_THROWS(Error, e.linear(skewed, square, gemm::Operand::plain), "the input's scales do not agree");
  CHECK_THROWS(Error, e.linear(wide, square, gemm::Operand::transpose), "transposed matrix's row scales");
  CHECK_THROWS(Error, e.dot(skewed, x), "the features of a dot product have different scales");
  CHECK_THROWS(Error, e.add(skewed, x), "do not agree at level 2; multiply one of them by 1.0 first");
  CHECK_THROWS(Error, e.add(e.drop(skewed, 1), e.select(x, 0, 1)), "do not agree at level 1");
  CHECK_THROWS(std::invalid_argument, matrix_of(2, 2, {1}), "1 row scales for 2 rows");
  CHECK_THROWS(std::invalid_argument, matrix_of(2, 2, {1, 0}), "the scale of row 1 is not a positive number");
  CHECK_THROWS(std::invalid_argument, matrix_of(2, 2, {1, nan}), "is not a positive number");
}

TEST(a_dry_run_is_the_run_without_the_words) {
  const std::vector<long long> steps{1, 2, 4, 8, 16, 32, 64, 128, 256, 3};
  const auto p = insecure(5);
  Session s(p, steps);
  const auto key = s.secret.public_key();
  const Matrix matrix = matrix_of(4, 3, {0.01, 0.02, 0.03, 0.04}), even = matrix_of(3, 4, {0.5, 0.5, 0.5});
  const std::vector<double> clear(6 * 3, 0.3);
  const Values values{clear.data(), nullptr, 6, 3, 3, 1};
  const circuits::Polynomial quintic{circuits::Basis::power, {0.1, 0.2, -0.3, 0.4, 0.5, -0.1}, -1, 1};
  const circuits::Polynomial cosines{circuits::Basis::chebyshev, {0.1, 0.2, 0, 0.4, 0, 0, 0.2, 0.3}, -3, 2};
  using Operation = std::function<Results(const Evaluator&, const TensorPtr&, const TensorPtr&, const TensorPtr&)>;
  // x of three features at the top, y one level below, z one feature at the top.
  const std::vector<Operation> operations{
      [](auto& e, auto x, auto, auto z) { return Results{e.add(x, z), e.subtract(z, x)}; },
      [](auto& e, auto x, auto y, auto) {
        return Results{e.add(x, e.multiply(y, y)), e.subtract(e.multiply(y, y), x)};
      },
      [](auto& e, auto x, auto, auto) { return Results{e.negate(x), e.add_constant(x, {1, 2, 3})}; },
      [](auto& e, auto x, auto y, auto z) { return Results{e.multiply(x, y), e.multiply(z, x), e.multiply(x, x)}; },
      [](auto& e, auto x, auto y, auto) { return Results{e.dot(x, y), e.dot(x, x), e.sum_features(x)}; },
      [](auto& e, auto x, auto y, auto z) { return Results{e.concatenate({x, y, z}), e.select(x, 1, 3)}; },
      [](auto& e, auto x, auto, auto) { return Results{e.multiply_constant(x, {0.5, 0, -7})}; },
      [&](auto& e, auto x, auto, auto) { return Results{e.multiply_plain(x, values)}; },
      [&](auto& e, auto x, auto, auto) { return Results{e.linear(x, matrix, gemm::Operand::plain)}; },
      [&](auto& e, auto x, auto, auto) { return Results{e.linear(x, even, gemm::Operand::transpose)}; },
      [](auto& e, auto x, auto y, auto z) { return Results{e.linear_combination({x, y, z}, {{1}, {2}, {3}}, {0.5})}; },
      [](auto& e, auto x, auto, auto) { return Results{e.rescale(x), e.drop(x, 1), e.bring(x, 2, {0x1p39})}; },
      [&](auto& e, auto x, auto, auto) { return e.rotate(x, steps); },
      [](auto& e, auto x, auto, auto z) { return Results{e.conjugate(x), e.sum_slots(z), e.rotate(x, {0})[0]}; },
      [](auto& e, auto x, auto, auto) { return Results{e.assume(x, 0.9), e.reinterpret(x, 3, 3)}; },
      [&](auto& e, auto x, auto, auto) { return Results{circuits::evaluate(e, x, quintic)}; },
      [&](auto& e, auto, auto y, auto) { return Results{circuits::evaluate(e, y, cosines)}; },
      [&](auto& e, auto x, auto, auto) {
        return Results{circuits::evaluate(e, e.assume(e.linear(x, matrix, gemm::Operand::plain), 1), quintic)};
      },
  };
  const auto fresh = [&](std::size_t features, int level) {
    return Fresh{level, 1, std::vector<double>(features, p->scale(level))};
  };
  for (const PublicKey* with : {static_cast<const PublicKey*>(nullptr), key.get()}) {
    const Evaluator real(p, s.keys), dry(p);
    const auto plan = [&](std::size_t features, int level) {
      return planned_tensor(p, 6, features, fresh(features, level), with != nullptr, dry.ledger());
    };
    const auto make = [&](std::size_t features, int level) {
      return s.encrypt(s.values(6, features), 6, level, 1, with);
    };
    const TensorPtr x = make(3, 5), y = make(3, 4), z = make(1, 5);
    const TensorPtr px = plan(3, 5), py = plan(3, 4), pz = plan(1, 5);
    check_same_plan(*px, *x);
    check_same_plan(*py, *y);
    for (const Operation& operation : operations) {
      real.trace().clear();
      dry.trace().clear();
      real.ledger()->reset_peak();
      dry.ledger()->reset_peak();
      const std::size_t real_before = real.ledger()->live(), dry_before = dry.ledger()->live();
      {
        const Results wanted = operation(real, x, y, z), planned = operation(dry, px, py, pz);
        CHECK_EQ(planned.size(), wanted.size());
        for (std::size_t i = 0; i < wanted.size(); ++i) check_same_plan(*planned[i], *wanted[i]);
        CHECK(real.trace().work() == dry.trace().work());
        CHECK(real.trace().galois() == dry.trace().galois());
        CHECK_EQ(real.trace().relinearisation(), dry.trace().relinearisation());
        CHECK_EQ(real.ledger()->live() - real_before, dry.ledger()->live() - dry_before);
      }
      // Features of a polynomial may be at work at the same time in the run, and are not in the plan.
      CHECK_LE(dry.ledger()->peak() - dry_before, real.ledger()->peak() - real_before);
      CHECK_EQ(real.ledger()->live(), real_before);
      CHECK_EQ(dry.ledger()->live(), dry_before);
    }
  }
}

TEST(the_ledger_counts_tensors_that_are_alive) {
  const auto p = insecure(2);
  const Evaluator e(p);
  const std::size_t one = 2 * 3 * p->n() * 8;
  {
    const auto x = planned_tensor(p, 4, 5, {2, 1, std::vector<double>(5, p->scale(2))}, false, e.ledger());
    CHECK_EQ(e.ledger()->live(), 5 * one);
    const auto view = e.select(x, 1, 2);
    CHECK_EQ(e.ledger()->live(), 5 * one);
    {
      const auto sum = e.add(x, x);
    }
    CHECK_EQ(e.ledger()->live(), 5 * one);
    CHECK_EQ(e.ledger()->peak(), 10 * one);
  }
  CHECK_EQ(e.ledger()->live(), std::size_t{0});
  e.ledger()->reset_peak();
  CHECK_EQ(e.ledger()->peak(), std::size_t{0});
}

PRIVTUNER_TEST_MAIN
