#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>

#include "check.hpp"
#include "linear_cases.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/ntt.hpp"

using namespace cases;
using privtuner::gemm::Weights;
using privtuner::math::Isa;
using privtuner::math::set_active_isa;
using privtuner::math::usable_isas;
namespace ring = privtuner::ring;

namespace {

// Those that can be named first, then such as share a word with one of them and nothing else: what is computed for one
// must not serve another.
const std::vector<Preset>& all_presets() {
  static const std::vector<Preset> all = [] {
    std::vector<Preset> kinds = presets();
    kinds.push_back(make_preset("32 bits, another q", 2048, 4294955009u, 127, 8));
    kinds.push_back(make_preset("32 bits, 4 bytes a reply", 2048, 4293918721u, 300, 1));
    kinds.push_back(make_preset("32 bits, a smaller ring", 1024, 2147389441u, 7, 7));
    kinds.push_back(make_preset("64 bits, another q, 3 bytes a reply", 2048, 562949953392641u, 30000, 26));
    return kinds;
  }();
  return all;
}

constexpr Direction kDirections[] = {Direction::forward, Direction::backward};

// What one exchange makes, on the path in force.
struct Exchange {
  Bytes request;
  std::vector<Bytes> reply;
  std::vector<float> y;
  bool operator==(const Exchange& other) const {
    return request == other.request && reply == other.reply && y.size() == other.y.size() &&
           std::memcmp(y.data(), other.y.data(), y.size() * sizeof(float)) == 0;
  }
};

Exchange exchange(const Layer& layer, Direction direction, const std::vector<float>& x, std::uint32_t rows) {
  Sent sent = send(layer, direction, x);
  Exchange result{sent.request, answer(layer, sent.request, rows), {}};
  result.y = receive(sent.secret, result.reply);
  return result;
}

// The largest Euclidean norm of a row of the matrix that is applied.
double applied_norm(const Layer& layer, Direction direction) {
  double largest = 0;
  for (std::size_t k = 0; k < layer.owner->features_out(direction); ++k) {
    double square = 0;
    for (std::size_t j = 0; j < layer.owner->features_in(direction); ++j) {
      square += std::pow(layer.applied(direction, k, j), 2);
    }
    largest = std::max(largest, std::sqrt(square));
  }
  return largest;
}

// Delta_t of every token, from the formula of the design: (q / 2 - noise) / (norm |x_t|).
std::vector<double> token_scales(const Layer& layer, Direction direction, const std::vector<float>& x) {
  const LayerSpec& owner = *layer.owner;
  const std::size_t features = owner.features_in(direction), tokens = x.size() / features;
  const double norm = applied_norm(layer, direction);
  const double room = static_cast<double>(owner.preset->q) / 2 - noise_bound(*owner.preset, features, norm);
  std::vector<double> scales(tokens);
  for (std::size_t t = 0; t < tokens; ++t) {
    double square = 0;
    for (std::size_t j = 0; j < features; ++j) {
      const double v = x[t * features + j] * (direction == Direction::backward ? owner.delta[j] : 1.0);
      square += v * v;
    }
    scales[t] = square > 0 ? room / (norm * std::sqrt(square)) : 0;
  }
  return scales;
}

// a * s in Z_q[X]/(X^N + 1), a in natural order, s ternary.
template <class Word>
std::vector<std::uint64_t> negacyclic(const std::vector<Word>& a, const std::vector<std::int8_t>& s, std::uint64_t q) {
  const std::size_t n = a.size();
  std::vector<__int128> sums(n, 0);
  for (std::size_t i = 0; i < n; ++i) {
    if (s[i] == 0) continue;
    for (std::size_t j = 0; j < n; ++j) {
      const auto term = static_cast<__int128>(a[j]) * s[i];
      if (i + j < n) {
        sums[i + j] += term;
      } else {
        sums[i + j - n] -= term;
      }
    }
  }
  std::vector<std::uint64_t> result(n);
  for (std::size_t i = 0; i < n; ++i) {
    const __int128 rest = sums[i] % static_cast<__int128>(q);
    result[i] = static_cast<std::uint64_t>(rest < 0 ? rest + static_cast<__int128>(q) : rest);
  }
  return result;
}

// The secret and the errors are drawn again from the seeds; what the request then holds beyond a * s + e must be
// Delta x, rounded.
template <class Word>
void check_request(const Preset& preset, Direction direction) {
  constexpr std::size_t kFeatures = 3;
  const Layer layer = make_layer(preset, direction == Direction::forward ? 5 : kFeatures,
                                 direction == Direction::forward ? kFeatures : 5, 11);
  const std::size_t n = preset.n, tokens = 2 * n + 10;  // a third group of ten tokens
  const std::vector<float> x = make_batch(tokens, kFeatures, 12);
  const Sent sent = send(layer, direction, x);
  const std::vector<double> scales = token_scales(layer, direction, x);
  const ring::Ntt<Word> ntt(n, preset.q);
  const auto q = static_cast<std::int64_t>(preset.q);
  double sum = 0, squares = 0, furthest = 0;
  std::vector<std::vector<std::int8_t>> secrets;
  for (std::uint32_t g = 0; g < 3; ++g) {
    std::vector<std::int8_t> secret(n);
    ring::sample_ternary(fixed_seed(1), {ring::Domain::secret, g, 0}, secret.data(), n, Isa::portable);
    secrets.push_back(secret);
  }
  for (std::uint32_t j = 0; j < kFeatures; ++j) {
    std::vector<Word> a(n);
    ring::sample_uniform(fixed_seed(101), {ring::Domain::mask, j, 0}, static_cast<Word>(preset.q), a.data(), n,
                         Isa::portable);
    privtuner::math::AlignedVector<Word> natural(a.begin(), a.end());
    ntt.inverse(natural.data(), Isa::portable);
    a.assign(natural.begin(), natural.end());
    for (std::uint32_t g = 0; g < 3; ++g) {
      const std::vector<std::uint64_t> product = negacyclic(a, secrets[g], preset.q);
      std::vector<std::int8_t> error(n);
      ring::sample_binomial(fixed_seed(1), {ring::Domain::error, j, g}, error.data(), n, Isa::portable);
      for (std::size_t i = 0; i < std::min(n, tokens - g * n); ++i) {
        const std::size_t t = g * n + i;
        Word b;
        std::memcpy(&b, sent.request.data() + kRequestPrefix + (j * tokens + t) * sizeof(Word), sizeof(Word));
        std::int64_t rest = static_cast<std::int64_t>(b) - static_cast<std::int64_t>(product[i]);
        if (rest > q / 2) rest -= q;
        if (rest < -(q / 2)) rest += q;
        const double weight = direction == Direction::backward ? layer.owner->delta[j] : 1.0;
        const double message = static_cast<double>(x[t * kFeatures + j]) * weight * scales[t];
        furthest = std::max(furthest, std::abs(static_cast<double>(rest - error[i]) - message));
        const double noise = static_cast<double>(rest) - message;
        sum += noise;
        squares += noise * noise;
      }
    }
  }
  // Delta keeps 2^-40 of the range free, and its own rounding is far below that; messages reach q / (2 norm).
  CHECK_LE(furthest, 0.5 + static_cast<double>(preset.q) / 2 / applied_norm(layer, direction) * 0x1p-39);
  // Noise and rounding have variance 21/2 + 1/12; the standard deviations of mean and variance follow.
  const double count = static_cast<double>(kFeatures * tokens), variance = 10.5 + 1.0 / 12;
  CHECK_LT(std::abs(sum / count), 5 * std::sqrt(variance / count));
  CHECK_LT(std::abs(squares / count - variance), 5 * variance * std::sqrt(2 / count));
}

// The reply against W_int times the words of the request, and W_int times the mask.
template <class Word>
void check_reply(const Preset& preset, Direction direction) {
  const Layer layer = make_layer(preset, 37, 6, 21);
  const LayerSpec& owner = *layer.owner;
  const std::size_t inputs = owner.features_in(direction), outputs = owner.features_out(direction), tokens = 5;
  const Sent sent = send(layer, direction, make_batch(tokens, inputs, 22));
  const Bytes block = answer(layer, sent.request).at(0);
  CHECK_EQ(block.size(), block_bytes(preset, static_cast<std::uint32_t>(outputs), tokens, true));
  std::vector<Word> mask(inputs * preset.n), b(inputs * tokens);
  std::memcpy(b.data(), sent.request.data() + kRequestPrefix, b.size() * sizeof(Word));
  for (std::uint32_t j = 0; j < inputs; ++j) {
    ring::sample_uniform(fixed_seed(101), {ring::Domain::mask, j, 0}, static_cast<Word>(preset.q),
                         mask.data() + j * preset.n, preset.n, Isa::portable);
  }
  const auto product = [&](const std::vector<Word>& c, std::size_t columns, std::size_t k, std::size_t column) {
    __int128 sum = 0;
    for (std::size_t j = 0; j < inputs; ++j) {
      sum += static_cast<__int128>(c[j * columns + column]) * layer.applied(direction, k, j);
    }
    const auto modulus = static_cast<__int128>(preset.q);
    return static_cast<std::uint64_t>((sum % modulus + modulus) % modulus);
  };
  const auto reply_bytes = static_cast<std::size_t>(preset.reply_bytes);
  for (std::size_t k = 0; k < outputs; ++k) {
    const std::uint8_t* row = block.data() + kBlockPrefix + k * tokens * reply_bytes;
    for (std::size_t t = 0; t < tokens; ++t) {
      std::uint64_t got = 0;
      if (reply_bytes == 3) {  // high halves of all tokens, then their low bytes
        got = std::uint64_t{row[2 * t]} << 8 | std::uint64_t{row[2 * t + 1]} << 16 | row[2 * tokens + t];
      } else {
        for (std::size_t i = 0; i < 4; ++i) got |= std::uint64_t{row[4 * t + i]} << (8 * i);
      }
      const std::uint64_t half = std::uint64_t{1} << (preset.dropped_bits - 1);
      CHECK_EQ(got, (product(b, tokens, k, t) + half) >> preset.dropped_bits);
    }
    for (std::size_t i = 0; i < preset.n; i += 97) {
      Word got;
      std::memcpy(&got,
                  block.data() + kBlockPrefix + outputs * tokens * reply_bytes + (k * preset.n + i) * sizeof(Word),
                  sizeof(Word));
      CHECK_EQ(std::uint64_t{got}, product(mask, preset.n, k, i));
    }
  }
}

// Every output within the guaranteed error of the exact product.
void check_results(const Layer& layer, Direction direction, const std::vector<float>& x, const std::vector<float>& y) {
  const LayerSpec& owner = *layer.owner;
  const std::size_t inputs = owner.features_in(direction), outputs = owner.features_out(direction);
  const std::size_t tokens = x.size() / inputs;
  const std::vector<double> scales = token_scales(layer, direction, x);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t k = 0; k < outputs; ++k) {
      long double want = 0;
      for (std::size_t j = 0; j < inputs; ++j) {
        const long double weight = direction == Direction::backward ? owner.delta[j] : owner.delta[k];
        want += static_cast<long double>(x[t * inputs + j]) * weight * layer.applied(direction, k, j);
      }
      const double delta = direction == Direction::forward ? owner.delta[k] : 1.0;
      const double noise = noise_bound(*owner.preset, inputs, applied_norm(layer, direction));
      const double bound =
          scales[t] == 0 ? 0 : delta * noise / scales[t] * (1 + 1e-6) + 1e-7 * std::abs(static_cast<double>(want));
      CHECK_LE(std::abs(static_cast<double>(static_cast<long double>(y[t * outputs + k]) - want)), bound);
    }
  }
}

}  // namespace

TEST(presets) {
  CHECK_EQ(presets().size(), 2u);
  for (const Preset& p : presets()) {
    CHECK_EQ(&preset(p.name), &p);
    CHECK(privtuner::math::is_prime(p.q));
    CHECK_EQ((p.q - 1) % (2 * p.n), 0u);
    // Rounding up in the reply stays inside a word, and the longest input leaves more than half of the range.
    const int bits = p.word_bytes == 4 ? 32 : 50;
    CHECK_LE(p.q + (std::uint64_t{1} << (p.dropped_bits - 1)), std::uint64_t{1} << bits);
    CHECK_EQ(bits - p.dropped_bits, 8 * p.reply_bytes);
    CHECK_LT(noise_bound(p, 65536, 256.0 * p.max_weight), static_cast<double>(p.q) / 4);
  }
  CHECK_NE(preset("linear-w8").hash, preset("linear-w16").hash);
  CHECK_THROWS(std::invalid_argument, preset("linear-w4"),
               "unknown preset 'linear-w4': choose one of linear-w8, linear-w16");
}

TEST(what_follows_from_the_numbers_of_a_preset) {
  const auto sizes = [](const Preset& p) { return std::array<int, 3>{p.word_bytes, p.weight_bytes, p.reply_bytes}; };
  CHECK(sizes(preset("linear-w8")) == (std::array<int, 3>{4, 1, 3}));
  CHECK(sizes(preset("linear-w16")) == (std::array<int, 3>{8, 2, 4}));
  CHECK(sizes(make_preset("p", 2048, 4293918721u, 128, 1)) == (std::array<int, 3>{4, 2, 4}));
  CHECK(sizes(make_preset("p", 2048, 562949953392641u, 127, 26)) == (std::array<int, 3>{8, 1, 3}));
  CHECK_NE(make_preset("p", 2048, 4294955009u, 127, 8).hash, make_preset("p", 2048, 4293918721u, 127, 8).hash);
  const auto make = [](std::uint64_t q, int weight, int dropped) { return make_preset("p", 2048, q, weight, dropped); };
  CHECK_THROWS(std::invalid_argument, make(4293918721u, 0, 8), "preset 'p': weights up to 0, not in [1, 32639]");
  CHECK_THROWS(std::invalid_argument, make(4293918721u, 32640, 8), "weights up to 32640");
  CHECK_THROWS(std::invalid_argument, make(4293918721u, 1, 0), "0 bits dropped, not in [1, 31]");
  CHECK_THROWS(std::invalid_argument, make(4293918721u, 1, 32), "32 bits dropped");
  CHECK_THROWS(std::invalid_argument, make(4294955009u, 1, 15), "q = 4294955009 leaves no room to round below 2^32");
  CHECK_THROWS(std::invalid_argument, make(std::uint64_t{1} << 50, 1, 20), "leaves no room to round below 2^50");
  CHECK_THROWS(std::invalid_argument, make(1125899903827969u, 1, 17), "keeps at most 32 bits of an output: drop more");
}

TEST(noise_bound_by_hand) {
  // (21 + 1/2) sqrt(4) 10 + 2^7, and + 2^17.
  CHECK_EQ(noise_bound(preset("linear-w8"), 4, 10), 430.0 + 128.0);
  CHECK_EQ(noise_bound(preset("linear-w16"), 4, 10), 430.0 + 131072.0);
}

TEST(norms_by_hand) {
  const std::int8_t w[] = {3, 4, 0, -5, 12, 0};
  const double delta[] = {1, 2};
  const QuantisedWeight prepared(preset("linear-w8"), LayerId{}, Weights(w, 2, 3), delta);
  CHECK_EQ(prepared.spec().norm_forward, 13.0);
  CHECK_EQ(prepared.spec().norm_backward, std::sqrt(160.0));
}

TEST(the_request_is_the_scaled_batch_under_small_noise) {
  for (const Direction direction : kDirections) {
    for (const Preset& preset : all_presets()) {
      with_word(preset, [&](auto word) { check_request<decltype(word)>(preset, direction); });
    }
  }
}

TEST(the_reply_is_the_integer_product) {
  for (const Direction direction : kDirections) {
    for (const Preset& preset : all_presets()) {
      with_word(preset, [&](auto word) { check_reply<decltype(word)>(preset, direction); });
    }
  }
}

TEST(results_are_within_the_guaranteed_error) {
  for (const Preset& preset : all_presets()) {
    for (const Direction direction : kDirections) {
      const Layer layer = make_layer(preset, 50, 33, 31);
      const std::size_t inputs = layer.owner->features_in(direction);
      for (const std::size_t tokens : {1, 7, 2048, 2049}) {
        const std::vector<float> x = make_batch(tokens, inputs, 32 + tokens);
        check_results(layer, direction, x, exchange(layer, direction, x, 32).y);
      }
    }
  }
}

TEST(every_path_block_size_and_thread_count_gives_the_same_bits) {
  const int threads_before = privtuner::math::num_threads();
  const Isa isa_before = privtuner::math::active_isa();
  for (const char* name : kPresetNames) {
    for (const Direction direction : kDirections) {
      const Layer layer = make_layer(name, 67, 70, 41);
      const std::vector<float> x = make_batch(2100, layer.owner->features_in(direction), 42);
      set_active_isa(Isa::portable);
      privtuner::math::set_num_threads(1);
      const Exchange want = exchange(layer, direction, x, 32);
      const Exchange want_whole = exchange(layer, direction, x, 1000);
      CHECK(want.y == want_whole.y);
      for (const Isa isa : usable_isas()) {
        set_active_isa(isa);
        for (const int threads : {1, 2, 5}) {
          privtuner::math::set_num_threads(threads);
          CHECK(exchange(layer, direction, x, 32) == want);
          CHECK(exchange(layer, direction, x, 1000) == want_whole);
        }
      }
    }
  }
  set_active_isa(isa_before);
  privtuner::math::set_num_threads(threads_before);
}

TEST(a_reply_made_on_one_path_is_read_on_another) {
  const Isa before = privtuner::math::active_isa();
  const Layer layer = make_layer("linear-w8", 40, 20, 43);
  const std::vector<float> x = make_batch(9, 20, 44);
  set_active_isa(Isa::portable);
  const Exchange want = exchange(layer, Direction::forward, x, 32);
  Sent sent = send(layer, Direction::forward, x);
  set_active_isa(usable_isas().back());
  const std::vector<Bytes> reply = answer(layer, sent.request);
  set_active_isa(Isa::portable);
  CHECK(receive(sent.secret, reply) == want.y);
  set_active_isa(before);
}

TEST(messages_may_stand_at_any_address) {
  for (const char* name : kPresetNames) {
    const Layer layer = make_layer(name, 40, 5, 51);
    const std::vector<float> x = make_batch(6, 5, 52);
    const Exchange want = exchange(layer, Direction::forward, x, 32);
    for (std::size_t shift = 1; shift < 8; ++shift) {
      Bytes request(want.request.size() + shift);
      RequestId id;
      id.fill(1);
      OneTimeKey secret = encrypt(layer.owner, Direction::forward, x.data(), 6, nullptr, fixed_seed(1),
                                  fixed_seed(101).bytes, id, request.data() + shift, request.size() - shift);
      CHECK(std::equal(want.request.begin(), want.request.end(), request.begin() + static_cast<std::ptrdiff_t>(shift)));
      const Job job(*layer.prepared, request.data() + shift, request.size() - shift);
      std::vector<float> y(want.y.size());
      Decryption decryption(secret, y.data());
      for (std::uint32_t begin = 0; begin < 40; begin += 32) {
        const std::uint32_t count = std::min(32u, 40 - begin);
        Bytes block(job.block_size(count) + shift);
        job.rows(begin, count, block.data() + shift);
        decryption.feed(block.data() + shift, block.size() - shift);
      }
      decryption.finish();
      CHECK(y == want.y);
    }
  }
}

TEST(a_batch_of_zeros_and_a_weight_of_zeros) {
  const Layer layer = make_layer("linear-w8", 4, 3, 61);
  for (const float y : exchange(layer, Direction::forward, std::vector<float>(6, 0.0f), 32).y) CHECK_EQ(y, 0.0f);
  const std::int8_t w[6] = {};
  const double delta[2] = {0, 1};
  Layer zeros;
  zeros.weights.assign(6, 0);
  zeros.prepared = std::make_unique<QuantisedWeight>(preset("linear-w8"), LayerId{}, Weights(w, 2, 3), delta);
  zeros.owner = std::make_shared<const LayerSpec>(zeros.prepared->spec());
  // Noise alone cannot come through weights of zero; the bits left out of the reply can.
  const std::vector<float> y = exchange(zeros, Direction::forward, {1, 2, 3}, 32).y;
  CHECK_EQ(y[0], 0.0f);
  CHECK_LT(std::abs(y[1]), 4 * 128 / 2.1e9);
}

TEST(masks_are_asked_for_once) {
  for (const char* name : kPresetNames) {
    const Layer layer = make_layer(name, 40, 20, 71);
    const std::size_t product = 2048 * static_cast<std::size_t>(layer.owner->preset->word_bytes);
    const auto masks = std::make_shared<MaskCache>(1 << 20);
    for (const Direction direction : kDirections) {
      const std::size_t before = masks->bytes(), inputs = layer.owner->features_in(direction);
      const std::size_t outputs = layer.owner->features_out(direction);
      const std::vector<float> x = make_batch(5, inputs, 72);
      Sent first = send(layer, direction, x, 1, masks), second = send(layer, direction, x, 2, masks);
      const std::vector<Bytes> first_reply = answer(layer, first.request, 32);
      check_results(layer, direction, x, receive(first.secret, first_reply));
      CHECK_EQ(masks->bytes() - before, outputs * product);
      // A request that was on its way still gets and reads its own mask product.
      check_results(layer, direction, x, receive(second.secret, answer(layer, second.request, 64)));
      CHECK_EQ(masks->bytes() - before, outputs * product);
      Sent third = send(layer, direction, x, 3, masks);
      const std::vector<Bytes> third_reply = answer(layer, third.request, 32);
      CHECK_EQ(third_reply[0].size() + std::min<std::size_t>(outputs, 32) * product, first_reply[0].size());
      check_results(layer, direction, x, receive(third.secret, third_reply));
      CHECK_EQ(masks->bytes() - before, outputs * product);
    }
  }
}

TEST(masks_beyond_the_capacity_travel_with_every_reply) {
  const Layer small = make_layer("linear-w8", 2, 20, 73, 1), large = make_layer("linear-w8", 40, 20, 74, 2);
  const auto masks = std::make_shared<MaskCache>(2 * 8192);
  const std::vector<float> x = make_batch(5, 20, 75);
  for (std::uint8_t i = 0; i < 3; ++i) {
    for (const Layer* layer : {&large, &small}) {
      Sent sent = send(*layer, Direction::forward, x, i, masks);
      const std::vector<Bytes> reply = answer(*layer, sent.request);
      const bool mask_present = reply[0].size() > block_bytes(*layer->owner->preset, layer->owner->d_out, 5, false);
      CHECK_EQ(mask_present, layer == &large || i == 0);
      check_results(*layer, Direction::forward, x, receive(sent.secret, reply));
    }
  }
  CHECK_EQ(masks->bytes(), 2 * 8192u);
}

TEST(replies_that_arrive_together_do_not_exceed_the_capacity) {
  const Layer first = make_layer("linear-w8", 4, 20, 73, 1), second = make_layer("linear-w8", 4, 20, 74, 2);
  const auto masks = std::make_shared<MaskCache>(4 * 8192);
  const std::vector<float> x = make_batch(5, 20, 75);
  Sent sent[] = {send(first, Direction::forward, x, 1, masks), send(second, Direction::forward, x, 2, masks)};
  std::vector<float> y(5 * 4);
  Decryption one(sent[0].secret, y.data()), other(sent[1].secret, y.data());  // both have found room
  for (const Bytes& block : answer(first, sent[0].request)) one.feed(block.data(), block.size());
  for (const Bytes& block : answer(second, sent[1].request)) other.feed(block.data(), block.size());
  check_results(second, Direction::forward, x, y);
  CHECK_EQ(masks->bytes(), masks->max_bytes());
}

TEST(a_mask_product_is_kept_only_when_complete) {
  const Layer layer = make_layer("linear-w8", 40, 20, 76);
  const auto masks = std::make_shared<MaskCache>(1 << 20);
  const std::vector<float> x = make_batch(5, 20, 77);
  Sent sent = send(layer, Direction::forward, x, 1, masks);
  const std::vector<Bytes> reply = answer(layer, sent.request, 32);
  {
    std::vector<float> y(5 * 40);
    Decryption dropped(sent.secret, y.data());
    dropped.feed(reply[0].data(), reply[0].size());
    CHECK_THROWS(MessageError, dropped.finish(), "ends after output 32 of 40: truncated");
  }
  CHECK_EQ(masks->bytes(), 0u);
  sent = send(layer, Direction::forward, x, 1, masks);
  check_results(layer, Direction::forward, x, receive(sent.secret, reply));
  CHECK_EQ(masks->bytes(), 40u * 8192);
}

TEST(a_cached_mask_serves_only_the_shape_it_came_from) {
  // Another public part under the same id, as a dishonest server could send: the cached product is too short for it.
  const Layer layer = make_layer("linear-w8", 3, 4, 78, 9), longer = make_layer("linear-w8", 40, 4, 79, 9);
  CHECK(layer.owner->id == longer.owner->id);
  const auto masks = std::make_shared<MaskCache>(1 << 20);
  const std::vector<float> x = make_batch(5, 4, 80);
  Sent sent = send(layer, Direction::forward, x, 1, masks);
  receive(sent.secret, answer(layer, sent.request));
  CHECK_EQ(masks->bytes(), 3u * 8192);
  sent = send(longer, Direction::forward, x, 2, masks);
  check_results(longer, Direction::forward, x, receive(sent.secret, answer(longer, sent.request)));
}

TEST(a_secret_serves_one_decryption) {
  const Layer layer = make_layer("linear-w8", 40, 20, 81);
  const std::vector<float> x = make_batch(5, 20, 82);
  std::vector<float> y(5 * 40);
  Sent sent = send(layer, Direction::forward, x);
  const std::vector<Bytes> reply = answer(layer, sent.request, 32);
  const auto refused = [&](OneTimeKey& secret) {
    CHECK(secret.reply().used());
    CHECK_THROWS(SecretError, receive(secret, reply), "used already: a secret decrypts one reply");
  };
  CHECK(!sent.secret.reply().used());
  {
    Decryption decryption(sent.secret, y.data());
    refused(sent.secret);  // it is this decryption's from the start
    for (const Bytes& block : reply) decryption.feed(block.data(), block.size());
    decryption.finish();
    check_results(layer, Direction::forward, x, y);
  }
  refused(sent.secret);
  for (const std::size_t blocks : {0, 1}) {  // an end before the end
    Sent ended = send(layer, Direction::forward, x);
    {
      Decryption decryption(ended.secret, y.data());
      for (std::size_t i = 0; i < blocks; ++i) decryption.feed(reply[i].data(), reply[i].size());
    }
    refused(ended.secret);
  }
  Sent wiped = send(layer, Direction::forward, x);
  wiped.secret.wipe();
  refused(wiped.secret);
  // Wiped under a decryption, which then sees no zeros in the place of the secret.
  Sent under = send(layer, Direction::forward, x);
  Decryption decryption(under.secret, y.data());
  decryption.feed(reply[0].data(), reply[0].size());
  under.secret.wipe();
  CHECK_THROWS(SecretError, decryption.feed(reply[1].data(), reply[1].size()), "used already");
}

TEST(a_block_that_is_refused_ends_the_secret) {
  const Layer layer = make_layer("linear-w8", 40, 20, 85);
  const std::vector<float> x = make_batch(5, 20, 86);
  const auto masks = std::make_shared<MaskCache>(1 << 20);
  std::vector<float> y(5 * 40);
  for (const std::size_t good : {0, 1}) {
    Sent sent = send(layer, Direction::forward, x, 1, masks);
    const std::vector<Bytes> reply = answer(layer, sent.request, 32);
    Bytes damaged = reply[good];
    damaged.back() ^= 1;
    Decryption decryption(sent.secret, y.data());
    for (std::size_t i = 0; i < good; ++i) decryption.feed(reply[i].data(), reply[i].size());
    CHECK_THROWS(MessageError, decryption.feed(damaged.data(), damaged.size()), "checksum mismatch");
    CHECK_THROWS(SecretError, decryption.feed(reply[good].data(), reply[good].size()), "used already");
    CHECK_THROWS(MessageError, decryption.finish(), "truncated");
    CHECK_EQ(masks->bytes(), 0u);
  }
}

TEST(two_threads_cannot_use_one_secret_twice) {
  privtuner::math::set_num_threads(1);
  const Layer layer = make_layer("linear-w8", 64, 20, 83);
  const std::vector<float> x = make_batch(5, 20, 84);
  const auto masks = std::make_shared<MaskCache>(1 << 20);
  Sent filling = send(layer, Direction::forward, x, 1, masks);
  const std::vector<float> want = receive(filling.secret, answer(layer, filling.request));
  for (int i = 0; i < 50; ++i) {
    Sent sent = send(layer, Direction::forward, x, 1, masks);
    const std::vector<Bytes> reply = answer(layer, sent.request, 32);
    int finished = 0, refused = 0;
    std::mutex mutex;
    const auto work = [&] {
      bool done = false;
      try {
        done = receive(sent.secret, reply) == want;
      } catch (const SecretError&) {
        const std::lock_guard<std::mutex> lock(mutex);
        ++refused;
        return;
      }
      const std::lock_guard<std::mutex> lock(mutex);
      finished += done;
    };
    std::thread other(work);
    work();
    other.join();
    CHECK_EQ(finished, 1);
    CHECK_EQ(refused, 1);
  }
}

TEST(encrypt_rejects) {
  const Layer layer = make_layer("linear-w8", 4, 3, 91);
  const auto run = [&](std::vector<float> x, std::uint32_t tokens, std::size_t size, Direction direction) {
    Bytes request(size);
    return encrypt(layer.owner, direction, x.data(), tokens, nullptr, fixed_seed(1), fixed_seed(2).bytes, RequestId{},
                   request.data(), request.size());
  };
  const std::size_t good = kRequestPrefix + 2 * 3 * 4;
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  run({1, 2, 3, 4, 5, 6}, 2, good, Direction::forward);
  CHECK_THROWS(std::invalid_argument, run({1}, 0, kRequestPrefix, Direction::forward), "0 tokens");
  CHECK_THROWS(std::invalid_argument, run({1}, kMaxTokens + 1, good, Direction::forward),
               "16777217 tokens: a request carries 1 to 16777216");
  CHECK_THROWS(std::invalid_argument, run({1, 2, 3, 4, 5, 6}, 2, good - 1, Direction::forward), "wrong size");
  CHECK_THROWS(std::invalid_argument, run({1, 2, 3, 4, 5, nan}, 2, good, Direction::forward), "x[1, 2] is nan");
  CHECK_THROWS(std::invalid_argument, run({1, -infinity, 3, 4, 5, 6}, 2, good, Direction::forward),
               "x[0, 1] is -inf: every value must be finite");
  CHECK_THROWS(std::invalid_argument, run({1, 2, 3, infinity}, 1, kRequestPrefix + 4 * 4, Direction::backward),
               "x[0, 3] is inf");
}

TEST(prepared_rejects) {
  const Preset &w8 = preset("linear-w8"), &w16 = preset("linear-w16");
  const std::int8_t bytes[] = {1, -127}, low[] = {0, -128};
  const std::int16_t words[] = {1, 2};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto make = [&](const std::int8_t* w, double first, double second) {
    const double delta[] = {first, second};
    return QuantisedWeight(w8, LayerId{}, Weights(w, 2, 1), delta).spec().d_out;
  };
  CHECK_EQ(make(bytes, 1, kMaxScale), 2u);
  CHECK_THROWS(std::invalid_argument, make(bytes, -1, 1), "the scale of row 0 is no float32 from 0 on");
  CHECK_THROWS(std::invalid_argument, make(bytes, 1, nan), "the scale of row 1 is no float32");
  CHECK_THROWS(std::invalid_argument, make(bytes, 1, 2 * kMaxScale), "float32");
  CHECK_THROWS(std::invalid_argument, make(bytes, 1, 0), "scale of row 1 is 0, its weights are not");
  CHECK_THROWS(std::invalid_argument, make(low, 1, 1), "the weight at (1, 0) is beyond 127");
  const double one[] = {1, 1};
  CHECK_THROWS(std::invalid_argument, QuantisedWeight(w8, LayerId{}, Weights(words, 2, 1), one),
               "linear-w8 takes weights of 1 bytes");
  CHECK_THROWS(std::invalid_argument, QuantisedWeight(w16, LayerId{}, Weights(bytes, 2, 1), one),
               "linear-w16 takes weights of 2 bytes");
}

TEST(rows_rejects) {
  const Layer layer = make_layer("linear-w8", 40, 3, 92);
  const Sent sent = send(layer, Direction::forward, make_batch(2, 3, 93));
  const Job job(*layer.prepared, sent.request.data(), sent.request.size());
  Bytes out(job.block_size(40));
  CHECK_THROWS(std::invalid_argument, job.rows(0, 0, out.data()), "rows [0, 0)");
  CHECK_THROWS(std::invalid_argument, job.rows(16, 1, out.data()), "must start at a multiple of 32 and end by 40");
  CHECK_THROWS(std::invalid_argument, job.rows(32, 9, out.data()), "rows [32, 41)");
  CHECK_THROWS(std::invalid_argument, job.rows(64, 1, out.data()), "end by 40");
  CHECK_THROWS(std::invalid_argument, job.rows(32, 0xffffffffu, out.data()), "end by 40");
}

PRIVTUNER_TEST_MAIN
