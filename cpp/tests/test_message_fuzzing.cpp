// A million damaged messages (fewer under the sanitizers, which see reads and writes out of bounds): each is refused
// with MessageError, or read and harmless. Nothing else may happen.
#include <array>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <string>

#include "check.hpp"
#include "linear_cases.hpp"
#include "message_tools.hpp"
#include "privtuner/math/parallel.hpp"

using namespace cases;
using namespace tools;

namespace {

constexpr int kEnvelopes = 150000, kRequests = 250000, kShortReplies = 300000, kLongReplies = 100000, kLayers = 200000;
static_assert(kEnvelopes + kRequests + kShortReplies + kLongReplies + kLayers == 1000000);

// In a block of exactly its size, so that a read past the end is noticed.
class Exact {
 public:
  explicit Exact(const Bytes& message) : size_(message.size()), data_(new std::uint8_t[message.size()]) {
    if (size_ > 0) std::memcpy(data_.get(), message.data(), size_);
  }
  const std::uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_;
  std::unique_ptr<std::uint8_t[]> data_;
};

// Feeds damaged copies of `originals` to `reads`, which throws MessageError or checks that what it read is harmless; it
// also gets the number of the original.
// `reasons`: texts of refusals that must have come up, which shows how deep the damage reached.
template <class Read>
void fuzz(const char* name, int messages, std::uint64_t seed, const std::vector<Bytes>& originals,
          const std::vector<Bytes>& others, const std::vector<const char*>& reasons, Read reads) {
  messages /= check::kShare;
  Mutator mutator(seed, others);
  std::map<std::string, int> seen;
  int accepted = 0;
  for (int i = 0; i < messages;) {
    const std::size_t which = mutator.below(originals.size());
    Bytes message = mutator.mutate(originals[which]);
    const std::uint64_t seal = mutator.below(3);
    if (seal == 1) message = resealed(message);
    if (seal == 2) message = resized(message);
    bool original = message.empty();
    for (const Bytes& other : others) original = original || message == other;
    if (original) continue;
    ++i;
    const Exact exact(message);
    try {
      reads(exact, which);
    } catch (const MessageError& error) {
      ++seen[error.what()];
      continue;
    }
    ++accepted;
    if (seal == 0) check::fail(__FILE__, __LINE__, "a message was accepted whose checksum nobody made right");
  }
  std::printf("       %s: %d refused, %d accepted\n", name, messages - accepted, accepted);
  CHECK_LT(1000 / check::kShare, accepted);
  for (const char* reason : reasons) {
    int count = 0;
    for (const auto& [text, times] : seen) count += text.find(reason) != std::string::npos ? times : 0;
    if (count < 10 / check::kShare)
      check::fail(__FILE__, __LINE__, std::string(name) + ": refused too rarely with: " + reason);
  }
}

struct Setting {
  Setting(const char* preset_name, Direction which, std::uint32_t outputs)
      : layer(make_layer(preset_name, which == Direction::forward ? outputs : 3,
                         which == Direction::forward ? 3 : outputs, 5, static_cast<std::uint8_t>(which))),
        direction(which),
        x(make_batch(2, 3, 6)),
        masks(std::make_shared<MaskCache>(1 << 20)) {
    Sent filling = send(layer, direction, x, 9, masks);
    receive(filling.secret, answer(layer, filling.request));
  }
  // The same request every time. The first gets a short reply, for its mask product is cached.
  Sent short_request() const { return send(layer, direction, x, 1, masks); }
  Sent long_request() const { return send(layer, direction, x, 2); }

  Layer layer;
  Direction direction;
  std::vector<float> x;
  std::shared_ptr<MaskCache> masks;
};

// Everything that could be taken for something else.
std::vector<Bytes> all_messages(const std::vector<Setting>& settings) {
  std::vector<Bytes> messages;
  for (const Setting& setting : settings) {
    messages.push_back(setting.layer.owner->to_bytes());
    for (const Sent& sent : {setting.short_request(), setting.long_request()}) {
      messages.push_back(sent.request);
      const std::vector<Bytes> reply = answer(setting.layer, sent.request, 32);
      messages.insert(messages.end(), reply.begin(), reply.end());
      messages.push_back(joined(reply));
    }
  }
  return messages;
}

std::vector<Setting> make_settings(std::uint32_t outputs) {
  privtuner::math::set_num_threads(1);
  std::vector<Setting> settings;
  for (const char* name : kPresetNames) {
    for (const Direction direction : {Direction::forward, Direction::backward}) {
      settings.emplace_back(name, direction, outputs);
    }
  }
  return settings;
}

const std::vector<const char*> kHeadReasons = {
    "shorter than its head", "not a privtuner message", "wire version", "unknown kind",
    "expected a message",    "unknown direction",       "announces",    "checksum mismatch"};

std::vector<const char*> reasons(std::vector<const char*> more) {
  more.insert(more.end(), kHeadReasons.begin(), kHeadReasons.end());
  return more;
}

}  // namespace

// What the envelope alone promises, whatever the kind.
TEST(envelopes) {
  namespace wire = privtuner::wire;
  const std::vector<Bytes> originals = all_messages(make_settings(4));
  fuzz("envelopes", kEnvelopes, 5, originals, originals, reasons({"bytes too many"}),
       [&](const Exact& message, std::size_t which) {
         const wire::Kind kind = wire::peek(originals[which].data(), originals[which].size()).kind;
         Bytes copy(message.size());
         std::size_t seen = 0;
         const auto look = [&](const std::uint8_t* body, std::size_t size, std::size_t begin, std::size_t end) {
           CHECK(body == copy.data() + wire::kHeadBytes && begin == seen && end <= size);
           seen = end;
         };
         const wire::Head head = wire::open(kind, message.data(), message.size(), {copy.data(), look});
         CHECK_EQ(head.message_bytes(), message.size());
         CHECK_EQ(head.length, seen);
         CHECK_EQ(wire::peek(message.data(), message.size()).length, seen);
         CHECK(std::equal(copy.begin(), copy.end(), message.data()));
         CHECK(resealed(copy) == copy);
         wire::seal(head, copy.data(), copy.size());
         CHECK(std::equal(copy.begin(), copy.end(), message.data()));  // a head holds nothing that is not read
       });
}

TEST(requests) {
  const std::vector<Setting> settings = make_settings(40);
  std::vector<Bytes> originals;
  for (const Setting& setting : settings) {
    originals.push_back(setting.short_request().request);
    originals.push_back(setting.long_request().request);
  }
  int turn = 0;
  fuzz("requests", kRequests, 1, originals, all_messages(settings),
       reasons({"bytes too many", "request: truncated", "unknown flags", "tokens, not in", "number of features",
                "length does not fit", "residue is not below q", "another layer", "other parameters",
                "this layer takes"}),
       [&](const Exact& message, std::size_t which) {
         const Layer& layer = settings[which / 2].layer;
         const Job job(*layer.prepared, message.data(), message.size());
         const Preset& preset = *layer.owner->preset;
         CHECK_EQ(job.header().features, layer.owner->features_in(job.header().direction));
         CHECK_EQ(message.size(), request_bytes(preset, job.header().features, job.header().tokens));
         // The answer to a forged request is an ordinary one.
         if (++turn % 8 != 0) return;
         const std::uint32_t rows = std::min(32u, job.features_out());
         Bytes block(job.block_size(rows));
         job.rows(0, rows, block.data());
         std::size_t size = 0;
         open_block(preset, block.data(), block.size(), size);
         CHECK_EQ(size, block.size());
       });
}

namespace {

// A reply of four outputs in two blocks, to the request of a setting with that number. Any data is a reply.
std::vector<Bytes> make_reply(const Setting& setting, std::uint8_t request, bool mask) {
  const Preset& preset = *setting.layer.owner->preset;
  std::vector<Bytes> blocks;
  for (const std::uint32_t begin : {0u, 2u}) {
    BlockHeader header{setting.direction, setting.layer.owner->id, {}, 2, 4, begin, 2, mask};
    header.request.fill(request);
    Bytes block(block_bytes(preset, 2, 2, mask));
    for (std::size_t i = kBlockPrefix; i < kBlockPrefix + 12; ++i) block[i] = static_cast<std::uint8_t>(i * 37);
    seal_block(preset, header, block.data(), block.size());
    blocks.push_back(std::move(block));
  }
  return blocks;
}

void fuzz_replies(const char* name, int messages, std::uint64_t seed, bool mask, const std::vector<const char*>& more) {
  const std::vector<Setting> settings = make_settings(4);
  const auto make_request = [&](std::size_t setting) {
    return mask ? settings[setting].long_request() : settings[setting].short_request();
  };
  std::vector<Bytes> originals, others = all_messages(settings);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const std::vector<Bytes> blocks = make_reply(settings[i], mask ? 2 : 1, mask);
    originals.push_back(joined(blocks));
    originals.push_back(blocks[0]);
  }
  others.insert(others.end(), originals.begin(), originals.end());
  fuzz(name, messages, seed, originals, others, reasons(more), [&](const Exact& message, std::size_t which) {
    std::size_t size = 0;
    open_block(*settings[which / 2].layer.owner->preset, message.data(), message.size(), size);  // most end here
    Sent sent = make_request(which / 2);
    std::vector<float> y(std::size_t{sent.secret.reply().tokens()} * sent.secret.reply().features_out(), 0.0f);
    Decryption decryption(sent.secret, y.data());
    const auto check = [&] {
      // Whatever the blocks held, the outputs are numbers a reply can hold; the secret serves once.
      for (const float v : y) CHECK(std::isfinite(v));
      CHECK(sent.secret.reply().used());
    };
    try {
      decryption.feed(message.data(), message.size());
    } catch (const MessageError&) {
      check();
      throw;
    }
    check();
  });
}

const std::vector<const char*> kBlockReasons = {"reply block: truncated",    "unknown flags",      "unusable shape",
                                                "length does not fit",       "comes from another", "answers another",
                                                "starts at output",          "the request was",    "expected (2, ",
                                                "made with other parameters"};

}  // namespace

TEST(short_replies) { fuzz_replies("short replies", kShortReplies, 2, false, kBlockReasons); }

TEST(replies_with_mask_products) {
  fuzz_replies("replies with mask products", kLongReplies, 3, true, {"residue is not below q", "unusable shape"});
}

TEST(layers) {
  const std::vector<Setting> settings = make_settings(40);
  std::vector<Bytes> originals;
  for (const Setting& setting : settings) originals.push_back(setting.layer.owner->to_bytes());
  int turn = 0;
  fuzz("layers", kLayers, 4, originals, all_messages(settings),
       reasons({"bytes too many", "layer: truncated", "unknown parameters", "does not use", "dimension",
                "length does not fit", "norm", "scale"}),
       [&](const Exact& message, std::size_t) {
         const auto read = std::make_shared<const LayerSpec>(LayerSpec::from_bytes(message.data(), message.size()));
         const Bytes again = read->to_bytes();
         CHECK_EQ(again.size(), message.size());
         CHECK(std::memcmp(again.data(), message.data(), again.size()) == 0);
         // Whatever scales and norms it states, the owner's request is well-formed.
         if (++turn % 32 != 0) return;
         for (const Direction direction : {Direction::forward, Direction::backward}) {
           const std::uint32_t features = read->features_in(direction);
           const std::vector<float> x(features, 3e38f);
           Bytes request(request_bytes(*read->preset, features, 1));
           encrypt(read, direction, x.data(), 1, nullptr, fixed_seed(1), fixed_seed(2).bytes, RequestId{},
                   request.data(), request.size());
           open_request(*read->preset, request.data(), request.size());
         }
       });
}

PRIVTUNER_TEST_MAIN
