// What makes later requests of a layer cost the data half only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "privtuner/linear/messages.hpp"

namespace privtuner::linear {

// Of the product of a layer with a mask: [features out][N] residues.
std::size_t mask_product_bytes(const LayerSpec& layer, Direction direction);

// The products of one public mask with the layers it met, by layer, direction and the place they lie in: the
// processor's memory or a device, whose arrays are not looked into. Public data: the server computed it. Thread-safe.
class MaskCache {
 public:
  using Product = std::shared_ptr<const void>;      // of whatever type its place has
  static constexpr const char* kProcessor = "cpu";  // products are math::AlignedVector<std::uint8_t>

  // At most max_bytes are kept; layers beyond it send their mask product with every reply.
  explicit MaskCache(std::size_t max_bytes);

  const std::array<std::uint8_t, 32>& seed() const { return seed_; }
  std::size_t bytes() const;
  std::size_t max_bytes() const { return max_bytes_; }

  // The complete product of a layer, or null where there is none of its size: the id alone proves nothing.
  Product find(const LayerSpec& layer, Direction direction, const std::string& place) const;
  // Whether the product of a layer may still be kept.
  bool fits(const LayerSpec& layer, Direction direction) const;
  // Keeps a complete product, unless there is one or others filled the cache meanwhile.
  void insert(const LayerSpec& layer, Direction direction, const std::string& place, Product product);

 private:
  struct Entry {
    std::size_t bytes;
    Product product;
  };
  std::array<std::uint8_t, 32> seed_;
  std::size_t max_bytes_;
  mutable std::mutex mutex_;
  std::size_t bytes_ = 0;
  std::map<std::tuple<LayerId, Direction, std::string>, Entry> entries_;
};

}  // namespace privtuner::linear
