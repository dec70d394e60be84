// Layers, batches and exchanges with fixed seeds, for the tests of the linear scheme.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "privtuner/linear/owner.hpp"
#include "privtuner/linear/server.hpp"

namespace cases {

using namespace privtuner::linear;
using Bytes = std::vector<std::uint8_t>;

inline const std::vector<const char*> kPresetNames = [] {
  std::vector<const char*> names;
  for (const Preset& preset : presets()) names.push_back(preset.name);
  return names;
}();

struct Layer {
  std::vector<int> weights;  // row-major (d_out, d_in)
  std::unique_ptr<QuantisedWeight> prepared;
  std::shared_ptr<const LayerSpec> owner;  // the public part as the owner has it

  int weight(std::size_t row, std::size_t col) const { return weights[row * owner->d_in + col]; }
  // Of the matrix that is applied: W forward, its transpose backward.
  int applied(Direction direction, std::size_t out, std::size_t in) const {
    return direction == Direction::forward ? weight(out, in) : weight(in, out);
  }
};

template <class Weight>
privtuner::gemm::Weights narrow(const std::vector<int>& weights, std::uint32_t d_out, std::uint32_t d_in) {
  const std::vector<Weight> narrowed(weights.begin(), weights.end());
  return {narrowed.data(), d_out, d_in};
}

inline Layer make_layer(const Preset& preset, std::uint32_t d_out, std::uint32_t d_in, std::uint64_t seed,
                        std::uint8_t id_byte = 1) {
  std::mt19937_64 random(seed);
  Layer layer;
  layer.weights.resize(std::size_t{d_out} * d_in);
  const auto span = static_cast<std::uint64_t>(2 * preset.max_weight + 1);
  for (int& w : layer.weights) w = static_cast<int>(random() % span) - preset.max_weight;
  layer.weights[0] = preset.max_weight;
  std::vector<double> delta(d_out);
  for (double& d : delta)
    d = std::ldexp(1.0 + static_cast<double>(random() % 1000) / 1000, static_cast<int>(random() % 20) - 10);
  LayerId id{};
  id[0] = id_byte;
  id[15] = 0xee;
  auto weights = preset.weight_bytes == 1 ? narrow<std::int8_t>(layer.weights, d_out, d_in)
                                          : narrow<std::int16_t>(layer.weights, d_out, d_in);
  layer.prepared = std::make_unique<QuantisedWeight>(preset, id, std::move(weights), delta.data());
  layer.owner = std::make_shared<const LayerSpec>(layer.prepared->spec());
  return layer;
}

inline Layer make_layer(const char* preset_name, std::uint32_t d_out, std::uint32_t d_in, std::uint64_t seed,
                        std::uint8_t id_byte = 1) {
  Layer layer = make_layer(privtuner::linear::preset(preset_name), d_out, d_in, seed, id_byte);
  const Bytes bytes = layer.prepared->spec().to_bytes();
  layer.owner = std::make_shared<const LayerSpec>(LayerSpec::from_bytes(bytes.data(), bytes.size()));
  return layer;
}

inline std::vector<float> make_batch(std::size_t tokens, std::size_t features, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> x(tokens * features);
  // Tokens of very different lengths, and one of zeros.
  for (std::size_t t = 0; t < tokens; ++t) {
    const int exponent = static_cast<int>(random() % 40) - 20;
    for (std::size_t j = 0; j < features; ++j) {
      const auto v = static_cast<float>(static_cast<double>(random() % 2000001) / 1000000 - 1);
      x[t * features + j] = t == 3 ? 0 : std::ldexp(v, exponent);
    }
  }
  return x;
}

// A request with fixed randomness, and what decrypts its reply.
struct Sent {
  Bytes request;
  OneTimeKey secret;
};

inline privtuner::ring::Seed fixed_seed(std::uint8_t value) {
  privtuner::ring::Seed seed;
  for (std::size_t i = 0; i < seed.bytes.size(); ++i) seed.bytes[i] = static_cast<std::uint8_t>(value + 7 * i);
  return seed;
}

inline Sent send(const Layer& layer, Direction direction, const std::vector<float>& x, std::uint8_t seed = 1,
                 std::shared_ptr<MaskCache> masks = nullptr) {
  const std::uint32_t features = layer.owner->features_in(direction);
  const auto tokens = static_cast<std::uint32_t>(x.size() / features);
  Bytes request(request_bytes(*layer.owner->preset, features, tokens));
  RequestId id{};
  id.fill(seed);
  OneTimeKey secret =
      encrypt(layer.owner, direction, x.data(), tokens, std::move(masks), fixed_seed(seed),
              fixed_seed(static_cast<std::uint8_t>(seed + 100)).bytes, id, request.data(), request.size());
  return {std::move(request), std::move(secret)};
}

// The reply in blocks of `rows` outputs.
inline std::vector<Bytes> answer(const Layer& layer, const Bytes& request, std::uint32_t rows = 1u << 20) {
  const Job job(*layer.prepared, request.data(), request.size());
  std::vector<Bytes> blocks;
  for (std::uint32_t begin = 0; begin < job.features_out();) {
    const std::uint32_t count = std::min(rows, job.features_out() - begin);
    Bytes block(job.block_size(count));
    job.rows(begin, count, block.data());
    blocks.push_back(std::move(block));
    begin += count;
  }
  return blocks;
}

inline std::vector<float> receive(OneTimeKey& secret, const std::vector<Bytes>& blocks) {
  std::vector<float> y(std::size_t{secret.reply().tokens()} * secret.reply().features_out());
  Decryption decryption(secret, y.data());
  for (const Bytes& block : blocks) decryption.feed(block.data(), block.size());
  decryption.finish();
  return y;
}

}  // namespace cases
