#include "privtuner/ckks/messages.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "privtuner/ckks/refresh.hpp"
#include "privtuner/ckks/secret.hpp"
#include "privtuner/math/parallel.hpp"
#include "privtuner/wire/envelope.hpp"

namespace privtuner::ckks {
namespace {

using math::Reader, math::Writer;
using wire::Head, wire::Kind, wire::kHeadBytes, wire::MessageError;

constexpr std::size_t kParametersBytes = kHeadBytes + 24, kTensorPrefix = kHeadBytes + 8,
                      kKeyPrefix = 8 + sizeof(SeedBytes);

void require(bool condition, const std::string& text) {
  if (!condition) throw MessageError(text);
}

void seal(Kind kind, const Parameters& parameters, std::uint8_t* message, std::size_t size) {
  Head head{kind};
  head.parameters = parameters.hash();
  wire::seal(head, message, size);
}

// Checks the envelope of a message of at least `least` bytes; `what` names it.
Head open(Kind kind, const char* what, const std::uint8_t* message, std::size_t size, std::size_t least) {
  const Head head = wire::open(kind, message, size);
  require(size >= least, std::string(what) + ": truncated");
  require(head.direction == wire::Direction::forward && head.subject == wire::Id{} && head.request == wire::Id{} &&
              (kind == Kind::tensor || (head.tokens == 0 && head.features == 0)),
          std::string(what) + ": a field it does not use is not zero");
  return head;
}

// The same, made with these parameters.
Head open(Kind kind, const char* what, const Parameters& parameters, const std::uint8_t* message, std::size_t size,
          std::size_t least) {
  const Head head = open(kind, what, message, size, least);
  require(head.parameters == parameters.hash(), std::string(what) + ": made with other parameters than " +
                                                    parameters.name() + "; both sides must use the same set");
  return head;
}

void require_derived(const SeedBytes* common, KeyRole role, std::uint32_t element, const SeedBytes& seed,
                     const char* what) {
  require(common == nullptr || derived_seed(*common, role, element) == seed,
          std::string(what) + ": not derived from the randomness that both sides agreed on");
}

Head refresh_head(Kind kind, const Tensor& x, const RefreshId& id) {
  Head head{kind};
  head.parameters = x.parameters->hash();
  head.subject = id.session;
  std::memcpy(head.request.data(), &id.number, sizeof(id.number));
  head.tokens = static_cast<std::uint32_t>(x.parameters->slots());
  head.features = static_cast<std::uint32_t>(x.features);
  return head;
}

// Opens a message of a refresh, of `count` ciphertexts and `expected` bytes.
Head open_refresh(Kind kind, const char* what, const Parameters& parameters, std::size_t count, std::size_t expected,
                  const std::uint8_t* data, std::size_t size) {
  const Head head = wire::open(kind, data, size);
  require(head.parameters == parameters.hash(), std::string(what) + ": made with other parameters than " +
                                                    parameters.name() + "; both sides must use the same set");
  require(head.direction == wire::Direction::forward, std::string(what) + ": a field it does not use is not zero");
  require(head.tokens == parameters.slots(), std::string(what) + ": of " + std::to_string(head.tokens) +
                                                 " tokens; ciphertexts are refreshed with all their slots");
  require(head.features == count, std::string(what) + ": of " + std::to_string(head.features) + " ciphertexts where " +
                                      std::to_string(count) + " are due");
  require(size == expected, std::string(what) + ": of the wrong length");
  return head;
}

std::string shape_text(std::size_t tokens, std::size_t features, std::uint32_t level) {
  return "(" + std::to_string(tokens) + ", " + std::to_string(features) + ") at level " + std::to_string(level);
}

std::size_t word_bytes(std::uint64_t q) {
  std::size_t bytes = 0;
  for (; q != 0; q >>= 8) ++bytes;
  return bytes;
}

std::size_t row_bytes(const Parameters& parameters, std::size_t prime) {
  return parameters.n() * word_bytes(parameters.prime(prime).q);
}

// Bytes of one row of every prime before `count`.
std::size_t rows_bytes(const Parameters& parameters, std::size_t count) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < count; ++i) total += row_bytes(parameters, i);
  return total;
}

void pack_row(const std::uint64_t* words, std::size_t n, std::size_t bytes, std::uint8_t* out) {
  for (std::size_t i = 0; i < n; ++i) std::memcpy(out + i * bytes, &words[i], bytes);
}

// False if a word is not below q.
bool unpack_row(const std::uint8_t* in, std::size_t n, std::size_t bytes, std::uint64_t q, std::uint64_t* words) {
  std::uint64_t over = 0;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, in + i * bytes, bytes);
    words[i] = word;
    over |= static_cast<std::uint64_t>(word >= q);
  }
  return over == 0;
}

// Rows of the primes 0 .. count - 1, one group after the other; `row` gives the words of (group, prime).
template <class Row>
void pack_groups(const Parameters& parameters, std::size_t groups, std::size_t count, std::uint8_t* out, Row row) {
  const std::size_t group_bytes = rows_bytes(parameters, count);
  math::parallel_for(groups * count, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t group = i / count, prime = i % count;
      pack_row(row(group, prime), parameters.n(), word_bytes(parameters.prime(prime).q),
               out + group * group_bytes + rows_bytes(parameters, prime));
    }
  });
}

template <class Row>
void unpack_groups(const Parameters& parameters, std::size_t groups, std::size_t count, const std::uint8_t* in,
                   const char* what, Row row) {
  const std::size_t group_bytes = rows_bytes(parameters, count);
  math::parallel_for(groups * count, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::size_t group = i / count, prime = i % count;
      const std::uint64_t q = parameters.prime(prime).q;
      require(unpack_row(in + group * group_bytes + rows_bytes(parameters, prime), parameters.n(), word_bytes(q), q,
                         row(group, prime)),
              std::string(what) + ": a residue is not below its prime " + std::to_string(q));
    }
  });
}

std::size_t key_bytes(const Parameters& parameters) {
  return kKeyPrefix + parameters.digits(parameters.max_limbs()) * rows_bytes(parameters, parameters.prime_count());
}

}  // namespace

std::size_t parameters_message_bytes() { return kParametersBytes; }

std::size_t message_bytes(const Tensor& x) {
  const std::size_t components = x.seed ? 1 : 2;
  return kTensorPrefix + (x.seed ? sizeof(SeedBytes) : 0) +
         x.features * components * rows_bytes(*x.parameters, x.limbs());
}

std::size_t public_key_message_bytes(const Parameters& parameters) {
  return kHeadBytes + sizeof(SeedBytes) + rows_bytes(parameters, parameters.max_limbs());
}

std::size_t message_bytes(const PublicKey& key) { return public_key_message_bytes(*key.parameters); }

std::size_t refresh_bytes(const Parameters& parameters, std::size_t count) {
  return kHeadBytes + count * 2 * rows_bytes(parameters, parameters.limbs(kRefreshLevel));
}

std::size_t refreshed_bytes(const Parameters& parameters, std::size_t count, int level) {
  return kHeadBytes + sizeof(SeedBytes) + count * rows_bytes(parameters, parameters.limbs(level));
}

std::size_t refresh_batch(const Parameters& parameters, int level) {
  check_refresh_levels(parameters, kRefreshLevel, level);
  const std::size_t larger = std::max(refresh_bytes(parameters, 1), refreshed_bytes(parameters, 1, level));
  return std::clamp<std::size_t>(kMaxRefreshBytes / larger, 1, kMaxRefreshBatch);
}

std::size_t keys_message_bytes(const Parameters& parameters, std::size_t count) {
  return kHeadBytes + 8 + count * key_bytes(parameters);
}

std::size_t message_bytes(const EvaluationKeys& keys) {
  return keys_message_bytes(*keys.parameters, keys.galois.size() + (keys.relinearisation ? 1 : 0));
}

void write(const Parameters& parameters, std::uint8_t* message) {
  Writer out(message + kHeadBytes);
  const Wish& wish = parameters.wish();
  out.put(static_cast<std::uint32_t>(wish.depth));
  out.put(static_cast<std::uint32_t>(wish.scale_bits));
  out.put(static_cast<std::uint32_t>(wish.first_bits));
  out.put(static_cast<std::uint32_t>(parameters.log_n()));
  out.put(static_cast<std::uint32_t>(wish.insecure));
  out.put(std::uint32_t{0});
  seal(Kind::parameters, parameters, message, kParametersBytes);
}

ParametersPtr read_parameters(const std::uint8_t* data, std::size_t size) {
  const Head head = open(Kind::parameters, "parameters", data, size, kParametersBytes);
  require(size == kParametersBytes, "parameters: of the wrong length");
  Reader in(data + kHeadBytes);
  std::uint32_t fields[6];
  for (std::uint32_t& field : fields) field = in.get<std::uint32_t>();
  for (const std::uint32_t field : fields) require(field < 256, "parameters: a field is out of range");
  require(fields[4] <= 1 && fields[5] == 0, "parameters: a field is out of range");
  Wish wish;
  wish.depth = static_cast<int>(fields[0]);
  wish.scale_bits = static_cast<int>(fields[1]);
  wish.first_bits = static_cast<int>(fields[2]);
  wish.log_n = static_cast<int>(fields[3]);
  wish.insecure = fields[4] == 1;
  ParametersPtr parameters;
  try {
    parameters = std::make_shared<Parameters>(wish);
  } catch (const std::invalid_argument& error) {
    throw MessageError(std::string("parameters: ") + error.what());
  }
  require(parameters->hash() == head.parameters,
          "parameters: this build derives other primes; install the same privtuner on both"
          " sides");
  return parameters;
}

void write(const Tensor& x, std::uint8_t* message) {
  if (x.planned) throw Error("a planned tensor holds no ciphertext to send");
  const std::size_t components = x.seed ? 1 : 2;
  Writer out(message + kHeadBytes);
  out.put(static_cast<std::uint32_t>(x.level));
  out.put(static_cast<std::uint32_t>(x.seed.has_value()));
  if (x.seed) out.put(*x.seed);
  pack_groups(*x.parameters, x.features * components, x.limbs(), out.at(), [&](std::size_t group, std::size_t limb) {
    return x.row(group / components, static_cast<int>(group % components), limb);
  });
  Head head{Kind::tensor};
  head.parameters = x.parameters->hash();
  head.tokens = static_cast<std::uint32_t>(x.tokens);
  head.features = static_cast<std::uint32_t>(x.features);
  wire::seal(head, message, message_bytes(x));
}

TensorPtr read_tensor(const ParametersPtr& parameters, const Tensor* expected, const std::uint8_t* data,
                      std::size_t size) {
  const Head head = open(Kind::tensor, "encrypted tensor", *parameters, data, size, kTensorPrefix);
  const std::size_t tokens = head.tokens, features = head.features;
  Reader in(data + kHeadBytes);
  const auto level = in.get<std::uint32_t>(), seeded = in.get<std::uint32_t>();
  require(tokens >= 1 && tokens <= parameters->slots(), "encrypted tensor: " + std::to_string(tokens) +
                                                            " tokens, not in [1, " +
                                                            std::to_string(parameters->slots()) + "]");
  require(features >= 1 && features <= kMaxFeatures, "encrypted tensor: unusable number of features");
  require(level <= static_cast<std::uint32_t>(parameters->depth()),
          "encrypted tensor: level " + std::to_string(level) + " is above the parameters' depth");
  require(seeded <= 1, "encrypted tensor: a field is out of range");
  TensorPtr fresh;
  if (expected == nullptr) {
    require(seeded == 1,
            "encrypted tensor: computed, or encrypted with a public key: its reader must say what it expects, by a "
            "planned tensor");
    const int depth = parameters->depth();
    const std::vector<double> scale(features, parameters->scale(depth));
    fresh = planned_tensor(parameters, tokens, features, {depth, 1, scale}, false, nullptr);
    expected = fresh.get();
  }
  if (!expected->planned || expected->parameters->hash() != parameters->hash()) {
    throw Error("what is expected of a tensor is not a planned tensor of " + parameters->name());
  }
  const auto expected_level = static_cast<std::uint32_t>(expected->level);
  require(tokens == expected->tokens && features == expected->features && level == expected_level,
          "encrypted tensor: shape " + shape_text(tokens, features, level) + " where " +
              shape_text(expected->tokens, expected->features, expected_level) + " is expected");
  const std::size_t components = seeded == 1 ? 1 : 2, limbs = expected->limbs();
  require(size == kTensorPrefix + (seeded == 1 ? sizeof(SeedBytes) : 0) +
                      features * components * rows_bytes(*parameters, limbs),
          "encrypted tensor: length does not fit its shape");
  const auto x = std::make_shared<Tensor>(expected->with_room());
  if (seeded == 1) x->seed = in.get<SeedBytes>();
  unpack_groups(*parameters, features * components, limbs, in.at(), "encrypted tensor",
                [&](std::size_t group, std::size_t limb) {
                  return x->row(group / components, static_cast<int>(group % components), limb);
                });
  if (seeded == 1) {
    math::parallel_for(features * limbs, 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        expand_mask(*parameters, *x->seed, static_cast<std::uint32_t>(i / limbs), i % limbs,
                    x->row(i / limbs, 1, i % limbs));
      }
    });
  }
  return x;
}

void write(const PublicKey& key, std::uint8_t* message) {
  Writer out(message + kHeadBytes);
  out.put(key.seed);
  pack_groups(*key.parameters, 1, key.parameters->max_limbs(), out.at(),
              [&](std::size_t, std::size_t limb) { return key.row(0, limb); });
  seal(Kind::public_key, *key.parameters, message, message_bytes(key));
}

std::shared_ptr<const PublicKey> read_public_key(const ParametersPtr& parameters, const SeedBytes* common,
                                                 const std::uint8_t* data, std::size_t size) {
  const std::size_t expected = public_key_message_bytes(*parameters);
  open(Kind::public_key, "public key", *parameters, data, size, expected);
  require(size == expected, "public key: of the wrong length");
  Reader in(data + kHeadBytes);
  const auto seed = in.get<SeedBytes>();
  require_derived(common, KeyRole::encryption, 0, seed, "public key");
  auto key = std::make_shared<PublicKey>(parameters, seed);
  unpack_groups(*parameters, 1, parameters->max_limbs(), in.at(), "public key",
                [&](std::size_t, std::size_t limb) { return key->row(0, limb); });
  return key;
}

void write(const EvaluationKeys& keys, std::uint8_t* message) {
  const Parameters& parameters = *keys.parameters;
  const std::size_t primes = parameters.prime_count();
  Writer out(message + kHeadBytes);
  out.put(static_cast<std::uint32_t>(keys.galois.size() + (keys.relinearisation ? 1 : 0)));
  out.put(std::uint32_t{0});
  const auto put = [&](std::uint32_t element, const SwitchingKey& key) {
    out.put(element);
    out.put(std::uint32_t{0});
    out.put(key.seed);
    pack_groups(parameters, key.digits(), primes, out.at(),
                [&](std::size_t digit, std::size_t prime) { return key.row(digit, 0, prime); });
    out.skip(key_bytes(parameters) - kKeyPrefix);
  };
  if (keys.relinearisation) put(0, *keys.relinearisation);
  for (const auto& entry : keys.galois) put(entry.first, *entry.second.key);
  seal(Kind::evaluation_keys, parameters, message, message_bytes(keys));
}

std::shared_ptr<const EvaluationKeys> read_keys(const ParametersPtr& parameters, const SeedBytes* common,
                                                const std::uint8_t* data, std::size_t size) {
  open(Kind::evaluation_keys, "evaluation keys", *parameters, data, size, kHeadBytes + 8);
  Reader in(data + kHeadBytes);
  const auto count = in.get<std::uint32_t>();
  require(
      in.get<std::uint32_t>() == 0 && count <= parameters->n() + 1 && size == keys_message_bytes(*parameters, count),
      "evaluation keys: length does not fit " + std::to_string(count) + " keys");
  auto keys = std::make_shared<EvaluationKeys>();
  keys->parameters = parameters;
  std::uint32_t last = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    const auto element = in.get<std::uint32_t>();
    require(in.get<std::uint32_t>() == 0 && (i == 0 || element > last) &&
                (element == 0 || (element % 2 == 1 && element > 1 && element < 2 * parameters->n())),
            "evaluation keys: " + std::to_string(element) + " names no key, or keys are out of order");
    last = element;
    const auto seed = in.get<SeedBytes>();
    require_derived(common, KeyRole::evaluation, element, seed, "evaluation keys");
    auto key = std::make_shared<SwitchingKey>(parameters, seed);
    unpack_groups(*parameters, key->digits(), parameters->prime_count(), in.at(), "evaluation keys",
                  [&](std::size_t digit, std::size_t prime) { return key->row(digit, 0, prime); });
    in.skip(key_bytes(*parameters) - kKeyPrefix);
    if (element == 0) {
      keys->relinearisation = key;
    } else {
      keys->galois.emplace(element, GaloisKey{element, key});
    }
  }
  return keys;
}

void write_refresh(const Tensor& masked, const RefreshId& id, std::uint8_t* message) {
  pack_groups(
      *masked.parameters, masked.features * 2, masked.limbs(), message + kHeadBytes,
      [&](std::size_t group, std::size_t limb) { return masked.row(group / 2, static_cast<int>(group % 2), limb); });
  wire::seal(refresh_head(Kind::refresh, masked, id), message, refresh_bytes(*masked.parameters, masked.features));
}

std::shared_ptr<Tensor> read_refresh(const ParametersPtr& parameters, std::size_t count, const std::uint8_t* data,
                                     std::size_t size, RefreshId& id) {
  const Head head =
      open_refresh(Kind::refresh, "refresh", *parameters, count, refresh_bytes(*parameters, count), data, size);
  id.session = head.subject;
  std::memcpy(&id.number, head.request.data(), sizeof(id.number));
  for (std::size_t i = sizeof(id.number); i < head.request.size(); ++i) {
    require(head.request[i] == 0, "refresh: the number of the message is out of range");
  }
  auto x = std::make_shared<Tensor>(parameters, parameters->slots(), count, kRefreshLevel, false, nullptr);
  unpack_groups(
      *parameters, count * 2, x->limbs(), data + kHeadBytes, "refresh",
      [&](std::size_t group, std::size_t limb) { return x->row(group / 2, static_cast<int>(group % 2), limb); });
  return x;
}

void write_refreshed(const Tensor& fresh, const RefreshId& id, std::uint8_t* message) {
  Writer out(message + kHeadBytes);
  out.put(fresh.seed.value());
  pack_groups(*fresh.parameters, fresh.features, fresh.limbs(), out.at(),
              [&](std::size_t feature, std::size_t limb) { return fresh.row(feature, 0, limb); });
  wire::seal(refresh_head(Kind::refreshed, fresh, id), message,
             refreshed_bytes(*fresh.parameters, fresh.features, fresh.level));
}

void read_refreshed(const RefreshId& id, const std::uint8_t* data, std::size_t size, std::size_t first,
                    std::size_t count, Tensor& fresh) {
  const Parameters& parameters = *fresh.parameters;
  const Head head = open_refresh(Kind::refreshed, "refreshed", parameters, count,
                                 refreshed_bytes(parameters, count, fresh.level), data, size);
  const Head expected = refresh_head(Kind::refreshed, fresh, id);
  require(head.subject == expected.subject && head.request == expected.request,
          "refreshed: the answer to another message; answers must come in order");
  Reader in(data + kHeadBytes);
  const auto seed = in.get<SeedBytes>();
  const std::size_t limbs = fresh.limbs();
  unpack_groups(parameters, count, limbs, in.at(), "refreshed",
                [&](std::size_t feature, std::size_t limb) { return fresh.row(first + feature, 0, limb); });
  math::parallel_for(count * limbs, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      expand_mask(parameters, seed, static_cast<std::uint32_t>(i / limbs), i % limbs,
                  fresh.row(first + i / limbs, 1, i % limbs));
    }
  });
}

}  // namespace privtuner::ckks
