#include "privtuner/math/memory.hpp"

#include <cstring>

namespace privtuner::math {

void secure_wipe(void* data, std::size_t bytes) noexcept {
  if (bytes == 0) return;
  std::memset(data, 0, bytes);
  __asm__ __volatile__("" : : "r"(data) : "memory");  // the zeros count as read: the memset must stay
}

}  // namespace privtuner::math
