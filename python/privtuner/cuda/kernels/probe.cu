// Smallest kernel: the launcher's own test.
#include "modular.cuh"

namespace pt {

// out[i] = high(a[i] b) + (i within its block).
PT_FN void probe(const Block& block, u64* out, const u64* a, u64 b, u32 n) {
  PerThread<u64> kept(block);
  u64* shared = reinterpret_cast<u64*>(block.shared);
  block.each([&](unsigned t) {
    const u32 i = block.x * block.threads + t;
    kept[t] = i < n ? mul_high(a[i], b) : 0;
    shared[t] = t;
  });
  block.each([&](unsigned t) {
    const u32 i = block.x * block.threads + t;
    if (i < n) out[i] = kept[t] + shared[block.threads - 1 - t];
  });
}

}  // namespace pt

PT_KERNEL(probe, 256, (pt::u64* out, const pt::u64* a, pt::u64 b, pt::u32 n), out, a, b, n)
