// Masked refresh: exact lifts, what the two sides make of a message, what is refused, and numbers that are expanded.
#include "privtuner/ckks/refresh.hpp"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "message_tools.hpp"
#include "privtuner/circuits/expansion.hpp"
#include "privtuner/circuits/packing.hpp"
#include "privtuner/circuits/refreshing.hpp"
#include "privtuner/ckks/centred_lift.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/ckks/secret.hpp"

using namespace privtuner::ckks;
using privtuner::wire::MessageError;
using namespace tools;
namespace circuits = privtuner::circuits;
namespace math = privtuner::math;
namespace ring = privtuner::ring;

namespace {

__extension__ typedef __int128 Int128;

ParametersPtr insecure(int depth, int scale_bits = 40, int first_bits = 0) {
  Wish wish;
  wish.depth = depth;
  wish.scale_bits = scale_bits;
  wish.first_bits = first_bits;
  wish.insecure = true;
  return std::make_shared<Parameters>(wish);
}

std::uint64_t residue(Int128 value, std::uint64_t q) {
  const Int128 rest = value % static_cast<Int128>(q);
  return static_cast<std::uint64_t>(rest < 0 ? rest + static_cast<Int128>(q) : rest);
}

// The digits of `residues` [limb][N], by every path of the processor the same.
std::vector<std::uint64_t> digits_of(const CentredLift& lift, const std::vector<std::uint64_t>& residues) {
  std::vector<std::uint64_t> first;
  const math::Isa before = math::active_isa();
  for (const math::Isa isa : math::usable_isas()) {
    math::set_active_isa(isa);
    std::vector<std::uint64_t> digits = residues;
    lift.to_digits(digits.data());
    if (first.empty()) first = digits;
    CHECK(digits == first);
  }
  math::set_active_isa(before);
  return first;
}

std::vector<std::uint64_t> lifted(const Parameters& p, const CentredLift& lift,
                                  const std::vector<std::uint64_t>& digits, std::size_t prime) {
  std::vector<std::uint64_t> first;
  const math::Isa before = math::active_isa();
  for (const math::Isa isa : math::usable_isas()) {
    math::set_active_isa(isa);
    std::vector<std::uint64_t> out(p.n());
    lift.residues(digits.data(), prime, out.data());
    if (first.empty()) first = out;
    CHECK(out == first);
  }
  math::set_active_isa(before);
  return first;
}

// Both parties of one set.
struct Session {
  ParametersPtr p;
  SecretKey secret;
  std::shared_ptr<EvaluationKeys> keys = std::make_shared<EvaluationKeys>();
  std::shared_ptr<const PublicKey> public_key;
  Evaluator evaluator;

  explicit Session(ParametersPtr parameters)
      : p(std::move(parameters)), secret(p), public_key(secret.public_key()), evaluator(p, make_keys()) {}

  std::shared_ptr<EvaluationKeys> make_keys() {
    keys->parameters = p;
    for (const std::uint32_t element : circuits::packing_elements(*p)) {
      keys->galois.emplace(element, secret.galois_key(element));
    }
    keys->galois.emplace(conjugation_element(*p), secret.galois_key(conjugation_element(*p)));
    return keys;
  }

  TensorPtr encrypt(const std::vector<double>& values, std::size_t features, int level) const {
    return secret.encrypt({values.data(), nullptr, p->slots(), features, static_cast<std::ptrdiff_t>(features), 1},
                          {level, 1, std::vector<double>(features, p->scale(level))});
  }

  MaskedRefresh masked(const TensorPtr& x, int level) const {
    return MaskedRefresh(public_key, x, evaluator.refreshed(x, level, false), {9}, 40);
  }
  static Bytes message_of(MaskedRefresh& refresh, std::size_t i) {
    Bytes message(refresh.message_bytes(i));
    refresh.mask(i, message.data());
    return message;
  }
  Bytes answer(const Bytes& message, std::size_t count, int level) const {
    Bytes out(refreshed_bytes(*p, count, level));
    secret.refresh(message.data(), message.size(), count, level, out.data());
    return out;
  }
  // x as it comes back, through the messages.
  TensorPtr refresh(const TensorPtr& x, int level, bool packed = false) const {
    const TensorPtr low = circuits::lower_for_refresh(evaluator, x, level, packed);
    MaskedRefresh refresh(public_key, low, evaluator.refreshed(low, level, packed), {9}, 40);
    const std::size_t batch = refresh_batch(*p, level);
    for (std::size_t i = 0; i < refresh.messages(); ++i) {
      const Bytes back = answer(message_of(refresh, i), std::min(batch, low->features - i * batch), level);
      refresh.unmask(i, back.data(), back.size());
    }
    return circuits::split_pairs(evaluator, refresh.result(), x->features, x->bound);
  }
};

std::vector<double> random_values(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> values(count);
  for (double& value : values) value = std::uniform_real_distribution<double>(-1, 1)(random);
  return values;
}

void check_close(const Session& s, const TensorPtr& x, const std::vector<double>& values) {
  std::vector<double> found(values.size());
  s.secret.decrypt(*x, found.data(), nullptr);
  double worst = 0;
  for (std::size_t i = 0; i < values.size(); ++i) worst = std::fmax(worst, std::fabs(found[i] - values[i]));
  CHECK_LE(worst, x->worst_error());
}

const Session& session() {
  static const Session the_session(insecure(4));
  return the_session;
}

}  // namespace

// Three primes of about 20 bits: whole numbers of the compiler's hold what they represent.
TEST(lifts_are_those_of_the_schoolbook) {
  const auto p = insecure(5, 20, 20);
  const std::size_t n = p->n(), limbs = 3;
  Int128 q = 1;
  for (std::size_t i = 0; i < limbs; ++i) q *= static_cast<Int128>(p->prime(i).q);
  const Int128 half = (q - 1) / 2;
  std::mt19937_64 random(3);
  std::vector<Int128> values(n);
  for (std::size_t k = 0; k < n; ++k) {
    const auto near = static_cast<Int128>(k / 4);  // of both ends and of zero, and anywhere
    const auto any = static_cast<Int128>(random() >> 2) % half;
    values[k] = k % 4 == 0 ? half - near : k % 4 == 1 ? near - half : k % 4 == 2 ? near - 32 : k % 8 == 3 ? any : -any;
  }
  std::vector<std::uint64_t> residues(limbs * n);
  for (std::size_t i = 0; i < limbs; ++i) {
    for (std::size_t k = 0; k < n; ++k) residues[i * n + k] = residue(values[k], p->prime(i).q);
  }
  const CentredLift lift(*p, limbs);
  const std::vector<std::uint64_t> digits = digits_of(lift, residues);
  for (std::size_t i = 0; i < p->prime_count(); ++i) {
    const std::vector<std::uint64_t> found = lifted(*p, lift, digits, i);
    for (std::size_t k = 0; k < n; ++k) CHECK_EQ(found[k], residue(values[k], p->prime(i).q));
  }
}

// The primes in use: 130 bits. Near the ends (q - 1) / 2 - t and t - (q - 1) / 2 are known modulo every prime.
TEST(lifts_near_the_ends_of_the_modulus_are_exact) {
  const auto p = insecure(6);
  const std::size_t n = p->n(), limbs = 3;
  const CentredLift lift(*p, limbs);
  const auto at = [&](std::size_t prime, std::size_t k) {
    const math::Modulus& m = p->prime(prime).row.modulus();
    std::uint64_t q = 1;
    for (std::size_t i = 0; i < limbs; ++i) q = m.mul(q, m.reduce(p->prime(i).q));
    const std::uint64_t end = m.sub(m.mul(m.sub(q, 1), m.inv(2)), m.reduce(k / 2));
    return k % 2 == 0 ? end : m.neg(end);
  };
  std::vector<std::uint64_t> residues(limbs * n);
  for (std::size_t i = 0; i < limbs; ++i) {
    for (std::size_t k = 0; k < n; ++k) residues[i * n + k] = at(i, k);
  }
  const std::vector<std::uint64_t> digits = digits_of(lift, residues);
  for (std::size_t i = 0; i < p->prime_count(); ++i) {
    const std::vector<std::uint64_t> found = lifted(*p, lift, digits, i);
    for (std::size_t k = 0; k < n; ++k) CHECK_EQ(found[k], at(i, k));
  }
}

TEST(refreshed_values_are_the_values) {
  const Session& s = session();
  for (const std::size_t features : {1, 2, 5}) {
    const std::vector<double> values = random_values(s.p->slots() * features, features);
    for (const int from : {2, 3, 4}) {
      for (const int level : {2, 3, 4}) {
        const TensorPtr y = s.refresh(s.encrypt(values, features, from), level);
        CHECK_EQ(y->level, level);
        CHECK_EQ(y->features, features);
        CHECK_EQ(y->bound, 1.0);
        for (const double scale : y->scale) {
          CHECK_LE(std::fabs(scale / (from == 2 ? s.p->scale(2) : s.p->scale(level)) - 1), 1e-12);
        }
        check_close(s, y, values);
      }
    }
  }
}

TEST(a_plan_of_a_refresh_is_the_refresh) {
  const Session& s = session();
  const std::vector<double> values = random_values(s.p->slots() * 5, 8);
  const Evaluator dry(s.p);
  for (const int from : {2, 4}) {
    const TensorPtr x = s.encrypt(values, 5, from), y = s.refresh(x, 3);
    const auto low = circuits::lower_for_refresh(dry, std::make_shared<Tensor>(x->as_planned()), 3, false);
    const TensorPtr planned = circuits::split_pairs(dry, dry.refreshed(low, 3, false), 5, x->bound);
    CHECK(planned->planned && !y->planned);
    CHECK(planned->noise == y->noise);
    CHECK(planned->shared == y->shared);
    CHECK(planned->scale == y->scale);
  }
  const auto refreshes = dry.trace().refreshes();
  CHECK_EQ(refreshes.size(), std::size_t{2});
  CHECK_EQ(refreshes[0].ciphertexts, std::size_t{5});
  CHECK_EQ(refreshes[1].ciphertexts, std::size_t{3});
  CHECK_EQ(refreshes[1].level, 3);
}

TEST(a_mask_hides_one_message_once) {
  const Session& s = session();
  const TensorPtr x = s.encrypt(random_values(s.p->slots(), 1), 1, 2);
  MaskedRefresh refresh = s.masked(x, 3);
  CHECK_EQ(refresh.messages(), std::size_t{1});
  Bytes nothing(8);
  CHECK_THROWS(std::logic_error, refresh.unmask(0, nothing.data(), nothing.size()), "no mask is waiting");
  CHECK_THROWS(std::logic_error, refresh.result(), "not all answers");
  const Bytes message = Session::message_of(refresh, 0);
  CHECK_THROWS(std::logic_error, Session::message_of(refresh, 0), "once");
  const Bytes answer = s.answer(message, 1, 3);
  refresh.unmask(0, answer.data(), answer.size());
  CHECK_THROWS(std::logic_error, refresh.unmask(0, answer.data(), answer.size()), "no mask is waiting");
  // Two refreshes of one tensor have nothing in common.
  MaskedRefresh again = s.masked(x, 3);
  const Bytes other = Session::message_of(again, 0);
  std::size_t equal = 0;
  for (std::size_t i = privtuner::wire::kHeadBytes; i < message.size(); ++i) equal += message[i] == other[i];
  CHECK_LT(equal, message.size() / 32);  // by chance 1 byte in 256, and 1 in 4 of those that hold the top 2 of 50 bits
}

TEST(answers_to_other_messages_are_refused) {
  const Session& s = session();
  const std::size_t batch = refresh_batch(*s.p, 3), features = batch + 1;
  const TensorPtr x = s.encrypt(random_values(s.p->slots() * features, 2), features, 2);
  MaskedRefresh refresh = s.masked(x, 3);
  CHECK_EQ(refresh.messages(), std::size_t{2});
  const Bytes first = Session::message_of(refresh, 0), last = Session::message_of(refresh, 1);
  const Bytes answer = s.answer(last, 1, 3);
  const auto refused = [&](const Bytes& bytes, const char* why) {
    CHECK_THROWS(MessageError, refresh.unmask(1, bytes.data(), bytes.size()), why);
  };
  refused(s.answer(first, batch, 3), "ciphertexts where 1 are due");
  refused(s.answer(last, 1, 4), "of the wrong length");
  MaskedRefresh stranger(s.public_key, x, s.evaluator.refreshed(x, 3, false), {8}, 40);
  Session::message_of(stranger, 0);
  refused(s.answer(Session::message_of(stranger, 1), 1, 3), "the answer to another message");
  MaskedRefresh later(s.public_key, x, s.evaluator.refreshed(x, 3, false), {9}, 41);
  refused(s.answer(Session::message_of(later, 1), 1, 3), "the answer to another message");
  refused(last, "expected");
  refresh.unmask(1, answer.data(), answer.size());
  const Bytes back = s.answer(first, batch, 3);
  refresh.unmask(0, back.data(), back.size());
  CHECK_EQ(refresh.result()->features, features);
}

TEST(the_owner_decides_number_and_level) {
  const Session& s = session();
  MaskedRefresh refresh = s.masked(s.encrypt(random_values(s.p->slots() * 2, 2), 2, 2), 3);
  const Bytes message = Session::message_of(refresh, 0);
  CHECK_THROWS(MessageError, s.answer(message, 1, 3), "of 2 ciphertexts where 1 are due");
  CHECK_THROWS(MessageError, s.answer(message, 3, 3), "of 2 ciphertexts where 3 are due");
  CHECK_THROWS(Error, s.answer(message, 2, 1), "a refresh to level 1");
  CHECK_THROWS(Error, s.answer(message, 2, 5), "a refresh to level 5");
  const Session other(insecure(3));
  CHECK_THROWS(MessageError, other.answer(message, 2, 3), "made with other parameters");
}

TEST(refreshes_that_cannot_be_are_refused) {
  const Session& s = session();
  const std::vector<double> values = random_values(s.p->slots(), 2);
  const TensorPtr x = s.encrypt(values, 1, 2), high = s.encrypt(values, 1, 3), low = s.encrypt(values, 1, 1);
  CHECK_THROWS(Error, s.refresh(low, 4), "at level 1 cannot be refreshed");
  CHECK_THROWS(Error, s.refresh(x, 1), "a refresh to level 1");
  CHECK_THROWS(Error, s.refresh(x, 5), "a refresh to level 5");
  CHECK_THROWS(Error, s.evaluator.refreshed(high, 4, false), "starts at level 2");
  const Session shallow(insecure(1));
  CHECK_THROWS(Error, shallow.refresh(shallow.encrypt(random_values(shallow.p->slots(), 2), 1, 1), 1),
               "no three primes");
  CHECK_THROWS(Error, circuits::split_pairs(s.evaluator, x, 3, 1), "do not hold 3 features");
  const Session other(insecure(3));
  CHECK_THROWS(Error, MaskedRefresh(other.public_key, x, s.evaluator.refreshed(x, 4, false), {}, 0), "does not fit");
  const auto planned = std::make_shared<Tensor>(x->as_planned());
  CHECK_THROWS(std::invalid_argument, MaskedRefresh(s.public_key, planned, s.evaluator.refreshed(x, 4, false), {}, 0),
               "a refresh takes");
  // Without the key that splits pairs.
  const Evaluator keyless(s.p);
  const std::vector<double> two = random_values(s.p->slots() * 2, 3);
  const TensorPtr z = circuits::lower_for_refresh(keyless, s.encrypt(two, 2, 3), 3, false);
  CHECK_EQ(z->features, std::size_t{1});
  CHECK_THROWS(Error, circuits::split_pairs(keyless, z, 2, 1), "conjugation needs its key");
}

// log2 q = 1 + log2 N + log2 B + 24 + 40 is where a bound begins to be refused.
TEST(the_room_of_the_masks) {
  const auto p = insecure(3, 40, 50);
  const double log_q = std::log2(static_cast<double>(p->prime(0).q)) + std::log2(static_cast<double>(p->prime(1).q)) +
                       std::log2(static_cast<double>(p->prime(2).q));
  const double largest = std::exp2(log_q - 1 - p->log_n() - 24 - 40);
  Tensor x(p, 1, 1, 2, true, nullptr);
  x.scale[0] = p->scale(2);
  x.noise[0] = x.shared[0] = 0;
  x.bound = largest / x.scale[0] * (1 - 1e-9);
  check_wrap(x);
  x.bound *= 1 + 2e-9;
  CHECK_THROWS(Error, check_wrap(x), "cannot be masked");
  x.bound /= 2;
  check_wrap(x);
  x.noise[0] =
      largest / worst_of(static_cast<double>(p->n())) / 2 * (1 + 1e-8);  // an error is a part of what is masked
  CHECK_THROWS(Error, check_wrap(x), "cannot be masked");
}

// A message that leaves the masks no room wraps as often as it is large: what the bound is there for.
TEST(messages_beyond_the_room_wrap) {
  const Session& s = session();
  const std::size_t n = s.p->n();
  double log_q = 0;
  for (std::size_t i = 0; i < 3; ++i) log_q += std::log2(static_cast<double>(s.p->prime(i).q));
  std::vector<double> numbers(n, 0.125);  // times q
  const Fresh fresh{2, 0.125, {std::exp2(61)}};
  const TensorPtr small = s.secret.encrypt_coefficients(numbers.data(), 1, fresh);
  // 2^61 / 8 times 2^(log_q - 61) is q / 8: raised by a whole number.
  const double factor = std::floor(std::exp2(log_q - 61));
  const auto x = s.evaluator.combine({{small}, {{factor}}, {}}, 2, {small->scale[0] * factor}, 0.125, false);
  auto room = std::make_shared<Tensor>(s.p, s.p->slots(), std::size_t{1}, 4, false, nullptr);
  room->bound = 0.5;
  room->scale = x->scale;
  room->noise = room->shared = {x->scale[0] / 64};  // so that numbers far beyond the bound are let pass
  MaskedRefresh refresh(s.public_key, x, room, {}, 0);
  const Bytes back = s.answer(Session::message_of(refresh, 0), 1, 4);
  refresh.unmask(0, back.data(), back.size());
  std::vector<double> found(n);
  s.secret.decrypt_coefficients(*refresh.result(), found.data());
  std::size_t wrapped = 0;
  for (const double value : found) {
    if (std::fabs(value - 0.125) > 1e-3) {
      CHECK_LT(std::fabs(value - 0.125 + 1), 1e-3);  // q less
      ++wrapped;
    }
  }
  // Of n = 1024 coefficients each with probability 1 / 8: six standard deviations.
  CHECK_LT(std::fabs(static_cast<double>(wrapped) - static_cast<double>(n) / 8), 6 * std::sqrt(1024 * 0.125 * 0.875));
}

TEST(revealed_values_are_the_values) {
  const Session& s = session();
  const std::vector<double> values = random_values(s.p->slots() * 3, 4);
  const TensorPtr x = s.encrypt(values, 3, 2);
  const auto room = s.evaluator.revealed(x, 10, 0.01, false);
  reveal(*s.public_key, *x, 10, false, *room);
  check_close(s, room, values);
  CHECK_THROWS(Error, s.evaluator.revealed(x, 0, 0.01, false), "outside [1, 40]");
  CHECK_THROWS(Error, s.evaluator.revealed(x, 41, 0.01, false), "outside [1, 40]");
  CHECK_THROWS(Error, s.evaluator.revealed(x, 10, 0, false), "no positive number");
  CHECK_THROWS(Error, s.evaluator.revealed(x, 10, room->worst_error() * 0.999, false), "leaves errors up to");
  s.evaluator.revealed(x, 10, room->worst_error() * 1.001, false);
  const auto noisy = s.evaluator.with_noise(s.encrypt(values, 3, 0), {1e6, 1e6, 1e6}, {0, 0, 0});
  CHECK_THROWS(Error, s.evaluator.revealed(noisy, 36, 1e9, false), "do not fit the modulus");
  const auto loud = s.evaluator.with_noise(x, {1e12, 1e12, 1e12}, {0, 0, 0});
  CHECK_THROWS(Error, s.evaluator.revealed(loud, 40, 1e30, false), "a flood of");
  const Session other(insecure(3));
  CHECK_THROWS(Error, reveal(*other.public_key, *x, 10, false, *room), "does not fit");
}

TEST(expanded_numbers_are_the_packed_ones) {
  const Session& s = session();
  const std::size_t n = s.p->n(), slots = s.p->slots();
  for (const std::size_t count : {1, 2, 3, 13, 64}) {
    const std::vector<double> numbers = random_values(count, count);
    std::vector<double> coefficients(n, 0.0);
    for (std::size_t i = 0; i < count; ++i) {
      coefficients[circuits::packed_place(n, count, i).coefficient] = numbers[i];
    }
    const TensorPtr x = s.secret.encrypt_coefficients(coefficients.data(), 1, {1, 1, {s.p->scale(1)}});
    for (const std::size_t stride : {1, 2, 5}) {
      std::vector<std::size_t> wanted;
      for (std::size_t i = stride / 2; i < count; i += stride) wanted.push_back(i);
      if (wanted.empty()) continue;
      const TensorPtr y = circuits::expand(s.evaluator, x, count, wanted);
      CHECK_EQ(y->features, wanted.size());
      CHECK_EQ(y->level, 1);
      std::vector<double> found(slots * wanted.size());
      s.secret.decrypt(*y, found.data(), nullptr);
      double worst = 0;
      for (std::size_t t = 0; t < slots; ++t) {
        for (std::size_t j = 0; j < wanted.size(); ++j) {
          worst = std::fmax(worst, std::fabs(found[t * wanted.size() + j] - numbers[wanted[j]]));
        }
      }
      CHECK_LE(worst, y->worst_error());
    }
    const TensorPtr two = s.evaluator.concatenate({x, x});
    CHECK_THROWS(Error, circuits::expand(s.evaluator, two, count, {0}), "cannot be expanded");
    CHECK_THROWS(Error, circuits::expand(s.evaluator, x, count, {count}), "not among the");
    CHECK_THROWS(Error, circuits::expand(s.evaluator, x, count, {}), "not among the");
    CHECK_THROWS(Error, circuits::expand(s.evaluator, x, 0, {0}), "cannot be expanded");
    CHECK_THROWS(Error, circuits::expand(s.evaluator, x, n + 1, {0}), "cannot be expanded");
  }
}

TEST(one_key_switch_a_number) {
  const Evaluator dry(session().p);
  const auto x = planned_coefficients(session().p, 1, {2, 1, {session().p->scale(2)}}, nullptr);
  const auto switches = [&](std::size_t count, std::size_t begin, std::size_t step) {
    std::vector<std::size_t> wanted;
    for (std::size_t i = begin; i < count; i += step) wanted.push_back(i);
    dry.trace().clear();
    circuits::expand(dry, x, count, wanted);
    return dry.trace().work().at({Work::rotate, 3});
  };
  CHECK_EQ(switches(64, 0, 1), 63.0);
  CHECK_EQ(switches(37, 0, 1), 36.0);
  CHECK_EQ(switches(64, 3, 8), 3.0 + 7);
}

TEST(keys_of_common_randomness) {
  const SecretKey secret(insecure(2));
  const ParametersPtr& p = secret.parameters();
  const SeedBytes common{1, 2, 3}, other{1, 2, 4};
  const auto key = secret.public_key(&common);
  CHECK(key->seed == derived_seed(common, KeyRole::encryption, 0));
  CHECK(derived_seed(common, KeyRole::encryption, 0) != derived_seed(common, KeyRole::evaluation, 0));
  CHECK(derived_seed(common, KeyRole::evaluation, 5) != derived_seed(common, KeyRole::evaluation, 0));
  CHECK(derived_seed(common, KeyRole::evaluation, 5) != derived_seed(other, KeyRole::evaluation, 5));
  Bytes message(message_bytes(*key));
  write(*key, message.data());
  CHECK(read_public_key(p, &common, message.data(), message.size())->words == key->words);
  CHECK_THROWS(MessageError, read_public_key(p, &other, message.data(), message.size()), "not derived");
  EvaluationKeys keys;
  keys.parameters = p;
  keys.relinearisation = secret.relinearisation_key(&common);
  keys.galois.emplace(5u, secret.galois_key(5, &common));
  Bytes body(message_bytes(keys));
  write(keys, body.data());
  CHECK(read_keys(p, &common, body.data(), body.size())->galois.at(5).key->words == keys.galois.at(5).key->words);
  CHECK_THROWS(MessageError, read_keys(p, &other, body.data(), body.size()), "not derived");
  keys.galois.at(5) = secret.galois_key(5);
  write(keys, body.data());
  CHECK_THROWS(MessageError, read_keys(p, &common, body.data(), body.size()), "not derived");
  CHECK_THROWS(Error, secret.public_key(&common), "a key of this kind was made");
  CHECK_THROWS(Error, secret.relinearisation_key(&common), "a key of this kind was made");
  CHECK_THROWS(Error, secret.galois_key(5, &common), "a key of this kind was made");
  secret.galois_key(25, &common);
  secret.public_key(&other);
}

PRIVTUNER_TEST_MAIN
