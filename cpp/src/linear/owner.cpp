#include "privtuner/linear/owner.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "elements.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/ntt.hpp"

namespace privtuner::linear {
namespace {

// The tables of one N and q, made when first asked for.
template <class Word>
const ring::Ntt<Word>& transform(const Preset& preset) {
  static std::mutex mutex;
  static std::map<std::pair<std::size_t, std::uint64_t>, std::unique_ptr<const ring::Ntt<Word>>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& table = tables[{preset.n, preset.q}];
  if (table == nullptr) table = std::make_unique<const ring::Ntt<Word>>(preset.n, preset.q);
  return *table;
}

template <class Word>
const Word* prepared_group(const math::SecretBuffer<std::uint8_t>& groups, std::size_t group, std::size_t n) {
  return reinterpret_cast<const Word*>(groups.data()) + group * 2 * n;
}

// A fresh ternary secret for each group of N tokens, in the transform domain and ready to multiply.
template <class Word>
math::SecretBuffer<std::uint8_t> sample_groups(const Preset& preset, std::size_t groups, const ring::Seed& seed,
                                               math::Isa isa) {
  const ring::Ntt<Word>& ntt = transform<Word>(preset);
  math::SecretBuffer<std::uint8_t> prepared(groups * 2 * preset.n * sizeof(Word));
  math::SecretBuffer<std::int8_t> ternary(preset.n);
  math::SecretBuffer<Word> words(preset.n);
  for (std::size_t g = 0; g < groups; ++g) {
    ring::sample_ternary(seed, {ring::Domain::secret, static_cast<std::uint32_t>(g), 0}, ternary.data(), preset.n, isa);
    for (std::size_t i = 0; i < preset.n; ++i) {
      // -1 becomes q - 1 without a branch.
      const auto sign = static_cast<std::uint64_t>(std::int64_t{ternary[i]} >> 63);
      words[i] = static_cast<Word>(static_cast<std::uint64_t>(std::int64_t{ternary[i]}) + (sign & preset.q));
    }
    ntt.forward(words.data(), isa);
    ntt.prepare(words.data(), reinterpret_cast<Word*>(prepared.data()) + g * 2 * preset.n);
  }
  return prepared;
}

// Throws std::invalid_argument for the first value that is not finite.
void require_finite(const float* row, std::size_t width, std::size_t token) {
  for (std::size_t j = 0; j < width; ++j) {
    if (std::isfinite(row[j])) continue;
    const char* value = std::isnan(row[j]) ? "nan" : row[j] > 0 ? "inf" : "-inf";
    throw std::invalid_argument("x[" + std::to_string(token) + ", " + std::to_string(j) + "] is " + value +
                                ": every value must be finite");
  }
}

// Blocks of features a task takes: few enough to share the work evenly, enough to use its buffers again.
std::size_t task_blocks(std::size_t blocks) {
  return std::max<std::size_t>(1, blocks / (4 * static_cast<std::size_t>(math::num_threads())));
}

}  // namespace

double token_room(const LayerSpec& layer, Direction direction) {
  const Preset& preset = *layer.preset;
  const double norm = std::max(layer.norm(direction), 1.0);
  // 2^-40 covers the rounding of the norms and of the products with the scales.
  return (static_cast<double>(preset.q) / 2 - noise_bound(preset, layer.features_in(direction), norm)) * (1 - 0x1p-40) /
         norm;
}

OneTimeKey::OneTimeKey(Reply reply, std::shared_ptr<MaskCache> masks, std::shared_ptr<const MaskWords> mask)
    : reply_(std::move(reply)), masks_(std::move(masks)), mask_(std::move(mask)) {}

void OneTimeKey::wipe() noexcept {
  const std::lock_guard<std::mutex> lock(*mutex_);
  erase();
}

void OneTimeKey::erase() noexcept {
  groups_.wipe();
  inverse_scales_.wipe();
  mask_.reset();
  reply_.end();
}

struct Encryptor {
  static OneTimeKey make_secret(std::shared_ptr<const LayerSpec> layer, Direction direction, std::uint32_t tokens,
                                std::shared_ptr<MaskCache> masks, const RequestId& request) {
    std::shared_ptr<const OneTimeKey::MaskWords> mask;
    if (masks != nullptr) {
      mask =
          std::static_pointer_cast<const OneTimeKey::MaskWords>(masks->find(*layer, direction, MaskCache::kProcessor));
    }
    Reply reply(std::move(layer), direction, tokens, request, mask != nullptr);
    return {std::move(reply), std::move(masks), std::move(mask)};
  }

  // Delta_t of every token; 1 / Delta_t goes into the secret.
  template <class Word>
  static math::SecretBuffer<double> scale(OneTimeKey& secret, const float* x, const Elements<Word>& loops) {
    const LayerSpec& layer = *secret.reply_.layer();
    const Direction direction = secret.reply_.direction();
    const std::size_t width = layer.features_in(direction), tokens = secret.reply_.tokens();
    const double room = token_room(layer, direction);
    const double* weight = direction == Direction::backward ? layer.delta.data() : nullptr;
    math::SecretBuffer<double> scales(tokens);
    secret.inverse_scales_ = math::SecretBuffer<double>(tokens);
    math::parallel_for(tokens, 64, [&](std::size_t begin, std::size_t end) {
      for (std::size_t t = begin; t < end; ++t) {
        const float* row = x + t * width;
        const double length = std::sqrt(loops.row_norm2(row, weight, width));
        if (!std::isfinite(length)) require_finite(row, width, t);
        scales[t] = length > 0 ? room / length : 0;
        secret.inverse_scales_[t] = length / room;
      }
    });
    return scales;
  }

  template <class Word>
  static void run(OneTimeKey& secret, const float* x, const ring::Seed& seed, const ring::Seed& mask_seed,
                  std::uint8_t* message) {
    const LayerSpec& layer = *secret.reply_.layer();
    const Direction direction = secret.reply_.direction();
    const Preset& preset = *layer.preset;
    const math::Isa isa = math::active_isa();
    const Elements<Word>& loops = elements<Word>(isa);
    const ring::Ntt<Word>& ntt = transform<Word>(preset);
    const std::size_t n = preset.n, tokens = secret.reply_.tokens(), groups = (tokens + n - 1) / n;
    const std::size_t width = layer.features_in(direction);
    const math::SecretBuffer<double> scales = scale(secret, x, loops);
    secret.groups_ = sample_groups<Word>(preset, groups, seed, isa);
    std::uint8_t* body = message + kRequestPrefix;

    const std::size_t blocks = (width + kFeatureBlock - 1) / kFeatureBlock;
    math::parallel_for(blocks, task_blocks(blocks), [&](std::size_t begin, std::size_t end) {
      const std::size_t stride = column_stride(tokens);
      math::SecretBuffer<float> columns(kFeatureBlock * stride);
      math::SecretBuffer<Word> product(n);
      math::SecretBuffer<std::int8_t> error(n);
      math::AlignedVector<Word> mask(n), row(n);
      for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * kFeatureBlock, count = std::min(kFeatureBlock, width - first);
        loops.gather(x + first, width, tokens, count, columns.data(), stride);
        for (std::size_t i = 0; i < count; ++i) {
          const auto j = static_cast<std::uint32_t>(first + i);
          const double weight = direction == Direction::backward ? layer.delta[j] : 1.0;
          ring::sample_uniform(mask_seed, {ring::Domain::mask, j, 0}, static_cast<Word>(preset.q), mask.data(), n, isa);
          for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t from = g * n, group_tokens = std::min(n, tokens - from);
            ntt.multiply(mask.data(), prepared_group<Word>(secret.groups_, g, n), product.data(), isa);
            ntt.inverse(product.data(), isa);
            ring::sample_binomial(seed, {ring::Domain::error, j, static_cast<std::uint32_t>(g)}, error.data(),
                                  group_tokens, isa);
            loops.embed(preset, product.data(), error.data(), columns.data() + i * stride + from, weight,
                        scales.data() + from, group_tokens, row.data());
            // The message may stand at any address.
            std::memcpy(body + (j * tokens + from) * sizeof(Word), row.data(), group_tokens * sizeof(Word));
          }
        }
      }
    });
  }
};

OneTimeKey encrypt(std::shared_ptr<const LayerSpec> spec, Direction direction, const float* x, std::uint32_t tokens,
                   std::shared_ptr<MaskCache> masks, const ring::Seed& seed,
                   const std::array<std::uint8_t, 32>& mask_seed, const RequestId& request, std::uint8_t* message,
                   std::size_t size) {
  const Preset& preset = *spec->preset;
  const std::uint32_t features = spec->features_in(direction);
  if (tokens < 1 || tokens > kMaxTokens) {
    throw std::invalid_argument("x has " + std::to_string(tokens) + " tokens: a request carries 1 to " +
                                std::to_string(kMaxTokens));
  }
  if (size != request_bytes(preset, features, tokens)) throw std::invalid_argument("request buffer of the wrong size");
  ring::Seed mask;
  mask.bytes = masks != nullptr ? masks->seed() : mask_seed;
  OneTimeKey secret = Encryptor::make_secret(std::move(spec), direction, tokens, std::move(masks), request);
  with_word(preset, [&](auto word) { Encryptor::run<decltype(word)>(secret, x, seed, mask, message); });
  const Reply& reply = secret.reply();
  const RequestHeader header{direction, reply.layer()->id, request, mask.bytes, tokens, features, !reply.mask_known()};
  seal_request(preset, header, message, size);
  return secret;
}

Decryption::Decryption(OneTimeKey& secret, float* out) : secret_(&secret), out_(out) {
  const std::lock_guard<std::mutex> lock(*secret.mutex_);
  Reply& reply = secret.reply_;
  reply.begin();
  const LayerSpec& layer = *reply.layer();
  if (secret.masks_ != nullptr && !reply.mask_known() && secret.masks_->fits(layer, reply.direction())) {
    filling_ = std::make_shared<OneTimeKey::MaskWords>(mask_product_bytes(layer, reply.direction()));
  }
}

void Decryption::feed(const std::uint8_t* data, std::size_t size) {
  const std::lock_guard<std::mutex> lock(*secret_->mutex_);
  Reply& reply = secret_->reply_;
  const LayerSpec& layer = *reply.layer();
  try {
    while (size > 0) {
      const Reply::Rows rows = reply.next(data, size);
      with_word(*layer.preset, [&](auto word) { decrypt_rows<decltype(word)>(rows, data); });
      reply.taken(rows);
      data += rows.size;
      size -= rows.size;
    }
  } catch (...) {
    secret_->erase();
    throw;
  }
  if (!reply.complete()) return;
  if (filling_ != nullptr) {
    secret_->masks_->insert(layer, reply.direction(), MaskCache::kProcessor, std::move(filling_));
  }
  secret_->erase();
}

template <class Word>
void Decryption::decrypt_rows(const Reply::Rows& rows, const std::uint8_t* block) {
  const Reply& reply = secret_->reply_;
  const LayerSpec& layer = *reply.layer();
  const Preset& preset = *layer.preset;
  const math::Isa isa = math::active_isa();
  const Elements<Word>& loops = elements<Word>(isa);
  const ring::Ntt<Word>& ntt = transform<Word>(preset);
  const std::size_t n = preset.n, tokens = reply.tokens(), groups = (tokens + n - 1) / n;
  const std::size_t outputs = reply.features_out(), mask_row = n * sizeof(Word),
                    data_row = rows.data_bytes / rows.count;
  const std::uint8_t* data = block + rows.data;
  const std::uint8_t* masks = reply.mask_known() ? secret_->mask_->data() + rows.first * mask_row : block + rows.mask;
  if (filling_ != nullptr) std::memcpy(filling_->data() + rows.first * mask_row, masks, rows.mask_bytes);
  const std::size_t blocks = (rows.count + kFeatureBlock - 1) / kFeatureBlock;
  math::parallel_for(blocks, task_blocks(blocks), [&](std::size_t begin, std::size_t end) {
    const std::size_t stride = column_stride(tokens);
    math::SecretBuffer<float> columns(kFeatureBlock * stride);
    math::SecretBuffer<Word> product(n);
    math::AlignedVector<Word> mask(n);
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t first = i * kFeatureBlock, count = std::min(kFeatureBlock, rows.count - first);
      for (std::size_t j = 0; j < count; ++j) {
        const std::size_t row = first + j;
        std::memcpy(mask.data(), masks + row * mask_row, mask_row);  // the message may stand at any address
        const double weight = reply.direction() == Direction::forward ? layer.delta[rows.first + row] : 1.0;
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t from = g * n;
          ntt.multiply(mask.data(), prepared_group<Word>(secret_->groups_, g, n), product.data(), isa);
          ntt.inverse(product.data(), isa);
          loops.reveal(preset, data + row * data_row, tokens, from, std::min(n, tokens - from), product.data(), weight,
                       secret_->inverse_scales_.data() + from, columns.data() + j * stride + from);
        }
      }
      loops.scatter(columns.data(), stride, tokens, count, out_ + rows.first + first, outputs);
    }
  });
}

}  // namespace privtuner::linear
