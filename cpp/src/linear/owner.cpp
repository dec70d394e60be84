#include "privtuner/linear/owner.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "elements.hpp"
#include "privtuner/gemm/gemm.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/ring/ntt.hpp"

namespace privtuner::linear {
namespace {

template <class Word>
const ring::Ntt<Word>& transform(const Preset& preset) {
  // One table a word size: every preset of that size has the same N and q.
  static const ring::Ntt<Word> ntt(preset.n, preset.q);
  return ntt;
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

void embed(const Elements& loops, const std::uint32_t* mask, const std::int8_t* error, const float* x, double weight,
           const double* scale, std::uint64_t q, std::size_t tokens, std::uint32_t* out) {
  loops.embed32(mask, error, x, weight, scale, q, tokens, out);
}
void embed(const Elements& loops, const std::uint64_t* mask, const std::int8_t* error, const float* x, double weight,
           const double* scale, std::uint64_t q, std::size_t tokens, std::uint64_t* out) {
  loops.embed64(mask, error, x, weight, scale, q, tokens, out);
}

// Blocks of features a task takes: few enough to share the work evenly, enough to use its buffers again.
std::size_t task_blocks(std::size_t blocks) {
  return std::max<std::size_t>(1, blocks / (4 * static_cast<std::size_t>(math::num_threads())));
}

}  // namespace

MaskCache::MaskCache(std::size_t max_bytes) : max_bytes_(max_bytes) { ring::os_random(seed_.data(), seed_.size()); }

std::size_t MaskCache::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

std::shared_ptr<const MaskCache::Entry> MaskCache::find(const LayerId& layer, Direction direction,
                                                        std::size_t bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find({layer, direction});
  return found == entries_.end() || found->second->words.size() != bytes ? nullptr : found->second;
}

std::shared_ptr<MaskCache::Entry> MaskCache::reserve(std::size_t bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > max_bytes_ - std::min(bytes_, max_bytes_)) return nullptr;
  auto entry = std::make_shared<Entry>();
  entry->words.resize(bytes);
  return entry;
}

void MaskCache::insert(const LayerId& layer, Direction direction, std::shared_ptr<const Entry> entry) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t bytes = entry->words.size();
  if (bytes_ + bytes > max_bytes_) return;  // another reply filled the cache meanwhile
  if (entries_.emplace(std::make_pair(layer, direction), std::move(entry)).second) bytes_ += bytes;
}

void Secret::wipe() noexcept {
  const std::lock_guard<std::mutex> lock(*mutex_);
  erase();
}

void Secret::erase() noexcept {
  groups_.wipe();
  inverse_scales_.wipe();
  mask_.reset();
  used_ = true;
}

std::size_t Secret::mask_bytes() const {
  const Preset& preset = *public_->preset;
  return std::size_t{features_out()} * preset.n * static_cast<std::size_t>(preset.word_bytes);
}

struct Encryptor {
  static Secret secret(std::shared_ptr<const Public> public_part, Direction direction, std::uint32_t tokens,
                       std::shared_ptr<MaskCache> masks, const RequestId& request) {
    Secret secret;
    secret.public_ = std::move(public_part);
    secret.direction_ = direction;
    secret.request_ = request;
    secret.tokens_ = tokens;
    if (masks != nullptr) secret.mask_ = masks->find(secret.public_->id, direction, secret.mask_bytes());
    secret.masks_ = std::move(masks);
    return secret;
  }
  static bool knows_mask(const Secret& secret) { return secret.mask_ != nullptr; }

  // Token scales Delta_t: the largest for which no output can leave (-q/2, q/2), whatever the token.
  static math::SecretBuffer<double> scales(Secret& secret, const float* x, const Elements& loops) {
    const Public& layer = *secret.public_;
    const Preset& preset = *layer.preset;
    const std::size_t width = layer.features_in(secret.direction_), tokens = secret.tokens_;
    const double norm = std::max(layer.norm(secret.direction_), 1.0);
    // 2^-40 covers the rounding of the norms and of the products with the scales.
    const double room = (static_cast<double>(preset.q) / 2 - noise_bound(preset, width, norm)) * (1 - 0x1p-40) / norm;
    const double* weight = secret.direction_ == Direction::backward ? layer.delta.data() : nullptr;
    math::SecretBuffer<double> scales(tokens);
    secret.inverse_scales_ = math::SecretBuffer<double>(tokens);
    math::parallel_for(tokens, 64, [&](std::size_t begin, std::size_t end) {
      for (std::size_t t = begin; t < end; ++t) {
        const float* row = x + t * width;
        const double length = std::sqrt(loops.row_norm2(row, weight, width));
        if (!std::isfinite(length)) {
          for (std::size_t j = 0; j < width; ++j) {
            if (!std::isfinite(row[j])) {
              throw std::invalid_argument("x[" + std::to_string(t) + ", " + std::to_string(j) + "] is " +
                                          (std::isnan(row[j]) ? "NaN" : "infinite") + ": every value must be finite");
            }
          }
        }
        scales[t] = length > 0 ? room / length : 0;
        secret.inverse_scales_[t] = length / room;
      }
    });
    return scales;
  }

  template <class Word>
  static void run(Secret& secret, const float* x, const ring::Seed& seed, const ring::Seed& mask_seed,
                  std::uint8_t* message) {
    const Public& layer = *secret.public_;
    const Preset& preset = *layer.preset;
    const math::Isa isa = math::active_isa();
    const Elements& loops = elements(isa);
    const ring::Ntt<Word>& ntt = transform<Word>(preset);
    const std::size_t n = preset.n, tokens = secret.tokens_, groups = (tokens + n - 1) / n;
    const std::size_t width = layer.features_in(secret.direction_);
    const math::SecretBuffer<double> scales = Encryptor::scales(secret, x, loops);
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
          const double weight = secret.direction_ == Direction::backward ? layer.delta[j] : 1.0;
          ring::sample_uniform(mask_seed, {ring::Domain::mask, j, 0}, static_cast<Word>(preset.q), mask.data(), n, isa);
          for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t from = g * n, group_tokens = std::min(n, tokens - from);
            ntt.multiply(mask.data(), prepared_group<Word>(secret.groups_, g, n), product.data(), isa);
            ntt.inverse(product.data(), isa);
            ring::sample_binomial(seed, {ring::Domain::error, j, static_cast<std::uint32_t>(g)}, error.data(),
                                  group_tokens, isa);
            embed(loops, product.data(), error.data(), columns.data() + i * stride + from, weight, scales.data() + from,
                  preset.q, group_tokens, row.data());
            // The message may stand at any address.
            std::memcpy(body + (j * tokens + from) * sizeof(Word), row.data(), group_tokens * sizeof(Word));
          }
        }
      }
    });
  }
};

Secret encrypt(std::shared_ptr<const Public> public_part, Direction direction, const float* x, std::uint32_t tokens,
               std::shared_ptr<MaskCache> masks, const ring::Seed& seed, const std::array<std::uint8_t, 32>& mask_seed,
               const RequestId& request, std::uint8_t* message, std::size_t size) {
  const Preset& preset = *public_part->preset;
  const std::uint32_t features = public_part->features_in(direction);
  if (tokens < 1 || tokens > kMaxTokens) {
    throw std::invalid_argument(std::to_string(tokens) + " tokens: a request carries 1 to " +
                                std::to_string(kMaxTokens));
  }
  if (size != request_bytes(preset, features, tokens)) throw std::invalid_argument("request buffer of the wrong size");
  ring::Seed mask;
  mask.bytes = masks != nullptr ? masks->seed() : mask_seed;
  Secret secret = Encryptor::secret(std::move(public_part), direction, tokens, std::move(masks), request);
  if (preset.word_bytes == 4) {
    Encryptor::run<std::uint32_t>(secret, x, seed, mask, message);
  } else {
    Encryptor::run<std::uint64_t>(secret, x, seed, mask, message);
  }
  const RequestHeader header{direction, secret.public_part().id,       request, mask.bytes, tokens,
                             features,  !Encryptor::knows_mask(secret)};
  seal_request(preset, header, message, size);
  return secret;
}

namespace {

[[noreturn]] void refuse_used() {
  throw SecretError("this secret was used already: a secret decrypts one reply; encrypt again for another");
}

}  // namespace

Decryption::Decryption(Secret& secret, float* out) : secret_(&secret), out_(out) {
  const std::lock_guard<std::mutex> lock(*secret.mutex_);
  if (secret.used_) refuse_used();
  if (secret.masks_ != nullptr && secret.mask_ == nullptr) filling_ = secret.masks_->reserve(secret.mask_bytes());
  secret.used_ = true;
}

void Decryption::feed(const std::uint8_t* data, std::size_t size) {
  const std::lock_guard<std::mutex> lock(*secret_->mutex_);
  try {
    read(data, size);
  } catch (...) {
    secret_->erase();
    throw;
  }
}

void Decryption::read(const std::uint8_t* data, std::size_t size) {
  if (!complete() && secret_->groups_.size() == 0) refuse_used();
  const Public& layer = *secret_->public_;
  while (size > 0) {
    std::size_t block_size = 0;
    const BlockHeader header = open_block(*layer.preset, data, size, block_size);
    if (header.layer != layer.id) throw MessageError("reply block: comes from another layer");
    if (header.request != secret_->request_) throw MessageError("reply block: answers another request");
    if (header.direction != secret_->direction_) {
      throw MessageError(std::string("reply block: is ") + direction_name(header.direction) + ", the request was " +
                         direction_name(secret_->direction_));
    }
    if (header.tokens != secret_->tokens_ || header.features != secret_->features_out()) {
      throw MessageError("reply block: shape (" + std::to_string(header.tokens) + ", " +
                         std::to_string(header.features) + "), expected (" + std::to_string(secret_->tokens_) + ", " +
                         std::to_string(secret_->features_out()) + ")");
    }
    if (header.row_begin != next_row_) {
      throw MessageError("reply block: starts at output " + std::to_string(header.row_begin) + ", expected " +
                         std::to_string(next_row_) + ": reordered, repeated or lost");
    }
    if (header.mask_present == (secret_->mask_ != nullptr)) {
      throw MessageError(header.mask_present ? "reply block: carries a mask product nobody asked for"
                                             : "reply block: lacks the mask product that was asked for");
    }
    if (layer.preset->word_bytes == 4) {
      decrypt_rows<std::uint32_t>(header, data + kBlockPrefix);
    } else {
      decrypt_rows<std::uint64_t>(header, data + kBlockPrefix);
    }
    next_row_ += header.row_count;
    data += block_size;
    size -= block_size;
  }
  if (complete()) {
    if (filling_ != nullptr) secret_->masks_->insert(layer.id, secret_->direction_, std::move(filling_));
    filling_.reset();
    secret_->erase();
  }
}

void Decryption::finish() {
  if (!complete()) {
    throw MessageError("reply: ends after output " + std::to_string(next_row_) + " of " +
                       std::to_string(secret_->features_out()) + ": truncated");
  }
}

template <class Word>
void Decryption::decrypt_rows(const BlockHeader& header, const std::uint8_t* body) {
  const Public& layer = *secret_->public_;
  const Preset& preset = *layer.preset;
  const math::Isa isa = math::active_isa();
  const Elements& loops = elements(isa);
  const ring::Ntt<Word>& ntt = transform<Word>(preset);
  const std::size_t n = preset.n, tokens = secret_->tokens_, groups = (tokens + n - 1) / n;
  const std::size_t outputs = secret_->features_out(), mask_bytes = n * sizeof(Word);
  const std::size_t row_bytes = tokens * static_cast<std::size_t>(preset.reply_bytes);
  const std::uint8_t* received_mask = body + header.row_count * row_bytes;
  if (filling_ != nullptr) {
    std::memcpy(filling_->words.data() + header.row_begin * mask_bytes, received_mask, header.row_count * mask_bytes);
  }
  const std::size_t blocks = (header.row_count + kFeatureBlock - 1) / kFeatureBlock;
  math::parallel_for(blocks, task_blocks(blocks), [&](std::size_t begin, std::size_t end) {
    const std::size_t stride = column_stride(tokens);
    math::SecretBuffer<float> columns(kFeatureBlock * stride);
    math::SecretBuffer<Word> product(n);
    math::AlignedVector<Word> mask(n);
    for (std::size_t block = begin; block < end; ++block) {
      const std::size_t first = block * kFeatureBlock, count = std::min(kFeatureBlock, header.row_count - first);
      for (std::size_t i = 0; i < count; ++i) {
        const std::size_t row = first + i, k = header.row_begin + row;
        const std::uint8_t* source =
            header.mask_present ? received_mask + row * mask_bytes : secret_->mask_->words.data() + k * mask_bytes;
        std::memcpy(mask.data(), source, mask_bytes);  // the message may stand at any address
        const double weight = secret_->direction_ == Direction::forward ? layer.delta[k] : 1.0;
        for (std::size_t g = 0; g < groups; ++g) {
          const std::size_t from = g * n, group_tokens = std::min(n, tokens - from);
          ntt.multiply(mask.data(), prepared_group<Word>(secret_->groups_, g, n), product.data(), isa);
          ntt.inverse(product.data(), isa);
          float* column = columns.data() + i * stride + from;
          const std::uint8_t* reply = body + row * row_bytes;
          const double* inverse_scale = secret_->inverse_scales_.data() + from;
          if constexpr (std::is_same_v<Word, std::uint32_t>) {
            loops.reveal32(reply + 2 * from, reply + 2 * tokens + from, product.data(), preset.dropped_bits, weight,
                           inverse_scale, preset.q, group_tokens, column);
          } else {
            loops.reveal64(reply + 4 * from, nullptr, product.data(), preset.dropped_bits, weight, inverse_scale,
                           preset.q, group_tokens, column);
          }
        }
      }
      loops.scatter(columns.data(), stride, tokens, count, out_ + header.row_begin + first, outputs);
    }
  });
}

}  // namespace privtuner::linear
