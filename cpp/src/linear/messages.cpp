#include "privtuner/linear/messages.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "privtuner/gemm/gemm.hpp"

namespace privtuner::linear {
namespace {

using math::Reader, math::Writer;
using wire::Kind;

constexpr std::size_t kLayerPrefix = 24;

void require(bool condition, const std::string& text) {
  if (!condition) throw MessageError(text);
}

// What requests and blocks of replies take from the head.
template <class Header>
Header header_of(const wire::Head& head) {
  Header header;
  header.direction = static_cast<Direction>(head.direction);
  header.layer = head.subject;
  header.request = head.request;
  header.tokens = head.tokens;
  header.features = head.features;
  return header;
}

wire::Head head_of(Kind kind, const Preset& preset, Direction direction, const LayerId& layer, const RequestId& request,
                   std::uint32_t tokens, std::uint32_t features) {
  return {kind, static_cast<wire::Direction>(direction), preset.hash, layer, request, tokens, features};
}

// Every residue below q, without a branch a word.
template <class Word>
bool all_below(const std::uint8_t* data, std::size_t count, std::uint64_t q) {
  Word over = 0;
  for (std::size_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, data + i * sizeof(Word), sizeof(Word));
    over |= static_cast<Word>(word >= static_cast<Word>(q));
  }
  return over == 0;
}

// Where the residues of a body begin, which reach to its end; its size if it has none. From fields that are not checked
// yet: where they are wrong, the message is refused for it.
std::size_t residues_at(Kind kind, const Preset& preset, const std::uint8_t* body, std::size_t size) {
  const std::size_t prefix = (kind == Kind::request ? kRequestPrefix : kBlockPrefix) - wire::kHeadBytes;
  if (size < prefix || kind == Kind::request) return std::min(size, prefix);
  Reader in(body);
  const auto flags = in.get<std::uint32_t>();
  in.skip(4);
  const auto rows = in.get<std::uint32_t>();
  const std::size_t words = flags == kMaskWanted ? rows * preset.n : 0;
  return size - std::min(size - prefix, words * static_cast<std::size_t>(preset.word_bytes));
}

// Opens the message at the front of [message, message + size); `residues`: whether every word that must be below q is.
wire::Head open(Kind kind, const Preset& preset, const std::uint8_t* message, std::size_t size, std::uint8_t* copy,
                bool& residues) {
  std::atomic<bool> below{true};
  const auto look = [&](const std::uint8_t* body, std::size_t length, std::size_t begin, std::size_t end) {
    const std::size_t first = residues_at(kind, preset, body, length);
    if (end <= first) return;
    // The words that end in the range.
    const auto bytes = static_cast<std::size_t>(preset.word_bytes);
    const std::size_t from = begin <= first ? 0 : (begin - first) / bytes, to = (end - first) / bytes;
    const std::uint8_t* words = body + first + from * bytes;
    const bool good = bytes == 4 ? all_below<std::uint32_t>(words, to - from, preset.q)
                                 : all_below<std::uint64_t>(words, to - from, preset.q);
    if (!good) below = false;
  };
  const auto read = kind == Kind::request ? wire::open : wire::open_first;  // a reply may be several blocks
  const wire::Head head = read(kind, message, size, {copy, look});
  residues = below;
  return head;
}

void require_preset(const wire::Head& head, const Preset& preset, const char* what) {
  require(head.parameters == preset.hash,
          std::string(what) + ": made with other parameters than this layer's " + preset.name);
}

void require_residues(bool below, const Preset& preset, const char* what) {
  require(below, std::string(what) + ": a residue is not below q = " + std::to_string(preset.q));
}

}  // namespace

const char* direction_name(Direction direction) { return wire::name(static_cast<wire::Direction>(direction)); }

std::vector<std::uint8_t> LayerSpec::to_bytes() const {
  std::vector<std::uint8_t> message(wire::kHeadBytes + kLayerPrefix + delta.size() * sizeof(double));
  Writer out(message.data() + wire::kHeadBytes);
  out.put(d_out);
  out.put(d_in);
  out.put(norm_forward);
  out.put(norm_backward);
  for (const double value : delta) out.put(value);
  wire::seal(head_of(Kind::layer, *preset, Direction::forward, id, RequestId{}, 0, 0), message.data(), message.size());
  return message;
}

LayerSpec LayerSpec::from_bytes(const std::uint8_t* data, std::size_t size) {
  const wire::Head head = wire::open(Kind::layer, data, size);
  require(head.length >= kLayerPrefix, "layer: truncated");
  LayerSpec result;
  for (const Preset& preset : presets()) {
    if (preset.hash == head.parameters) result.preset = &preset;
  }
  require(result.preset != nullptr, "layer: unknown parameters: install the same privtuner on both sides");
  require(head.direction == wire::Direction::forward && head.request == RequestId{} && head.tokens == 0 &&
              head.features == 0,
          "layer: a field it does not use is not zero");
  result.id = head.subject;
  Reader in(data + wire::kHeadBytes);
  result.d_out = in.get<std::uint32_t>();
  result.d_in = in.get<std::uint32_t>();
  for (const std::uint32_t d : {result.d_out, result.d_in}) {
    require(d >= 1 && d <= gemm::kMaxDepth,
            "layer: dimension " + std::to_string(d) + " is outside [1, " + std::to_string(gemm::kMaxDepth) + "]");
  }
  result.norm_forward = in.get<double>();
  result.norm_backward = in.get<double>();
  require(head.length == kLayerPrefix + result.d_out * sizeof(double), "layer: length does not fit its d_out");
  const auto largest = static_cast<double>(result.preset->max_weight);
  const auto norm_fits = [&](double norm, std::uint32_t length) {
    return norm >= 0 && norm <= largest * std::sqrt(static_cast<double>(length)) * (1 + 1e-9);
  };
  require(norm_fits(result.norm_forward, result.d_in) && norm_fits(result.norm_backward, result.d_out),
          "layer: a norm is outside the range of its weights");
  result.delta.resize(result.d_out);
  for (double& value : result.delta) {
    value = in.get<double>();
    require(value >= 0 && value <= kMaxScale, "layer: a scale is not a float32 from 0 on");
  }
  return result;
}

std::size_t request_bytes(const Preset& preset, std::uint32_t features, std::uint32_t tokens) {
  return kRequestPrefix + std::size_t{features} * tokens * static_cast<std::size_t>(preset.word_bytes);
}

std::size_t block_bytes(const Preset& preset, std::uint32_t rows, std::uint32_t tokens, bool mask) {
  return kBlockPrefix + std::size_t{rows} * (std::size_t{tokens} * static_cast<std::size_t>(preset.reply_bytes) +
                                             (mask ? preset.n * static_cast<std::size_t>(preset.word_bytes) : 0));
}

void seal_request(const Preset& preset, const RequestHeader& header, std::uint8_t* message, std::size_t size) {
  Writer out(message + wire::kHeadBytes);
  out.put(header.seed);
  out.put(header.mask_wanted ? kMaskWanted : 0u);
  out.put(0u);
  wire::seal(
      head_of(Kind::request, preset, header.direction, header.layer, header.request, header.tokens, header.features),
      message, size);
}

RequestHeader open_request(const Preset& preset, const std::uint8_t* message, std::size_t size, std::uint8_t* copy) {
  bool residues = true;
  const wire::Head head = open(Kind::request, preset, message, size, copy, residues);
  require_preset(head, preset, "request");
  require(size >= kRequestPrefix, "request: truncated");
  auto header = header_of<RequestHeader>(head);
  Reader in(message + wire::kHeadBytes);
  header.seed = in.get<std::array<std::uint8_t, 32>>();
  const auto flags = in.get<std::uint32_t>();
  require(flags <= kMaskWanted && in.get<std::uint32_t>() == 0, "request: unknown flags");
  header.mask_wanted = flags == kMaskWanted;
  require(header.tokens >= 1 && header.tokens <= kMaxTokens,
          "request: " + std::to_string(header.tokens) + " tokens, not in [1, " + std::to_string(kMaxTokens) + "]");
  require(header.features >= 1 && header.features <= gemm::kMaxDepth, "request: unusable number of features");
  require(size == request_bytes(preset, header.features, header.tokens),
          "request: length does not fit " + std::to_string(header.features) + " features of " +
              std::to_string(header.tokens) + " tokens");
  require_residues(residues, preset, "request");
  return header;
}

void seal_block(const Preset& preset, const BlockHeader& header, std::uint8_t* message, std::size_t size) {
  Writer out(message + wire::kHeadBytes);
  out.put(header.mask_present ? kMaskWanted : 0u);
  out.put(header.row_begin);
  out.put(header.row_count);
  out.put(0u);
  wire::seal(
      head_of(Kind::reply, preset, header.direction, header.layer, header.request, header.tokens, header.features),
      message, size);
}

BlockHeader open_block(const Preset& preset, const std::uint8_t* message, std::size_t size, std::size_t& block_size,
                       std::uint8_t* copy) {
  bool residues = true;
  const wire::Head head = open(Kind::reply, preset, message, size, copy, residues);
  require_preset(head, preset, "reply block");
  block_size = head.message_bytes();
  require(block_size >= kBlockPrefix, "reply block: truncated");
  auto header = header_of<BlockHeader>(head);
  Reader in(message + wire::kHeadBytes);
  const auto flags = in.get<std::uint32_t>();
  header.row_begin = in.get<std::uint32_t>();
  header.row_count = in.get<std::uint32_t>();
  require(flags <= kMaskWanted && in.get<std::uint32_t>() == 0, "reply block: unknown flags");
  header.mask_present = flags == kMaskWanted;
  require(header.tokens >= 1 && header.tokens <= kMaxTokens && header.features <= gemm::kMaxDepth &&
              header.row_count >= 1 && header.row_begin <= header.features &&
              header.row_count <= header.features - header.row_begin,
          "reply block: unusable shape");
  require(block_size == block_bytes(preset, header.row_count, header.tokens, header.mask_present),
          "reply block: length does not fit its shape");
  require_residues(residues, preset, "reply block");
  return header;
}

}  // namespace privtuner::linear
