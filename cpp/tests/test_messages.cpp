#include "privtuner/linear/messages.hpp"

#include <limits>
#include <string>

#include "check.hpp"
#include "linear_cases.hpp"
#include "message_tools.hpp"

using namespace cases;
using namespace tools;

namespace {

// Places in the bodies (messages.hpp).
constexpr std::size_t kRequestFlagsAt = 104, kRequestUnusedAt = 108;
constexpr std::size_t kBlockFlagsAt = 72, kBlockRowBeginAt = 76, kBlockRowCountAt = 80, kBlockUnusedAt = 84;
constexpr std::size_t kLayerOutAt = 72, kLayerInAt = 76, kLayerNormsAt = 80, kLayerDeltaAt = 96;

const Preset& w8() { return preset("linear-w8"); }

// A forward exchange with a layer of 40 outputs and 3 inputs: a request, and a reply of two blocks.
struct Case {
  explicit Case(const char* preset_name, std::shared_ptr<MaskCache> masks = nullptr, std::uint8_t seed = 1)
      : layer(make_layer(preset_name, 40, 3, 5)),
        x(make_batch(2, 3, 6)),
        known(std::move(masks)),
        number(seed),
        sent(encrypt()),
        reply(answer(layer, sent.request, 32)) {}
  const Preset& parameters() const { return *layer.owner->preset; }
  void open(const Bytes& request) const { Job(*layer.prepared, request.data(), request.size()); }
  Sent encrypt() const { return send(layer, Direction::forward, x, number, known); }  // the same request every time
  // The reply in one piece to a new secret.
  std::vector<float> decrypt(const std::vector<Bytes>& blocks) const {
    Sent again = encrypt();
    return receive(again.secret, {joined(blocks)});
  }
  Layer layer;
  std::vector<float> x;
  std::shared_ptr<MaskCache> known;
  std::uint8_t number;
  Sent sent;
  std::vector<Bytes> reply;
};

void read_public(const Bytes& message) { LayerSpec::from_bytes(message.data(), message.size()); }

// Where `reads` accepts `message`, it refuses every change of one bit, every shorter message and every longer one.
template <class Read>
void check_integrity(const Bytes& message, Read reads) {
  reads(message);
  for (std::size_t at = 0; at < message.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      CHECK_THROWS(MessageError, reads(with(message, at, static_cast<std::uint8_t>(message[at] ^ (1 << bit)))), "");
    }
  }
  for (std::size_t size = 0; size < message.size(); ++size) {
    const Bytes shorter(message.begin(), message.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK_THROWS(MessageError, reads(shorter), "");
    // Not even with lengths and checksum made to fit.
    CHECK_THROWS(MessageError, reads(resized(shorter)), "");
  }
  Bytes longer = message;
  for (int i = 0; i < 100; ++i) {
    longer.push_back(static_cast<std::uint8_t>(i));
    CHECK_THROWS(MessageError, reads(longer), "");
    CHECK_THROWS(MessageError, reads(resized(longer)), "");
  }
}

}  // namespace

TEST(layer_round_trip) {
  for (const char* name : kPresetNames) {
    const Layer layer = make_layer(name, 40, 3, 1);
    const LayerSpec& before = layer.prepared->spec();
    const Bytes message = before.to_bytes();
    CHECK_EQ(message.size(), 96u + 8 * 40);
    const LayerSpec after = LayerSpec::from_bytes(message.data(), message.size());
    CHECK(after.preset == before.preset && after.id == before.id && after.delta == before.delta);
    CHECK_EQ(after.d_out, 40u);
    CHECK_EQ(after.d_in, 3u);
    CHECK_EQ(after.norm_forward, before.norm_forward);
    CHECK_EQ(after.norm_backward, before.norm_backward);
    CHECK(after.to_bytes() == message);
    CHECK_EQ(get<std::uint64_t>(message, kChecksumAt), checksum(message, message.size()));
  }
}

TEST(request_round_trip) {
  for (const char* name : kPresetNames) {
    const Case c(name);
    const RequestHeader header = open_request(c.parameters(), c.sent.request.data(), c.sent.request.size());
    CHECK(header.direction == Direction::forward && header.layer == c.layer.owner->id && header.mask_wanted);
    CHECK(header.seed == fixed_seed(101).bytes);
    CHECK_EQ(header.request[7], 1);
    CHECK_EQ(header.tokens, 2u);
    CHECK_EQ(header.features, 3u);
    CHECK_EQ(c.sent.request.size(), 112u + 6 * static_cast<std::size_t>(c.parameters().word_bytes));
    CHECK_EQ(get<std::uint64_t>(c.sent.request, kChecksumAt), checksum(c.sent.request, c.sent.request.size()));
  }
}

TEST(block_round_trip) {
  for (const char* name : kPresetNames) {
    const Case c(name);
    Bytes reply = joined(c.reply);
    std::uint32_t begin = 0;
    for (const Bytes& block : c.reply) {
      std::size_t size = 0;
      const BlockHeader header = open_block(c.parameters(), reply.data(), reply.size(), size);
      CHECK(header.direction == Direction::forward && header.layer == c.layer.owner->id && header.mask_present);
      CHECK_EQ(header.request[7], 1);
      CHECK_EQ(header.tokens, 2u);
      CHECK_EQ(header.features, 40u);
      CHECK_EQ(header.row_begin, begin);
      CHECK_EQ(header.row_count, begin == 0 ? 32u : 8u);
      CHECK_EQ(size, block.size());
      CHECK_EQ(get<std::uint64_t>(block, kChecksumAt), checksum(block, block.size()));
      reply.erase(reply.begin(), reply.begin() + static_cast<std::ptrdiff_t>(size));
      begin += header.row_count;
    }
  }
}

TEST(every_change_of_a_layer_is_noticed) { check_integrity(Case("linear-w8").layer.owner->to_bytes(), read_public); }

TEST(every_change_of_a_request_is_noticed) {
  for (const char* name : kPresetNames) {
    const Case c(name);
    check_integrity(c.sent.request, [&](const Bytes& message) { c.open(message); });
  }
}

TEST(every_change_of_a_reply_is_noticed) {
  for (const char* name : kPresetNames) {
    // A cached mask keeps the blocks short.
    const auto masks = std::make_shared<MaskCache>(1 << 20);
    Case first(name, masks);
    first.decrypt(first.reply);
    Case c(name, masks, 2);
    CHECK_LT(joined(c.reply).size(), 600u);
    for (std::size_t i = 0; i < 2; ++i) {
      check_integrity(c.reply[i], [&](const Bytes& message) {
        std::size_t size = 0;
        open_block(c.parameters(), message.data(), message.size(), size);
        Sent again = c.encrypt();
        std::vector<float> y(2 * 40);
        Decryption decryption(again.secret, y.data());
        if (i == 1) decryption.feed(c.reply[0].data(), c.reply[0].size());
        decryption.feed(message.data(), message.size());
      });
    }
    c.decrypt(c.reply);
  }
}

TEST(kinds_are_not_taken_for_one_another) {
  Case c("linear-w8");
  const Bytes layer = c.layer.owner->to_bytes();
  CHECK_THROWS(MessageError, read_public(c.sent.request), "expected a message of kind layer, got request");
  CHECK_THROWS(MessageError, read_public(c.reply[0]), "expected a message of kind layer, got reply");
  CHECK_THROWS(MessageError, c.open(layer), "expected a message of kind request, got layer");
  CHECK_THROWS(MessageError, c.open(c.reply[0]), "expected a message of kind request, got reply");
  CHECK_THROWS(MessageError, c.decrypt({c.sent.request}), "expected a message of kind reply, got request");
  CHECK_THROWS(MessageError, c.decrypt({layer}), "expected a message of kind reply, got layer");
}

TEST(presets_are_not_taken_for_one_another) {
  Case w8_case("linear-w8"), w16_case("linear-w16");
  CHECK_THROWS(MessageError, w8_case.open(w16_case.sent.request),
               "made with other parameters than this layer's linear-w8");
  CHECK_THROWS(MessageError, w16_case.open(w8_case.sent.request),
               "made with other parameters than this layer's linear-w16");
  CHECK_THROWS(MessageError, w8_case.decrypt(w16_case.reply), "other parameters");
  Bytes unknown = w8_case.layer.owner->to_bytes();
  unknown = resealed(with(unknown, kHashAt, w8().hash + 1));
  CHECK_THROWS(MessageError, read_public(unknown), "unknown parameters: install the same privtuner on both sides");
}

// From here on the checksum is right: what is refused is refused for its content.

TEST(forged_requests) {
  const Case c("linear-w8");
  const Bytes& good = c.sent.request;
  const auto forge32 = [&](std::size_t at, std::uint32_t value) { c.open(resealed(with(good, at, value))); };
  c.open(resealed(good));
  for (const std::uint32_t tokens : {0u, (1u << 24) + 1, 0x80000000u, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(kTokensAt, tokens),
                 "request: " + std::to_string(tokens) + " tokens, not in [1, 16777216]");
  }
  for (const std::uint32_t features : {0u, 65537u, 0x80000000u, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(kFeaturesAt, features), "request: unusable number of features");
  }
  for (const std::uint32_t tokens : {1u, 3u, 1u << 24}) {
    CHECK_THROWS(MessageError, forge32(kTokensAt, tokens), "length does not fit 3 features of");
  }
  // 65536 features of 65536 tokens of 4 bytes: a multiple of 2^32.
  Bytes wrapping(good.begin(), good.begin() + kRequestPrefix);
  wrapping = with(with(wrapping, kTokensAt, 65536u), kFeaturesAt, 65536u);
  CHECK_THROWS(MessageError, c.open(resized(wrapping)), "length does not fit 65536 features of 65536 tokens");
  CHECK_THROWS(MessageError, forge32(kRequestFlagsAt, 2), "request: unknown flags");
  CHECK_THROWS(MessageError, forge32(kRequestFlagsAt, 0xffffffffu), "request: unknown flags");
  CHECK_THROWS(MessageError, forge32(kRequestUnusedAt, 1), "request: unknown flags");
  for (const std::uint32_t word : {4293918721u, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(good.size() - 4, word), "request: a residue is not below q = 4293918721");
  }
  forge32(good.size() - 4, 4293918720u);
  CHECK_THROWS(MessageError, c.open(resealed(with(good, kSubjectAt, std::uint8_t{99}))),
               "meant for another layer, or other weights of this one");
  // The other direction takes 40 features.
  CHECK_THROWS(MessageError, c.open(resealed(with(good, kDirectionAt, std::uint8_t{1}))),
               "request: 3 features, this layer takes 40 in the backward direction");
  CHECK_THROWS(MessageError, c.open(resealed(with(good, kDirectionAt, std::uint8_t{2}))),
               "request: unknown direction 2");
  // Features and tokens exchanged: the length is the same.
  CHECK_THROWS(MessageError, c.open(resealed(with(with(good, kTokensAt, 3u), kFeaturesAt, 2u))),
               "request: 2 features, this layer takes 3 in the forward direction");
  Bytes longer = good;
  longer.resize(longer.size() + 4);
  CHECK_THROWS(MessageError, c.open(longer), "request: 4 bytes too many");
  CHECK_THROWS(MessageError, c.open(resized(longer)), "length does not fit 3 features of 2 tokens");
  CHECK_THROWS(MessageError, c.open(resized(Bytes(good.begin(), good.begin() + 111))), "request: truncated");

  const Case wide("linear-w16");
  for (const std::uint64_t word : {std::uint64_t{1125899903827969u}, ~std::uint64_t{0}}) {
    CHECK_THROWS(MessageError, wide.open(resealed(with(wide.sent.request, wide.sent.request.size() - 8, word))),
                 "request: a residue is not below q = 1125899903827969");
  }
}

TEST(forged_blocks) {
  Case c("linear-w8");
  const Bytes& good = c.reply[0];
  const auto forge32 = [&](std::size_t at, std::uint32_t value) {
    c.decrypt({resealed(with(good, at, value)), c.reply[1]});
  };
  for (const std::uint32_t tokens : {0u, (1u << 24) + 1, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(kTokensAt, tokens), "reply block: unusable shape");
  }
  for (const std::uint32_t features : {0u, 31u, 65537u, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(kFeaturesAt, features), "reply block: unusable shape");
  }
  for (const std::uint32_t begin : {9u, 41u, 0xffffffe0u, 0xffffffffu}) {  // the last two wrap around to 0 and 31
    CHECK_THROWS(MessageError, forge32(kBlockRowBeginAt, begin), "reply block: unusable shape");
  }
  CHECK_THROWS(MessageError,
               c.decrypt({resealed(with(with(good, kBlockRowBeginAt, 9u), kBlockRowCountAt, 0xfffffff8u))}),
               "reply block: unusable shape");  // one row, modulo 2^32
  for (const std::uint32_t count : {0u, 41u, 0x80000000u, 0xffffffffu}) {
    CHECK_THROWS(MessageError, forge32(kBlockRowCountAt, count), "reply block: unusable shape");
  }
  for (const std::uint32_t count : {1u, 31u, 33u, 40u}) {
    CHECK_THROWS(MessageError, forge32(kBlockRowCountAt, count), "reply block: length does not fit its shape");
  }
  CHECK_THROWS(MessageError, forge32(kTokensAt, 3), "reply block: length does not fit its shape");
  CHECK_THROWS(MessageError, forge32(kTokensAt, 1u << 24), "reply block: length does not fit its shape");
  CHECK_THROWS(MessageError, forge32(kBlockFlagsAt, 0), "reply block: length does not fit its shape");
  CHECK_THROWS(MessageError, forge32(kBlockFlagsAt, 2), "reply block: unknown flags");
  CHECK_THROWS(MessageError, forge32(kBlockUnusedAt, 1), "reply block: unknown flags");
  CHECK_THROWS(MessageError, forge32(kFeaturesAt, 41), "reply block: shape (2, 41), expected (2, 40)");
  CHECK_THROWS(MessageError, forge32(kBlockRowBeginAt, 8),
               "starts at output 8, expected 0: reordered, repeated or lost");
  CHECK_THROWS(MessageError, forge32(good.size() - 4, 4293918721u), "reply block: a residue is not below q");
  CHECK_THROWS(MessageError, forge32(kSubjectAt, 99), "reply block: comes from another layer");
  CHECK_THROWS(MessageError, forge32(kRequestAt, 99), "reply block: answers another request");
  CHECK_THROWS(MessageError, c.decrypt({resealed(with(good, kDirectionAt, std::uint8_t{1}))}),
               "reply block: is backward, the request was forward");
  CHECK_THROWS(MessageError, c.decrypt({resealed(with(good, kDirectionAt, std::uint8_t{4}))}), "unknown direction 4");
  CHECK_THROWS(MessageError, c.decrypt({resized(Bytes(good.begin(), good.begin() + 87))}), "reply block: truncated");
  // One token of 40 outputs, with the length of it.
  BlockHeader header{Direction::forward, c.layer.owner->id, {}, 1, 40, 0, 40, true};
  header.request.fill(1);
  Bytes other(block_bytes(w8(), 40, 1, true));
  seal_block(w8(), header, other.data(), other.size());
  CHECK_THROWS(MessageError, c.decrypt({other}), "reply block: shape (1, 40), expected (2, 40)");
  // Without the mask product that was asked for.
  header.tokens = 2;
  header.mask_present = false;
  other.assign(block_bytes(w8(), 40, 2, false), 0);
  seal_block(w8(), header, other.data(), other.size());
  CHECK_THROWS(MessageError, c.decrypt({other}), "reply block: lacks the mask product that was asked for");
  c.decrypt(c.reply);
}

TEST(a_mask_product_nobody_asked_for) {
  const auto masks = std::make_shared<MaskCache>(1 << 20);
  Case first("linear-w8", masks);
  first.decrypt(first.reply);
  Case second("linear-w8", masks, 2);
  BlockHeader header{Direction::forward, second.layer.owner->id, {}, 2, 40, 0, 40, true};
  header.request.fill(2);
  Bytes block(block_bytes(w8(), 40, 2, true));
  seal_block(w8(), header, block.data(), block.size());
  CHECK_THROWS(MessageError, second.decrypt({block}), "reply block: carries a mask product nobody asked for");
  second.decrypt(second.reply);
}

TEST(blocks_out_of_order) {
  Case c("linear-w8"), other("linear-w8", nullptr, 2);
  const Bytes &first = c.reply[0], &second = c.reply[1];
  CHECK_THROWS(MessageError, c.decrypt({}), "reply: ends after output 0 of 40: truncated");
  CHECK_THROWS(MessageError, c.decrypt({first}), "reply: ends after output 32 of 40: truncated");
  CHECK_THROWS(MessageError, c.decrypt({second}), "starts at output 32, expected 0");
  CHECK_THROWS(MessageError, c.decrypt({second, first}), "starts at output 32, expected 0");
  CHECK_THROWS(MessageError, c.decrypt({first, first}), "starts at output 0, expected 32");
  CHECK_THROWS(MessageError, c.decrypt({first, second, second}), "starts at output 32, expected 40");
  CHECK_THROWS(MessageError, c.decrypt({first, other.reply[1]}), "answers another request");
  CHECK_THROWS(MessageError, c.decrypt({first, second, {1, 2, 3}}), "reply of 3 bytes is shorter than its head");
  CHECK_THROWS(MessageError, c.decrypt({first, {0}, second}), "not a privtuner message");
  std::vector<float> y(2 * 40);
  Decryption decryption(c.sent.secret, y.data());
  decryption.feed(first.data(), first.size());
  decryption.feed(first.data(), 0);
  CHECK(!decryption.complete());
  decryption.feed(second.data(), second.size());
  CHECK(decryption.complete());
  decryption.finish();
  CHECK_THROWS(MessageError, decryption.feed(second.data(), second.size()), "starts at output 32, expected 40");
  CHECK(c.decrypt(c.reply) == y);
}

TEST(forged_layers) {
  const Case c("linear-w8");
  const Bytes good = c.layer.owner->to_bytes();
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto forge = [&](std::size_t at, auto value) { read_public(resealed(with(good, at, value))); };
  read_public(resealed(good));
  for (const std::size_t at : {kLayerOutAt, kLayerInAt}) {
    for (const std::uint32_t dimension : {0u, 65537u, 0x20000000u, 0xffffffffu}) {
      CHECK_THROWS(MessageError, forge(at, dimension),
                   "dimension " + std::to_string(dimension) + " is outside [1, 65536]");
    }
  }
  for (const std::uint32_t d_out : {39u, 41u, 65536u}) {
    CHECK_THROWS(MessageError, forge(kLayerOutAt, d_out), "length does not fit its d_out");
  }
  for (const double norm : {-1.0, nan, infinity, 127 * std::sqrt(40.0) * 1.001}) {
    CHECK_THROWS(MessageError, forge(kLayerNormsAt, norm), "a norm is outside the range of its weights");
    CHECK_THROWS(MessageError, forge(kLayerNormsAt + 8, norm), "a norm is outside the range of its weights");
  }
  for (const double scale : {-1.0, nan, infinity, 1e39}) {
    CHECK_THROWS(MessageError, forge(kLayerDeltaAt + 8 * 39, scale), "a scale is not a float32 from 0 on");
  }
  CHECK_THROWS(MessageError, forge(kDirectionAt, std::uint8_t{1}), "a field it does not use is not zero");
  CHECK_THROWS(MessageError, forge(kRequestAt + 15, std::uint8_t{1}), "a field it does not use is not zero");
  for (const std::size_t at : {kTokensAt, kFeaturesAt}) {
    CHECK_THROWS(MessageError, forge(at, 1u), "a field it does not use is not zero");
  }
  Bytes longer = good;
  longer.resize(longer.size() + 8);
  CHECK_THROWS(MessageError, read_public(longer), "layer: 8 bytes too many");
  CHECK_THROWS(MessageError, read_public(resized(longer)), "length does not fit its d_out");
  CHECK_THROWS(MessageError, read_public(resized(Bytes(good.begin(), good.begin() + 95))), "layer: truncated");
}

PRIVTUNER_TEST_MAIN
