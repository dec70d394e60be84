#include "privtuner/math/memory.hpp"

#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace privtuner::math {
namespace {

constexpr std::size_t kHugePage = std::size_t{1} << 21, kLargeBlock = 4 * kHugePage;

std::align_val_t alignment_of(std::size_t bytes) {
  return std::align_val_t{bytes < kLargeBlock ? kAlignment : kHugePage};
}

}  // namespace

void* allocate_bytes(std::size_t bytes) {
  void* block = ::operator new(bytes, alignment_of(bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kLargeBlock)
    madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish: refusal is no error
#endif
  return block;
}

void free_bytes(void* block, std::size_t bytes) noexcept { ::operator delete(block, alignment_of(bytes)); }

void secure_wipe(void* data, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  std::memset(data, 0, bytes);
  __asm__ __volatile__("" : : "r"(data) : "memory");  // the zeros count as read: the memset must stay
}

}  // namespace privtuner::math
