#include "privtuner/ring/sampling.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include <sys/random.h>

#include "kernels.hpp"
#include "privtuner/math/memory.hpp"
#include "privtuner/ring/chacha20.hpp"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the samplers read keystream words in place: a little-endian processor is needed"
#endif

namespace privtuner::ring {
namespace {

std::size_t blocks_for(std::size_t bytes) { return (bytes + kChaChaBlock - 1) / kChaChaBlock; }

void check_count(std::size_t n) {
  if (n > kMaxSamples) {
    throw std::invalid_argument(std::to_string(n) + " samples in one call; draw at most " +
                                std::to_string(kMaxSamples) + " a stream");
  }
}

// The keystream of one stream, from any block on.
class Keystream {
 public:
  Keystream(const Seed& seed, Stream stream, math::Isa isa) : seed_(seed), isa_(isa) {
    const std::uint32_t words[3] = {static_cast<std::uint32_t>(stream.domain), stream.index, stream.sub_index};
    std::memcpy(nonce_.data(), words, sizeof(words));
  }

  void blocks(std::size_t first, void* out, std::size_t count) const {
    chacha20_keystream(seed_.bytes.data(), nonce_, static_cast<std::uint32_t>(first), static_cast<std::uint8_t*>(out),
                       count, isa_);
  }

  // The first `bytes` bytes, where the last block may be cut.
  void prefix(void* out, std::size_t bytes) const {
    const std::size_t whole = bytes / kChaChaBlock, rest = bytes % kChaChaBlock;
    blocks(0, out, whole);
    if (rest == 0) return;
    std::uint8_t block[kChaChaBlock];
    blocks(whole, block, 1);
    std::memcpy(static_cast<std::uint8_t*>(out) + whole * kChaChaBlock, block, rest);
    math::secure_wipe(block, sizeof(block));
  }

 private:
  const Seed& seed_;
  const math::Isa isa_;
  ChaChaNonce nonce_;
};

// Words from a given block on, one after the other: the replacements of rejected ones.
template <class Word>
class Replacements {
 public:
  Replacements(const Keystream& keystream, std::size_t first_block) : keystream_(keystream), block_(first_block) {}
  Replacements(const Replacements&) = delete;
  Replacements& operator=(const Replacements&) = delete;
  ~Replacements() { math::secure_wipe(words_, sizeof(words_)); }

  // The next word that `accept` takes. How often it refuses says nothing of the words that are kept.
  template <class Accept>
  Word next(Accept accept) {
    for (;;) {
      if (used_ == kWords) {
        keystream_.blocks(block_++, words_, 1);
        used_ = 0;
      }
      const Word word = words_[used_++];
      if (accept(word)) return word;
    }
  }

 private:
  static constexpr std::size_t kWords = kChaChaBlock / sizeof(Word);
  const Keystream& keystream_;
  std::size_t block_;
  std::size_t used_ = kWords;
  Word words_[kWords] = {};
};

template <class Word>
kernels::FirstRejected<Word> first_rejected_of(math::Isa isa) {
  if constexpr (sizeof(Word) == 4) return kernels::kernels_of(isa).sampling.first_rejected32;
  if constexpr (sizeof(Word) == 8) return kernels::kernels_of(isa).sampling.first_rejected64;
}

template <class Word>
void uniform(const Seed& seed, Stream stream, Word q, Word* out, std::size_t n, math::Isa isa) {
  check_count(n);
  if (q < 2) throw std::invalid_argument("q = " + std::to_string(q) + " has no range to draw from; pass q >= 2");
  Word mask = q;
  for (std::size_t shift = 1; shift < 8 * sizeof(Word); shift *= 2) mask = static_cast<Word>(mask | mask >> shift);

  const kernels::FirstRejected<Word> first_rejected = first_rejected_of<Word>(isa);
  const Keystream keystream(seed, stream, isa);
  keystream.prefix(out, n * sizeof(Word));
  Replacements<Word> replacements(keystream, blocks_for(n * sizeof(Word)));
  for (std::size_t i = 0; (i = first_rejected(out, i, n, mask, q)) < n; ++i) {
    out[i] = static_cast<Word>(replacements.next([=](Word word) { return (word & mask) < q; }) & mask);
  }
}

}  // namespace

Seed::~Seed() { math::secure_wipe(bytes.data(), bytes.size()); }

Seed Seed::from_os() {
  Seed seed;
  os_random(seed.bytes.data(), seed.bytes.size());
  return seed;
}

void os_random(void* out, std::size_t bytes) {
  constexpr std::size_t kAtOnce = 256;  // no call of this size is cut short or refused for its size
  for (std::uint8_t* p = static_cast<std::uint8_t*>(out); bytes != 0;) {
    const std::size_t step = std::min(bytes, kAtOnce);
    if (getentropy(p, step) != 0) {
      throw std::runtime_error(std::string("the operating system gave no random bytes: ") + std::strerror(errno));
    }
    p += step;
    bytes -= step;
  }
}

void sample_uniform(const Seed& seed, Stream stream, std::uint32_t q, std::uint32_t* out, std::size_t n,
                    math::Isa isa) {
  uniform(seed, stream, q, out, n, isa);
}

void sample_uniform(const Seed& seed, Stream stream, std::uint64_t q, std::uint64_t* out, std::size_t n,
                    math::Isa isa) {
  uniform(seed, stream, q, out, n, isa);
}

void sample_ternary(const Seed& seed, Stream stream, std::int8_t* out, std::size_t n, math::Isa isa) {
  check_count(n);
  constexpr std::uint8_t kRejected = 255;  // the one byte beyond 85 times {0, 1, 2}
  const Keystream keystream(seed, stream, isa);
  std::uint8_t* const bytes = reinterpret_cast<std::uint8_t*>(out);
  keystream.prefix(bytes, n);
  Replacements<std::uint8_t> replacements(keystream, blocks_for(n));
  for (std::size_t i = 0; i < n; ++i) {
    if (bytes[i] == kRejected) bytes[i] = replacements.next([](std::uint8_t byte) { return byte != kRejected; });
  }
  for (std::size_t i = 0; i < n; ++i) {
    const int byte = bytes[i], third = byte * 171 >> 9;  // floor(byte / 3) for every byte, without a division
    out[i] = static_cast<std::int8_t>(byte - 3 * third - 1);
  }
}

void sample_binomial(const Seed& seed, Stream stream, std::int8_t* out, std::size_t n, math::Isa isa) {
  check_count(n);
  constexpr std::size_t kGroups = 16;  // at once: 4 KiB of keystream
  constexpr std::size_t kGroupBlocks = kernels::kBinomialWords * sizeof(std::uint32_t) / kChaChaBlock;
  const auto binomial = kernels::kernels_of(isa).sampling.binomial;
  const Keystream keystream(seed, stream, isa);
  std::uint32_t words[kGroups * kernels::kBinomialWords];
  std::int8_t last[kernels::kBinomialGroup];
  for (std::size_t block = 0; n != 0;) {
    const std::size_t whole = std::min(n / kernels::kBinomialGroup, kGroups);
    const std::size_t rest = whole < kGroups ? n - whole * kernels::kBinomialGroup : 0;  // below a group, or left over
    const std::size_t groups = whole + (rest != 0);
    keystream.blocks(block, words, groups * kGroupBlocks);
    binomial(words, out, whole);
    if (rest != 0) {
      binomial(words + whole * kernels::kBinomialWords, last, 1);
      std::memcpy(out + whole * kernels::kBinomialGroup, last, rest);
    }
    block += groups * kGroupBlocks;
    out += whole * kernels::kBinomialGroup + rest;
    n -= whole * kernels::kBinomialGroup + rest;
  }
  math::secure_wipe(words, sizeof(words));
  math::secure_wipe(last, sizeof(last));
}

}  // namespace privtuner::ring
