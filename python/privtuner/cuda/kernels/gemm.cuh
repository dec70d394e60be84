// What a product on the tensor cores needs: byte products of a warp, copies that run beside it, 4 x 4 byte transposes,
// and the way from byte planes' sums back to residues. Each as CUDA and as host C++.
#pragma once

#include "modular.cuh"

namespace pt {

// Bytes of (a, b), a's being 0 to 3 and b's 4 to 7, as the four low digits of `selector` name them, lowest first.
PT_FN u32 byte_permute(u32 a, u32 b, u32 selector) {
#if defined(__CUDACC__)
  return __byte_perm(a, b, selector);
#else
  const u64 both = static_cast<u64>(b) << 32 | a;
  u32 out = 0;
  for (u32 i = 0; i < 4; ++i) out |= static_cast<u32>(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
#endif
}

// plane[p] = byte p of each of four words, the first word's lowest.
PT_FN void split_bytes(const u32 (&word)[4], u32 (&plane)[4]) {
  const u32 low01 = byte_permute(word[0], word[1], 0x5140), low23 = byte_permute(word[2], word[3], 0x5140);
  const u32 high01 = byte_permute(word[0], word[1], 0x7362), high23 = byte_permute(word[2], word[3], 0x7362);
  plane[0] = byte_permute(low01, low23, 0x5410);
  plane[1] = byte_permute(low01, low23, 0x7632);
  plane[2] = byte_permute(high01, high23, 0x5410);
  plane[3] = byte_permute(high01, high23, 0x7632);
}

struct alignas(16) Quad {
  u32 word[4];
};
struct alignas(8) Pair {
  u32 word[2];
};

// Copies of 16 bytes from global to shared memory that run while the thread goes on, in groups. What one wrote may be
// read by its own thread after `wait`, by the block's other threads after a barrier that follows it.
#if defined(__CUDACC__)

class Copies {
 public:
  PT_FN explicit Copies(const Block&) {}
  PT_FN void start(unsigned, void* to, const void* from) {
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }
  // Closes a group: what was started since the last one.
  PT_FN void commit(unsigned) { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until all groups but the last `open` are done.
  template <int open>
  PT_FN void wait(unsigned) {
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
  }
};

#else

class Copies {  // as late as it may: a copy that nobody waited for has not happened
 public:
  explicit Copies(const Block& block) : groups_(block.threads, std::vector<Group>(1)) {}
  void start(unsigned thread, void* to, const void* from) { groups_[thread].back().push_back({to, from}); }
  void commit(unsigned thread) { groups_[thread].emplace_back(); }
  template <int open>
  void wait(unsigned thread) {
    std::vector<Group>& groups = groups_[thread];
    while (groups.size() > open + 1) {  // the last one is not closed
      for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
      groups.erase(groups.begin());
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
  };
  using Group = std::vector<Copy>;
  std::vector<std::vector<Group>> groups_;
};

#endif

// One thread's registers of a product of a 16 x 32 matrix of signed bytes, a 32 x 8 one of unsigned bytes and a 16 x 8
// sum of 32-bit integers. With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k32", 8 bits):
//   a[0], a[1]: row g, row g + 8, columns 4 t to 4 t + 3, lowest byte first; a[2], a[3]: the same 16 columns on.
//   b[0]: rows 4 t to 4 t + 3 of column g; b[1]: the same 16 rows on.
//   c[0], c[1]: row g, columns 2 t, 2 t + 1; c[2], c[3]: the same 8 rows down.
struct Fragments {
  i32* c;
  const u32* a;
  const u32* b;
};

// c += a b for a warp; of(thread) gives the Fragments of one of its threads. The caller sees to it that c does not
// pass 32 bits.
template <class Of>
PT_FN void multiply_bytes(unsigned warp, Of of) {
#if defined(__CUDACC__)
  (void)warp;
  const Fragments f = of(threadIdx.x);
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(f.c[0]), "+r"(f.c[1]), "+r"(f.c[2]), "+r"(f.c[3])
      : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]));
#else
  i8 a[16][32];
  u8 b[8][32];  // by column
  for (u32 lane = 0; lane < kWarp; ++lane) {
    const Fragments f = of(warp * kWarp + lane);
    const u32 g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][4 * t + i / 2 * 16], &f.a[i], 4);
    for (u32 i = 0; i < 2; ++i) std::memcpy(&b[g][4 * t + i * 16], &f.b[i], 4);
  }
  for (u32 lane = 0; lane < kWarp; ++lane) {
    const Fragments f = of(warp * kWarp + lane);
    for (u32 i = 0; i < 4; ++i) {
      const i8* row = a[lane / 4 + i / 2 * 8];
      const u8* column = b[lane % 4 * 2 + i % 2];
      i64 sum = f.c[i];
      for (u32 k = 0; k < 32; ++k) sum += row[k] * column[k];
      if (sum != static_cast<i32>(sum)) __builtin_trap();  // a GPU would wrap around: the caller's bound is wrong
      f.c[i] = static_cast<i32>(sum);
    }
  }
#endif
}

// Constants of an odd modulus q < 2^60 for sums of byte planes. Not a Modulus: with its form of the reduction the
// product in 8 planes has no register left and spills.
struct PlaneModulus {
  u64 q;
  u64 one_shoup;    // floor(2^64 / q)
  u64 offset;       // 2^63 mod q for words of 4 bytes, 2^63 + 2^95 mod q for words of 8
  u64 two32;        // 2^32 mod q
  u64 two32_shoup;  // floor(two32 2^64 / q)

  // [-q, q) to [0, q), as two's complement words.
  PT_FN u64 add_if_negative(u64 x) const { return x + (q & (0 - (x >> 63))); }
  // x mod q for any x: the quotient by one_shoup is at most one short.
  PT_FN u64 reduce(u64 x) const { return add_if_negative(x - mul_high(x, one_shoup) * q - q); }
  // 2^32 x mod q for any x.
  PT_FN u64 times_two32(u64 x) const { return add_if_negative(x * two32 - mul_high(x, two32_shoup) * q - q); }
};

constexpr u32 kModulusWords = sizeof(PlaneModulus) / sizeof(u64);
constexpr u64 kSign = 1ull << 63;

// low mod q, in [0, q); low any signed word. Adding 2^63 makes it an unsigned one.
PT_FN u32 residue(u32, i64 low, i64, const PlaneModulus& m) {
  return static_cast<u32>(m.add_if_negative(m.reduce(static_cast<u64>(low) ^ kSign) - m.offset));
}
// low + 2^32 high mod q, in [0, q); both any signed words.
PT_FN u64 residue(u64, i64 low, i64 high, const PlaneModulus& m) {
  const u64 sum = m.reduce(static_cast<u64>(low) ^ kSign) + m.times_two32(static_cast<u64>(high) ^ kSign);  // [0, 2q)
  return m.add_if_negative(m.add_if_negative(sum - m.offset - m.q));  // (-2q, q) first
}

}  // namespace pt
