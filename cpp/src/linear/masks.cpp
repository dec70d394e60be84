#include "privtuner/linear/masks.hpp"

#include <utility>

#include "privtuner/ring/sampling.hpp"

namespace privtuner::linear {

std::size_t mask_product_bytes(const LayerSpec& layer, Direction direction) {
  return std::size_t{layer.features_out(direction)} * layer.preset->n *
         static_cast<std::size_t>(layer.preset->word_bytes);
}

MaskCache::MaskCache(std::size_t max_bytes) : max_bytes_(max_bytes) { ring::os_random(seed_.data(), seed_.size()); }

std::size_t MaskCache::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

MaskCache::Product MaskCache::find(const LayerSpec& layer, Direction direction, const std::string& place) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = entries_.find({layer.id, direction, place});
  const bool fitting = found != entries_.end() && found->second.bytes == mask_product_bytes(layer, direction);
  return fitting ? found->second.product : nullptr;
}

bool MaskCache::fits(const LayerSpec& layer, Direction direction) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return mask_product_bytes(layer, direction) <= max_bytes_ - bytes_;
}

void MaskCache::insert(const LayerSpec& layer, Direction direction, const std::string& place, Product product) {
  const std::size_t bytes = mask_product_bytes(layer, direction);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > max_bytes_ - bytes_) return;
  if (entries_.try_emplace({layer.id, direction, place}, Entry{bytes, std::move(product)}).second) bytes_ += bytes;
}

}  // namespace privtuner::linear
