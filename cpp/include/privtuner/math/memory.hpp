// Aligned buffers and wiping of secrets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace privtuner::math {

inline constexpr std::size_t kAlignment = 64;

// A store the optimiser may not remove.
void secure_wipe(void* data, std::size_t bytes) noexcept;

// kAlignment for small blocks; large ones lie on huge pages where the system has them, because filling page tables can
// cost as much as the arithmetic on fresh memory. Throws std::bad_alloc.
void* allocate_bytes(std::size_t bytes);
void free_bytes(void* block, std::size_t bytes) noexcept;

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) noexcept {}
  T* allocate(std::size_t n) { return static_cast<T*>(allocate_bytes(n * sizeof(T))); }
  void deallocate(T* p, std::size_t n) noexcept { free_bytes(p, n * sizeof(T)); }
  // Leaves numbers uninitialised on resize: every buffer here is written before it is read.
  template <class U>
  void construct(U* p) noexcept {
    ::new (static_cast<void*>(p)) U;
  }
  template <class U, class... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(static_cast<Args&&>(args)...);
  }
};
template <class T, class U>
bool operator==(const AlignedAllocator<T>&, const AlignedAllocator<U>&) noexcept {
  return true;
}
template <class T, class U>
bool operator!=(const AlignedAllocator<T>&, const AlignedAllocator<U>&) noexcept {
  return false;
}

// 64-byte aligned, uninitialised on resize.
template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

// An AlignedVector of secrets: wiped when released, never copied.
template <class T>
class SecretBuffer {
 public:
  SecretBuffer() = default;
  explicit SecretBuffer(std::size_t n) : data_(n) {}
  SecretBuffer(const SecretBuffer&) = delete;
  SecretBuffer& operator=(const SecretBuffer&) = delete;
  SecretBuffer(SecretBuffer&& other) noexcept : data_(std::move(other.data_)) {}
  SecretBuffer& operator=(SecretBuffer&& other) noexcept {
    wipe();
    data_ = std::move(other.data_);
    return *this;
  }
  ~SecretBuffer() { wipe(); }
  void wipe() noexcept {
    if (!data_.empty()) secure_wipe(data_.data(), data_.size() * sizeof(T));
    data_.clear();
  }
  T* data() noexcept { return data_.data(); }
  const T* data() const noexcept { return data_.data(); }
  std::size_t size() const noexcept { return data_.size(); }
  T& operator[](std::size_t i) noexcept { return data_[i]; }
  const T& operator[](std::size_t i) const noexcept { return data_[i]; }

 private:
  AlignedVector<T> data_;
};

}  // namespace privtuner::math
