#include "privtuner/ckks/tensor.hpp"

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "privtuner/math/parallel.hpp"

namespace privtuner::ckks {

struct Tensor::Storage {
  static std::uint64_t next_number() {
    static std::atomic<std::uint64_t> last{0};
    return ++last;
  }
  const std::uint64_t number = next_number();
  math::AlignedVector<std::uint64_t> words;
  std::size_t bytes;
  std::shared_ptr<Ledger> ledger;
  Storage(std::size_t word_count, bool planned, std::shared_ptr<Ledger> book)
      : words(planned ? 0 : word_count), bytes(word_count * sizeof(std::uint64_t)), ledger(std::move(book)) {
    if (ledger) ledger->add(bytes);
  }
  ~Storage() {
    if (ledger) ledger->remove(bytes);
  }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;
};

Tensor::Tensor(ParametersPtr params, std::size_t token_count, std::size_t feature_count, int at_level,
               bool only_planned, std::shared_ptr<Ledger> ledger)
    : parameters(std::move(params)),
      tokens(token_count),
      features(feature_count),
      level(at_level),
      planned(only_planned),
      scale(feature_count),
      noise(feature_count),
      shared(feature_count),
      storage_(std::make_shared<Storage>(bytes() / sizeof(std::uint64_t), planned, std::move(ledger))),
      words_(storage_->words.data()) {}

Tensor Tensor::view(std::size_t begin, std::size_t end) const {
  Tensor part = *this;
  part.features = end - begin;
  const auto first = static_cast<std::ptrdiff_t>(begin), last = static_cast<std::ptrdiff_t>(end);
  part.scale.assign(scale.begin() + first, scale.begin() + last);
  part.noise.assign(noise.begin() + first, noise.begin() + last);
  part.shared.assign(shared.begin() + first, shared.begin() + last);
  if (begin != 0) part.seed.reset();
  part.first_ = first_ + begin;
  if (!planned) part.words_ = part.words_ + begin * 2 * limbs() * parameters->n();
  return part;
}

TensorRef Tensor::ref() const { return {storage_->number, first_, features, level}; }

Tensor Tensor::moved(bool without_words) const {
  Tensor out(parameters, tokens, features, level, without_words, nullptr);
  out.bound = bound;
  out.scale = scale;
  out.noise = noise;
  out.shared = shared;
  return out;  // without the seed: words that come from elsewhere need not be its
}

Tensor Tensor::as_planned() const { return moved(true); }
Tensor Tensor::with_room() const { return moved(false); }

Tensor Tensor::without_noise() const {
  Tensor out = *this;
  std::fill(out.noise.begin(), out.noise.end(), 0.0);
  std::fill(out.shared.begin(), out.shared.end(), 0.0);
  return out;
}

Tensor Tensor::with_words(const std::uint64_t* words) const {
  Tensor out = with_room();
  const std::size_t n = parameters->n();
  math::parallel_for(features * 2 * limbs(), 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const std::uint64_t q = parameters->prime(i % limbs()).q;
      const std::uint64_t* from = words + i * n;
      std::uint64_t* to = out.words_ + i * n;
      std::uint64_t over = 0;  // no branch a word
      for (std::size_t k = 0; k < n; ++k) {
        over |= static_cast<std::uint64_t>(from[k] >= q);
        to[k] = from[k];
      }
      if (over != 0) throw std::invalid_argument("a word is not below its prime " + std::to_string(q));
    }
  });
  return out;
}

double Tensor::error() const {
  double worst = 0;
  for (std::size_t f = 0; f < features; ++f) worst = std::max(worst, noise[f] / scale[f]);
  return worst;
}

double Tensor::worst_error() const {
  return error() * worst_of(static_cast<double>(features) * static_cast<double>(parameters->slots()));
}

double worst_of(double count) { return std::log(count * 1e6) / std::sqrt(2.0); }

}  // namespace privtuner::ckks
