// The evaluator's words against schoolbook arithmetic: rows by the definition, key switches with keys of no error under
// a secret of this test's own, so that every phase is known but for a rounding whose size is known too.
#include "privtuner/ckks/evaluator.hpp"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"
#include "privtuner/ckks/plaintext.hpp"
#include "privtuner/math/parallel.hpp"

using namespace privtuner::ckks;
namespace math = privtuner::math;
namespace gemm = privtuner::gemm;
using math::Isa;

namespace {

__extension__ typedef __int128 Int128;
__extension__ typedef unsigned __int128 Uint128;
using Words = math::AlignedVector<std::uint64_t>;
using Rows = std::vector<Words>;  // one a prime

constexpr int kWeight = 16;  // coefficients of the secret that are not zero

ParametersPtr insecure(int depth, int scale_bits, int log_n = 10) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.log_n = log_n;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

// One digit and several of them, the last of them short; scales at both ends.
const std::vector<ParametersPtr>& sets() {
  static const std::vector<ParametersPtr> all{insecure(1, 25), insecure(2, 49), insecure(4, 40), insecure(7, 30)};
  return all;
}

std::mt19937_64& generator() {
  static std::mt19937_64 random(11);
  return random;
}

std::shared_ptr<Tensor> random_tensor(const ParametersPtr& p, std::size_t features, int level, std::size_t tokens = 7) {
  auto x = std::make_shared<Tensor>(p, tokens, features, level, false, nullptr);
  x->bound = 1;
  for (std::size_t f = 0; f < features; ++f) {
    x->scale[f] = p->scale(level);
    x->noise[f] = 3;
    for (int c = 0; c < 2; ++c) {
      for (std::size_t i = 0; i < x->limbs(); ++i) {
        for (std::size_t k = 0; k < p->n(); ++k) {
          // The ends of the range come up in a sixteenth of the words.
          const std::uint64_t q = p->prime(i).q, word = generator()();
          x->row(f, c, i)[k] = word % 32 == 0 ? 0 : word % 32 == 1 ? q - 1 : word % q;
        }
      }
    }
  }
  return x;
}

const math::Modulus& modulus(const Parameters& p, std::size_t i) { return p.prime(i).row.modulus(); }

std::uint64_t product_mod(std::uint64_t a, std::uint64_t b, std::uint64_t q) {
  return static_cast<std::uint64_t>(Uint128{a} * b % q);
}

std::uint64_t residue(double whole, std::uint64_t q) {
  const auto rest = static_cast<std::int64_t>(static_cast<Int128>(whole) % static_cast<Int128>(q));
  return static_cast<std::uint64_t>(rest < 0 ? rest + static_cast<std::int64_t>(q) : rest);
}

Words coefficients(const Parameters& p, std::size_t prime, const std::uint64_t* row) {
  Words out(row, row + p.n());
  p.prime(prime).ntt.inverse(out.data(), Isa::portable);
  return out;
}

// Checks out = (x - r) / q_last for the r in [-q_last / 2, q_last / 2] that is congruent to x; rows by limb.
template <class Row>
void check_divided(const Parameters& p, const Rows& x, Row out) {
  const std::size_t last = x.size() - 1;
  const std::uint64_t q_last = p.prime(last).q;
  const Words top = coefficients(p, last, x[last].data());
  for (std::size_t i = 0; i < last; ++i) {
    const math::Modulus& q = modulus(p, i);
    const std::uint64_t inverse = q.inv(q.reduce(q_last));
    const Words above = coefficients(p, i, x[i].data()), below = coefficients(p, i, out(i));
    for (std::size_t k = 0; k < p.n(); ++k) {
      std::uint64_t rest = q.reduce(top[k]);
      if (top[k] > q_last / 2) rest = q.sub(rest, q.reduce(q_last));
      CHECK_EQ(below[k], product_mod(q.sub(above[k], rest), inverse, q.q));
    }
  }
}

// A ternary secret and keys for it without error.
struct Own {
  ParametersPtr p;
  std::vector<int> secret;

  explicit Own(ParametersPtr parameters) : p(std::move(parameters)), secret(p->n()) {
    for (int placed = 0; placed < kWeight;) {
      int& at = secret[generator()() % p->n()];
      if (at != 0) continue;
      at = generator()() % 2 == 0 ? 1 : -1;
      ++placed;
    }
  }

  // s(X^element), NTT domain.
  Words row(std::size_t prime, std::uint32_t element = 1) const {
    const std::size_t n = p->n();
    Words out(n);
    for (std::size_t k = 0; k < n; ++k) {
      const std::size_t to = k * std::size_t{element} % (2 * n);
      const int value = to < n ? secret[k] : -secret[k];
      out[to % n] = value < 0 ? p->prime(prime).q - 1 : static_cast<std::uint64_t>(value);
    }
    p->prime(prime).ntt.forward(out.data(), Isa::portable);
    return out;
  }

  std::shared_ptr<const SwitchingKey> key(const Rows& source, std::uint32_t target) const {
    SeedBytes seed;
    for (auto& byte : seed) byte = static_cast<std::uint8_t>(generator()());
    auto key = std::make_shared<SwitchingKey>(p, seed);
    for (std::size_t i = 0; i < p->prime_count(); ++i) {
      const math::Modulus& q = modulus(*p, i);
      const Words s = row(i, target);
      for (std::size_t d = 0; d < key->digits(); ++d) {
        const bool inside = i < p->max_limbs() && i / p->digit_limbs() == d;
        for (std::size_t k = 0; k < p->n(); ++k) {
          std::uint64_t word = q.neg(q.mul(key->row(d, 1, i)[k], s[k]));
          if (inside) word = q.add(word, q.mul(p->special_product(i), source[i][k]));
          key->row(d, 0, i)[k] = word;
        }
      }
    }
    return key;
  }

  std::shared_ptr<const EvaluationKeys> keys(const std::vector<std::uint32_t>& elements) const {
    auto keys = std::make_shared<EvaluationKeys>();
    keys->parameters = p;
    Rows plain, square;
    for (std::size_t i = 0; i < p->max_limbs(); ++i) {
      plain.push_back(row(i));
      square.push_back(plain[i]);
      for (auto& word : square[i]) word = product_mod(word, word, p->prime(i).q);
    }
    keys->relinearisation = key(square, 1);
    for (const std::uint32_t element : elements) {
      std::uint64_t inverse = 1;
      while (inverse * element % (2 * p->n()) != 1) inverse += 2;
      keys->galois.emplace(element, GaloisKey{element, key(plain, static_cast<std::uint32_t>(inverse))});
    }
    return keys;
  }

  // c0 + c1 s, NTT domain.
  Rows phase(const Tensor& x, std::size_t f) const {
    Rows out;
    for (std::size_t i = 0; i < x.limbs(); ++i) {
      const math::Modulus& q = modulus(*p, i);
      Words s = row(i);
      for (std::size_t k = 0; k < p->n(); ++k) s[k] = q.add(x.row(f, 0, i)[k], q.mul(x.row(f, 1, i)[k], s[k]));
      out.push_back(std::move(s));
    }
    return out;
  }
};

// Every coefficient of `rows` (NTT domain) is one whole number of at most `largest`, the same modulo every prime.
void check_small(const Parameters& p, const Rows& rows, long double largest) {
  Rows c;
  for (std::size_t i = 0; i < rows.size(); ++i) c.push_back(coefficients(p, i, rows[i].data()));
  const auto centred = [&](std::uint64_t word, std::uint64_t q) {
    return static_cast<Int128>(word) - (word > q / 2 ? static_cast<Int128>(q) : 0);
  };
  for (std::size_t k = 0; k < p.n(); ++k) {
    const std::uint64_t q0 = p.prime(0).q;
    Int128 value = centred(c[0][k], q0);
    if (rows.size() > 1) {  // two limbs say a number below 2^79
      const math::Modulus& q1 = modulus(p, 1);
      const std::uint64_t rest = q1.sub(c[1][k], q1.reduce_signed(static_cast<std::int64_t>(value)));
      value += centred(q1.mul(rest, q1.inv(q1.reduce(q0))), q1.q) * static_cast<Int128>(q0);
    }
    CHECK_LE(std::fabs(static_cast<long double>(value)), largest);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto q = static_cast<Int128>(p.prime(i).q);
      CHECK_EQ(static_cast<std::uint64_t>((value % q + q) % q), c[i][k]);
    }
  }
}

Rows gather(const Parameters& p, const Tensor& x, std::size_t f, int c) {
  Rows out;
  for (std::size_t i = 0; i < x.limbs(); ++i) out.emplace_back(x.row(f, c, i), x.row(f, c, i) + p.n());
  return out;
}

template <class Word>
void each_word(const Tensor& out, Word wanted) {
  for (std::size_t f = 0; f < out.features; ++f) {
    for (int c = 0; c < 2; ++c) {
      for (std::size_t i = 0; i < out.limbs(); ++i) {
        const std::uint64_t q = out.parameters->prime(i).q;
        for (std::size_t k = 0; k < out.parameters->n(); ++k) CHECK_EQ(out.row(f, c, i)[k], wanted(f, c, i, k, q));
      }
    }
  }
}

}  // namespace

TEST(sums_word_by_word) {
  for (const auto& p : sets()) {
    const Evaluator evaluator(p);
    const auto x = random_tensor(p, 3, 1), y = random_tensor(p, 3, 1), one = random_tensor(p, 1, 1);
    const auto at = [](const Tensor& t, std::size_t f, int c, std::size_t i, std::size_t k) {
      return t.row(t.features == 1 ? 0 : f, c, i)[k];
    };
    each_word(*evaluator.add(x, y),
              [&](auto f, int c, auto i, auto k, auto q) { return (x->row(f, c, i)[k] + y->row(f, c, i)[k]) % q; });
    each_word(*evaluator.subtract(x, one), [&](auto f, int c, auto i, auto k, auto q) {
      return (at(*x, f, c, i, k) + q - at(*one, f, c, i, k)) % q;
    });
    each_word(*evaluator.subtract(one, x), [&](auto f, int c, auto i, auto k, auto q) {
      return (at(*one, f, c, i, k) + q - at(*x, f, c, i, k)) % q;
    });
    each_word(*evaluator.negate(x),
              [&](auto f, int c, auto i, auto k, auto q) { return (q - x->row(f, c, i)[k]) % q; });
    each_word(*evaluator.add_constant(x, {0.5, -2, 0}), [&](auto f, int c, auto i, auto k, auto q) {
      const double constants[] = {0.5, -2, 0};
      const std::uint64_t constant = residue(std::nearbyint(constants[f] * x->scale[f]), q);
      return (x->row(f, c, i)[k] + (c == 0 ? constant : 0)) % q;  // a constant is the same in every place of the NTT
    });
    const auto many = random_tensor(p, 67, 0);  // more than one call of a row operation takes
    each_word(*evaluator.sum_features(many), [&](auto, int c, auto i, auto k, auto q) {
      Uint128 sum = 0;
      for (std::size_t g = 0; g < many->features; ++g) sum += many->row(g, c, i)[k];
      return static_cast<std::uint64_t>(sum % q);
    });
    const auto joined = evaluator.concatenate({x, evaluator.drop(x, 0), one});
    CHECK_EQ(joined->level, 0);
    CHECK_EQ(joined->features, std::size_t{7});
    each_word(*joined, [&](auto f, int c, auto i, auto k, auto) {
      return f < 6 ? x->row(f % 3, c, i)[k] : one->row(0, c, i)[k];
    });
    each_word(*evaluator.select(x, 1, 3), [&](auto f, int c, auto i, auto k, auto) { return x->row(f + 1, c, i)[k]; });
  }
}

TEST(matrix_products_word_by_word) {
  for (const auto& p : sets()) {
    const Evaluator evaluator(p);
    constexpr std::size_t kRows = 35, kCols = 9;
    std::vector<std::int8_t> narrow(kRows * kCols);
    std::vector<std::int16_t> wide(kRows * kCols);
    for (std::size_t i = 0; i < narrow.size(); ++i) {
      narrow[i] = static_cast<std::int8_t>(static_cast<int>(generator()() % 255) - 127);
      wide[i] = static_cast<std::int16_t>(static_cast<int>(generator()() % 65279) - 32639);
    }
    const Matrix matrices[] = {{gemm::Weights(narrow.data(), kRows, kCols), std::vector<double>(kRows, 0.25)},
                               {gemm::Weights(wide.data(), kRows, kCols), std::vector<double>(kRows, 0.25)}};
    for (const Matrix& matrix : matrices) {
      for (const auto operand : {gemm::Operand::plain, gemm::Operand::transpose}) {
        const bool plain = operand == gemm::Operand::plain;
        const auto x = random_tensor(p, plain ? kCols : kRows, 1);
        const auto y = evaluator.linear(x, matrix, operand);
        CHECK_EQ(y->features, plain ? kRows : kCols);
        CHECK_EQ(y->level, 1);
        for (const double scale : y->scale) CHECK_EQ(scale, x->scale[0] / 0.25);
        each_word(*y, [&](auto r, int c, auto i, auto k, auto q) {
          Int128 sum = 0;
          for (std::size_t j = 0; j < x->features; ++j) {
            sum += static_cast<Int128>(plain ? matrix.weights().at(r, j) : matrix.weights().at(j, r)) *
                   static_cast<Int128>(x->row(j, c, i)[k]);
          }
          return static_cast<std::uint64_t>((sum % static_cast<Int128>(q) + static_cast<Int128>(q)) %
                                            static_cast<Int128>(q));
        });
      }
    }
  }
}

TEST(divisions_by_a_prime_are_exact) {
  for (const auto& p : sets()) {
    const Evaluator evaluator(p);
    const int level = p->depth();
    const auto x = random_tensor(p, 2, level), y = random_tensor(p, 1, level);
    const double q_last = static_cast<double>(p->prime(static_cast<std::size_t>(level)).q);
    const double raw = p->scale(level - 1) * q_last;
    const auto check = [&](const TensorPtr& out, auto word) {
      CHECK_EQ(out->level, level - 1);
      for (std::size_t f = 0; f < out->features; ++f) {
        for (int c = 0; c < 2; ++c) {
          Rows rows;
          for (std::size_t i = 0; i <= static_cast<std::size_t>(level); ++i) {
            rows.emplace_back(p->n());
            for (std::size_t k = 0; k < p->n(); ++k) rows[i][k] = word(f, c, i, k, p->prime(i).q);
          }
          check_divided(*p, rows, [&](std::size_t i) { return out->row(f, c, i); });
        }
      }
    };
    check(evaluator.rescale(x), [&](auto f, int c, auto i, auto k, auto) { return x->row(f, c, i)[k]; });
    check(evaluator.multiply_constant(x, {0.7, -3}), [&](auto f, int c, auto i, auto k, auto q) {
      return product_mod(x->row(f, c, i)[k], residue(std::nearbyint((f == 0 ? 0.7 : -3) * (raw / x->scale[f])), q), q);
    });
    const double scale = p->scale(level - 1) * 0.8;
    check(evaluator.bring(x, level - 1, {scale}), [&](auto f, int c, auto i, auto k, auto q) {
      return product_mod(x->row(f, c, i)[k], residue(std::nearbyint(scale * q_last / x->scale[f]), q), q);
    });
    check(evaluator.linear_combination({x, y}, {{2, -0.5}, {0.125}}, {0.3}),
          [&](auto f, int c, auto i, auto k, auto q) {
            const double factor = raw / p->scale(level);
            const Uint128 sum =
                Uint128{product_mod(x->row(f, c, i)[k], residue(std::nearbyint((f == 0 ? 2 : -0.5) * factor), q), q)} +
                product_mod(y->row(0, c, i)[k], residue(std::nearbyint(0.125 * factor), q), q) +
                (c == 0 ? residue(std::nearbyint(0.3 * raw), q) : 0);
            return static_cast<std::uint64_t>(sum % q);
          });
    // Clear values: the rows of their encoding.
    std::vector<double> re(2 * 7), im(2 * 7);
    for (std::size_t t = 0; t < re.size(); ++t) {
      re[t] = std::sin(static_cast<double>(t));
      im[t] = std::cos(static_cast<double>(3 * t));
    }
    const Values values{re.data(), im.data(), 7, 2, 2, 1};
    std::vector<std::vector<Words>> plain(2);
    for (std::size_t f = 0; f < 2; ++f) {
      std::vector<std::int64_t> encoded(p->n());
      encode(*p, values, f, raw / x->scale[f], encoded.data());
      for (std::size_t i = 0; i <= static_cast<std::size_t>(level); ++i) {
        Words row(p->n());
        for (std::size_t k = 0; k < p->n(); ++k) row[k] = residue(static_cast<double>(encoded[k]), p->prime(i).q);
        p->prime(i).ntt.forward(row.data(), Isa::portable);
        plain[f].push_back(std::move(row));
      }
    }
    check(evaluator.multiply_plain(x, values),
          [&](auto f, int c, auto i, auto k, auto q) { return product_mod(x->row(f, c, i)[k], plain[f][i][k], q); });
  }
}

TEST(the_halves_of_a_prime_round_away_from_neither_side) {
  // Coefficients next to q / 2, where the representative changes sign.
  const auto p = insecure(2, 40);
  const auto x = random_tensor(p, 1, 2);
  const std::uint64_t half = p->prime(2).q / 2;
  for (int c = 0; c < 2; ++c) {
    for (std::size_t k = 0; k < p->n(); ++k) x->row(0, c, 2)[k] = half - 4096 + 8 * k;
    x->row(0, c, 2)[7] = 0;
    x->row(0, c, 2)[8] = p->prime(2).q - 1;
    p->prime(2).ntt.forward(x->row(0, c, 2), Isa::portable);
  }
  const auto out = Evaluator(p).rescale(x);
  for (int c = 0; c < 2; ++c) check_divided(*p, gather(*p, *x, 0, c), [&](std::size_t i) { return out->row(0, c, i); });
}

TEST(products_are_what_their_phases_multiply_to) {
  for (const auto& p : sets()) {
    const Own own(p);
    const Evaluator evaluator(p, own.keys({}));
    for (int level = 1; level <= p->depth(); ++level) {
      const auto x = random_tensor(p, 3, level), y = random_tensor(p, 3, level), one = random_tensor(p, 1, level);
      const std::uint64_t q_last = p->prime(p->limbs(level) - 1).q;
      // P q_last out = P product - (r0 + r1 s) with |r| <= P q_last / 2 in every coefficient: what is left after
      // q_last out is subtracted is at most q_last (1 + weight) / 2, plus the doubt of 2^-45 at the ends.
      const long double largest = static_cast<long double>(q_last) * (1 + kWeight) / 2 * (1 + 0x1p-40L);
      const auto check = [&](const TensorPtr& out, std::size_t f, Rows wanted) {
        CHECK_EQ(out->level, level - 1);
        const Rows phase = own.phase(*out, f);
        wanted.resize(phase.size());
        for (std::size_t i = 0; i < phase.size(); ++i) {
          const math::Modulus& q = modulus(*p, i);
          for (std::size_t k = 0; k < p->n(); ++k) {
            wanted[i][k] = q.sub(wanted[i][k], q.mul(q.reduce(q_last), phase[i][k]));
          }
        }
        // One limb alone (50 bits) cannot hold the remainder of a product by a prime as large.
        if (wanted.size() > 1) check_small(*p, wanted, largest);
      };
      const auto times = [&](const Rows& a, const Rows& b, std::uint64_t factor) {
        Rows out = a;
        for (std::size_t i = 0; i < a.size(); ++i) {
          const std::uint64_t q = p->prime(i).q;
          for (std::size_t k = 0; k < p->n(); ++k)
            out[i][k] = product_mod(product_mod(a[i][k], b[i][k], q), factor % q, q);
        }
        return out;
      };
      const auto plus = [&](Rows a, const Rows& b) {
        for (std::size_t i = 0; i < a.size(); ++i) {
          for (std::size_t k = 0; k < p->n(); ++k) a[i][k] = (a[i][k] + b[i][k]) % p->prime(i).q;
        }
        return a;
      };
      const auto product = evaluator.multiply(x, y), broadcast = evaluator.multiply(one, x);
      Rows sum;
      for (std::size_t f = 0; f < 3; ++f) {
        const Rows both = times(own.phase(*x, f), own.phase(*y, f), 1);
        check(product, f, both);
        check(broadcast, f, times(own.phase(*one, 0), own.phase(*x, f), 1));
        sum = f == 0 ? both : plus(sum, both);
      }
      check(evaluator.dot(x, y), 0, sum);
      Combination addend{{y, one}, {{5, 5, 5}, {3, 0, 1}}, {}};
      const auto fused = evaluator.multiply_add(x, y, {2, 1, 7}, addend, level, 1);
      const std::uint64_t multipliers[] = {2, 1, 7}, shares[] = {3, 0, 1};
      Rows ones = own.phase(*one, 0);
      for (auto& row : ones) std::fill(row.begin(), row.end(), 1);
      for (std::size_t f = 0; f < 3; ++f) {
        const Rows rest = plus(times(own.phase(*y, f), ones, 5), times(own.phase(*one, 0), ones, shares[f]));
        check(fused, f, plus(times(own.phase(*x, f), own.phase(*y, f), multipliers[f]), rest));
      }
    }
  }
}

TEST(rotations_are_automorphisms_of_the_phase) {
  for (const auto& p : sets()) {
    const Own own(p);
    const std::vector<long long> steps{1, -3, 0, 200};
    std::vector<std::uint32_t> elements;
    for (const long long step : steps) elements.push_back(galois_element(*p, step));
    const std::uint32_t mirror = conjugation_element(*p);
    elements.push_back(mirror);
    const Evaluator evaluator(p, own.keys({elements[0], elements[1], elements[3], mirror}));
    for (int level = 0; level <= p->depth(); ++level) {
      const auto x = random_tensor(p, 2, level);
      auto outs = evaluator.rotate(x, steps);
      outs.push_back(evaluator.conjugate(x));
      for (std::size_t e = 0; e < elements.size(); ++e) {
        const auto index = galois_permutation(*p, elements[e]);
        for (std::size_t f = 0; f < 2; ++f) {
          const Rows before = own.phase(*x, f);
          Rows after = own.phase(*outs[e], f);
          for (std::size_t i = 0; i < after.size(); ++i) {
            for (std::size_t k = 0; k < p->n(); ++k) {
              after[i][k] = modulus(*p, i).sub(after[i][k], before[i][index[k]]);
            }
          }
          // |r0 + r1 s| / P with |r| <= P / 2.
          check_small(*p, after, elements[e] == 1 ? 0 : (1 + kWeight) / 2.0L + 1e-9L);
        }
      }
      // Hoisting changes no word.
      for (std::size_t e = 0; e < steps.size(); ++e) {
        const auto alone = evaluator.rotate(x, {steps[e]})[0];
        CHECK_EQ(std::memcmp(alone->row(0, 0, 0), outs[e]->row(0, 0, 0), alone->bytes()), 0);
      }
    }
  }
}

TEST(every_path_and_any_threads_give_the_same_words) {
  for (const auto& p : {insecure(4, 40), insecure(3, 25), insecure(5, 49)}) {
    const Own own(p);
    const std::uint32_t mirror = conjugation_element(*p);
    const auto keys = own.keys({galois_element(*p, 1), galois_element(*p, 2), galois_element(*p, 5), mirror});
    const int top = p->depth();
    const auto x = random_tensor(p, 3, top), y = random_tensor(p, 3, top - 1), one = random_tensor(p, 1, top);
    std::vector<std::int8_t> weights(5 * 3);
    for (auto& w : weights) w = static_cast<std::int8_t>(static_cast<int>(generator()() % 255) - 127);
    const Matrix matrix(gemm::Weights(weights.data(), 5, 3), std::vector<double>(5, 0.01));
    std::vector<double> clear(7 * 3);
    for (std::size_t i = 0; i < clear.size(); ++i) clear[i] = std::sin(static_cast<double>(i));
    const Values values{clear.data(), nullptr, 7, 3, 3, 1};
    const auto run = [&] {
      const Evaluator evaluator(p, keys);
      std::vector<TensorPtr> outs = evaluator.rotate(x, {1, 2, 5});
      for (const TensorPtr& out :
           {evaluator.add(x, evaluator.multiply(x, one)), evaluator.subtract(one, x), evaluator.negate(x),
            evaluator.multiply(x, y), evaluator.dot(x, y), evaluator.sum_features(x), evaluator.rotate(one, {1})[0],
            evaluator.conjugate(x), evaluator.rescale(x), evaluator.bring(x, 0, {p->scale(0) * 1.5}),
            evaluator.linear(x, matrix, gemm::Operand::plain), evaluator.multiply_plain(x, values),
            evaluator.linear_combination({x, y}, {{0.1, 2, -3}, {1}}, {0.25}), evaluator.add_constant(x, {0.5})}) {
        outs.push_back(out);
      }
      return outs;
    };
    math::set_active_isa(Isa::portable);
    math::set_num_threads(1);
    const auto wanted = run();
    const auto check = [&] {
      const auto got = run();
      for (std::size_t i = 0; i < wanted.size(); ++i) {
        CHECK_EQ(got[i]->level, wanted[i]->level);
        CHECK(got[i]->scale == wanted[i]->scale && got[i]->noise == wanted[i]->noise);
        CHECK_EQ(std::memcmp(got[i]->row(0, 0, 0), wanted[i]->row(0, 0, 0), wanted[i]->bytes()), 0);
      }
    };
    for (const Isa isa : math::usable_isas()) {
      math::set_active_isa(isa);
      check();
    }
    for (const int threads : {2, 5}) {
      math::set_num_threads(threads);
      check();
    }
    math::set_num_threads(1);
  }
}

PRIVTUNER_TEST_MAIN
