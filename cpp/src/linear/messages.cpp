#include "privtuner/linear/messages.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "privtuner/gemm/gemm.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::linear {
namespace {

using math::Checksum, math::Reader, math::Writer;

enum class Kind : std::uint8_t { public_part = 1, request = 2, block = 3 };

constexpr char kMagic[4] = {'P', 'V', 'T', 'N'};
constexpr std::size_t kChecksumAt = 56;

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::public_part:
      return "public part";
    case Kind::request:
      return "request";
    default:
      return "reply block";
  }
}

constexpr std::size_t kLong = std::size_t{4} << 20;  // bytes of a message that is worth threads

// Fewer threads than parts would read the message several times each.
bool shared_out(std::size_t size) {
  return size >= kLong && static_cast<std::size_t>(math::threads_here()) >= Checksum::kParts;
}

std::uint64_t checksum(const std::uint8_t* message, std::size_t size) {
  Checksum sum;
  sum.add(message, kChecksumAt);
  const std::uint8_t* body = message + kHeaderBytes;
  if (!shared_out(size)) {
    sum.add(body, size - kHeaderBytes);
    return sum.value();
  }
  math::parallel_for(Checksum::kParts, 1,
                     [&](std::size_t part, std::size_t) { sum.add_part(part, body, size - kHeaderBytes); });
  sum.add_length(size - kHeaderBytes);
  return sum.value();
}

struct Header {
  Direction direction;
  LayerId layer;
  RequestId request;
  std::size_t size;      // of the whole message
  bool residues = true;  // whether every word that must be one is below q
};

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

// Where the residues of a message begin, which reach to its end; its size if it has none. From fields that are not
// checked yet: where they are wrong, the message is refused for it.
std::size_t residues_at(Kind kind, const Preset& preset, const std::uint8_t* message, std::size_t size) {
  if (kind == Kind::request) return std::min(size, kRequestPrefix);
  if (kind != Kind::block || size < kBlockPrefix) return size;
  Reader in(message + kHeaderBytes + 8);
  const auto flags = in.get<std::uint32_t>();
  in.skip(4);
  const auto rows = in.get<std::uint32_t>();
  const std::size_t words = flags == kMaskWanted ? rows * preset.n : 0;
  return size - std::min(size - kBlockPrefix, words * static_cast<std::size_t>(preset.word_bytes));
}

// Whether the residues from `residues` on are below q, those whole ones that end by `end`; sets `residues` behind them.
bool residues_below(const Preset& preset, const std::uint8_t* message, std::size_t& residues, std::size_t end) {
  if (end <= residues) return true;
  const auto bytes = static_cast<std::size_t>(preset.word_bytes);
  const std::size_t begin = residues, count = (end - begin) / bytes;
  residues += count * bytes;
  return bytes == 4 ? all_below<std::uint32_t>(message + begin, count, preset.q)
                    : all_below<std::uint64_t>(message + begin, count, preset.q);
}

// The checksum of a message and whether its residues are below q, from one reading, on which it is copied as well if
// there is somewhere to copy it to: what was copied is what was checked.
std::uint64_t read_once(const std::uint8_t* message, std::size_t size, const Preset* preset, std::size_t residues,
                        std::uint8_t* copy, bool& below) {
  constexpr std::size_t kStep = 1024;  // a multiple of the checksum's lanes, near enough for both to be at work at once
  if (copy != nullptr) std::memcpy(copy, message, kHeaderBytes);
  Checksum sum;
  sum.add(message, kChecksumAt);
  for (std::size_t begin = kHeaderBytes; begin < size; begin += kStep) {
    const std::size_t end = begin + std::min(kStep, size - begin);
    if (copy != nullptr) std::memcpy(copy + begin, message + begin, end - begin);
    const std::uint8_t* from = copy != nullptr ? copy : message;
    sum.add(from + begin, end - begin);
    if (preset != nullptr) below &= residues_below(*preset, from, residues, end);
  }
  return sum.value();
}

// The same by threads: each has a few of the checksum's lanes, for which it reads the whole message, and its share of
// the residues.
std::uint64_t read_shared_out(const std::uint8_t* message, std::size_t size, const Preset* preset, std::size_t residues,
                              std::uint8_t* copy, bool& below) {
  constexpr std::size_t kGrain = std::size_t{1} << 20;
  if (copy != nullptr) {
    math::parallel_for(size, kGrain, [&](std::size_t begin, std::size_t end) {
      std::memcpy(copy + begin, message + begin, end - begin);
    });
    message = copy;
  }
  Checksum sum;
  sum.add(message, kChecksumAt);
  std::atomic<bool> good{true};
  const std::size_t share = (size - residues) / Checksum::kParts / 8 * 8;
  math::parallel_for(Checksum::kParts, 1, [&](std::size_t part, std::size_t) {
    sum.add_part(part, message + kHeaderBytes, size - kHeaderBytes);
    if (preset == nullptr) return;
    std::size_t begin = residues + part * share;
    if (!residues_below(*preset, message, begin, part + 1 == Checksum::kParts ? size : begin + share)) good = false;
  });
  sum.add_length(size - kHeaderBytes);
  below &= good;
  return sum.value();
}

void seal(Kind kind, Direction direction, const Preset& preset, const LayerId& layer, const RequestId& request,
          std::uint8_t* message, std::size_t size) {
  Writer out(message);
  out.put(kMagic);
  out.put(kVersion);
  out.put(kind);
  out.put(direction);
  out.put(preset.hash);
  out.put(layer);
  out.put(request);
  out.put(static_cast<std::uint64_t>(size - kHeaderBytes));
  out.put(checksum(message, size));
}

// Checks the header and the checksum of the message at the front of [message, message + size), looks at its residues,
// and copies it if `copy` is not null.
Header open(Kind kind, const Preset* preset, const std::uint8_t* message, std::size_t size,
            std::uint8_t* copy = nullptr) {
  const std::string what = kind_name(kind);
  if (size < kHeaderBytes) {
    throw MessageError(what + " of " + std::to_string(size) + " bytes is shorter than its header of " +
                       std::to_string(kHeaderBytes) + " bytes: truncated?");
  }
  Reader in(message);
  const auto magic = in.get<std::array<char, 4>>();
  if (std::memcmp(magic.data(), kMagic, sizeof(kMagic)) != 0) throw MessageError(what + ": not a privtuner message");
  const auto version = in.get<std::uint16_t>();
  if (version != kVersion) {
    throw MessageError(what + ": message version " + std::to_string(version) + ", this build speaks version " +
                       std::to_string(kVersion) + ": install the same privtuner on both sides");
  }
  const auto found_kind = in.get<std::uint8_t>();
  if (found_kind != static_cast<std::uint8_t>(kind)) {
    throw MessageError("expected a " + what + ", got a message of kind " + std::to_string(found_kind));
  }
  const auto direction = in.get<std::uint8_t>();
  if (direction > 1) throw MessageError(what + ": unknown direction " + std::to_string(direction));
  const auto hash = in.get<std::uint64_t>();
  if (preset != nullptr && hash != preset->hash) {
    throw MessageError(what + ": made with other parameters than this layer's " + preset->name);
  }
  Header header;
  header.direction = static_cast<Direction>(direction);
  header.layer = in.get<LayerId>();
  header.request = in.get<RequestId>();
  const auto length = in.get<std::uint64_t>();
  if (length > size - kHeaderBytes) {
    throw MessageError(what + ": announces " + std::to_string(length) + " bytes after its header, only " +
                       std::to_string(size - kHeaderBytes) + " are here: truncated?");
  }
  header.size = kHeaderBytes + static_cast<std::size_t>(length);
  const std::size_t residues = preset == nullptr ? header.size : residues_at(kind, *preset, message, header.size);
  const auto read = shared_out(header.size) ? read_shared_out : read_once;
  const std::uint64_t sum = read(message, header.size, preset, residues, copy, header.residues);
  if (in.get<std::uint64_t>() != sum) {
    throw MessageError(what + ": checksum mismatch: the message was changed on its way");
  }
  return header;
}

void require(bool condition, const std::string& text) {
  if (!condition) throw MessageError(text);
}

void require_residues(const Header& header, const Preset& preset, const char* what) {
  require(header.residues, std::string(what) + ": a residue is not below q = " + std::to_string(preset.q));
}

}  // namespace

const char* direction_name(Direction direction) { return direction == Direction::forward ? "forward" : "backward"; }

std::vector<std::uint8_t> Public::to_bytes() const {
  std::vector<std::uint8_t> message(kHeaderBytes + 24 + delta.size() * sizeof(double));
  Writer out(message.data() + kHeaderBytes);
  out.put(d_out);
  out.put(d_in);
  out.put(norm_forward);
  out.put(norm_backward);
  for (const double value : delta) out.put(value);
  seal(Kind::public_part, Direction::forward, *preset, id, RequestId{}, message.data(), message.size());
  return message;
}

Public Public::from_bytes(const std::uint8_t* data, std::size_t size) {
  const Header header = open(Kind::public_part, nullptr, data, size);
  require(header.size == size, "public part: " + std::to_string(size - header.size) + " bytes too many");
  require(size >= kHeaderBytes + 24, "public part: truncated");
  Reader hash_at(data + 8);
  const auto hash = hash_at.get<std::uint64_t>();
  Public result;
  for (const Preset& preset : presets()) {
    if (preset.hash == hash) result.preset = &preset;
  }
  require(result.preset != nullptr, "public part: unknown parameters: install the same privtuner on both sides");
  require(header.direction == Direction::forward && header.request == RequestId{},
          "public part: a field it does not use is not zero");
  result.id = header.layer;
  Reader in(data + kHeaderBytes);
  result.d_out = in.get<std::uint32_t>();
  result.d_in = in.get<std::uint32_t>();
  for (const std::uint32_t d : {result.d_out, result.d_in}) {
    require(d >= 1 && d <= gemm::kMaxDepth,
            "public part: dimension " + std::to_string(d) + " is outside [1, " + std::to_string(gemm::kMaxDepth) + "]");
  }
  result.norm_forward = in.get<double>();
  result.norm_backward = in.get<double>();
  require(size == kHeaderBytes + 24 + result.d_out * sizeof(double), "public part: length does not fit its d_out");
  const auto largest = static_cast<double>(result.preset->max_weight);
  const auto norm_fits = [&](double norm, std::uint32_t length) {
    return norm >= 0 && norm <= largest * std::sqrt(static_cast<double>(length)) * (1 + 1e-9);
  };
  require(norm_fits(result.norm_forward, result.d_in) && norm_fits(result.norm_backward, result.d_out),
          "public part: a norm is outside the range of its weights");
  result.delta.resize(result.d_out);
  for (double& value : result.delta) {
    value = in.get<double>();
    require(value >= 0 && value <= kMaxScale, "public part: a scale is not a float32 from 0 on");
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
  Writer out(message + kHeaderBytes);
  out.put(header.seed);
  out.put(header.tokens);
  out.put(header.features);
  out.put(header.mask_wanted ? kMaskWanted : 0u);
  out.put(0u);
  seal(Kind::request, header.direction, preset, header.layer, header.request, message, size);
}

RequestHeader open_request(const Preset& preset, const std::uint8_t* message, std::size_t size, std::uint8_t* copy) {
  const Header common = open(Kind::request, &preset, message, size, copy);
  require(common.size == size, "request: " + std::to_string(size - common.size) + " bytes too many");
  require(size >= kRequestPrefix, "request: truncated");
  RequestHeader header;
  header.direction = common.direction;
  header.layer = common.layer;
  header.request = common.request;
  Reader in(message + kHeaderBytes);
  header.seed = in.get<std::array<std::uint8_t, 32>>();
  header.tokens = in.get<std::uint32_t>();
  header.features = in.get<std::uint32_t>();
  const auto flags = in.get<std::uint32_t>();
  require(flags <= kMaskWanted && in.get<std::uint32_t>() == 0, "request: unknown flags");
  header.mask_wanted = flags == kMaskWanted;
  require(header.tokens >= 1 && header.tokens <= kMaxTokens,
          "request: " + std::to_string(header.tokens) + " tokens, not in [1, " + std::to_string(kMaxTokens) + "]");
  require(header.features >= 1 && header.features <= gemm::kMaxDepth, "request: unusable number of features");
  require(size == request_bytes(preset, header.features, header.tokens),
          "request: length does not fit " + std::to_string(header.features) + " features of " +
              std::to_string(header.tokens) + " tokens");
  require_residues(common, preset, "request");
  return header;
}

void seal_block(const Preset& preset, const BlockHeader& header, std::uint8_t* message, std::size_t size) {
  Writer out(message + kHeaderBytes);
  out.put(header.tokens);
  out.put(header.features);
  out.put(header.mask_present ? kMaskWanted : 0u);
  out.put(header.row_begin);
  out.put(header.row_count);
  out.put(0u);
  seal(Kind::block, header.direction, preset, header.layer, header.request, message, size);
}

BlockHeader open_block(const Preset& preset, const std::uint8_t* message, std::size_t size, std::size_t& block_size,
                       std::uint8_t* copy) {
  const Header common = open(Kind::block, &preset, message, size, copy);
  block_size = common.size;
  require(block_size >= kBlockPrefix, "reply block: truncated");
  BlockHeader header;
  header.direction = common.direction;
  header.layer = common.layer;
  header.request = common.request;
  Reader in(message + kHeaderBytes);
  header.tokens = in.get<std::uint32_t>();
  header.features = in.get<std::uint32_t>();
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
  require_residues(common, preset, "reply block");
  return header;
}

}  // namespace privtuner::linear
