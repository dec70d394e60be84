// AVX-512 (F, BW, DQ, VNNI, IFMA) in plain C++, after Intel's "Intel Intrinsics Guide": the operations that our headers
// and kernels use, so that these themselves run, bit for bit, on processors without it. The names hide the compiler's
// own inside namespace privtuner. Include it first.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Compilers define some as macros, those with immediate operands when they do not optimise.
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_shuffle_epi32
#undef _mm512_mask_shuffle_epi32
#undef _mm512_shuffle_i32x4
#undef _mm512_rol_epi32
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_slli_epi64
#undef _mm512_srli_epi64
#undef _mm512_inserti64x4
#undef _mm512_cmplt_epu32_mask
#undef _mm512_cmpge_epu32_mask
#undef _mm512_cmpge_epu64_mask

namespace privtuner {
namespace avx512_emulation {

struct __m512i {
  alignas(64) std::uint8_t bytes[64];
};
struct __m512d {
  alignas(64) double x[8];
};
struct __m256i {
  alignas(32) std::uint8_t bytes[32];
};

using U8 = std::uint8_t;
using U16 = std::uint16_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;
using I8 = std::int8_t;
using I32 = std::int32_t;
using I64 = std::int64_t;
__extension__ typedef unsigned __int128 U128;

template <class T, class Register>
T lane(const Register& a, std::size_t i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const U8*>(&a) + i * sizeof(T), sizeof(T));
  return value;
}

// The register whose lane i of type T is f(i). Not inlined: the kernels are all unrolled, and would take minutes to
// compile.
template <class T, class Register = __m512i, class F>
__attribute__((noinline)) Register each(F f) {
  T lanes[sizeof(Register) / sizeof(T)];
  for (std::size_t i = 0; i < sizeof(Register) / sizeof(T); ++i) lanes[i] = static_cast<T>(f(i));
  Register result;
  std::memcpy(&result, lanes, sizeof(result));
  return result;
}

template <class T>
bool bit(T mask, std::size_t i) {
  return (static_cast<U64>(mask) >> i & 1) != 0;
}

template <class T, class F>
U64 mask_of(F f) {
  U64 mask = 0;
  for (std::size_t i = 0; i < 64 / sizeof(T); ++i) mask |= static_cast<U64>(f(i)) << i;
  return mask;
}

template <class Register>
Register copy_from(const void* p) {
  Register x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void need_alignment(const void* p, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) std::abort();  // the processor would raise a fault
}

inline __m512i _mm512_loadu_si512(const void* p) { return copy_from<__m512i>(p); }
inline void _mm512_storeu_si512(void* p, __m512i a) { std::memcpy(p, &a, 64); }
inline __m512i _mm512_load_si512(const void* p) { return need_alignment(p, 64), copy_from<__m512i>(p); }
inline void _mm512_store_si512(void* p, __m512i a) { need_alignment(p, 64), std::memcpy(p, &a, 64); }
inline __m256i _mm256_loadu_si256(const void* p) { return copy_from<__m256i>(p); }
inline __m256i _mm256_load_si256(const void* p) { return need_alignment(p, 32), copy_from<__m256i>(p); }
inline void _mm256_storeu_si256(void* p, __m256i a) { std::memcpy(p, &a, 32); }

// Reads what is present and no other word.
template <class T, class Mask>
__m512i masked_load(Mask present, const void* p) {
  return each<T>([&](std::size_t i) {
    T value = 0;
    if (bit(present, i)) std::memcpy(&value, static_cast<const U8*>(p) + i * sizeof(T), sizeof(T));
    return value;
  });
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 k, const void* p) { return masked_load<U32>(k, p); }
inline __m512i _mm512_maskz_loadu_epi64(__mmask8 k, const void* p) { return masked_load<U64>(k, p); }

// One line an operation: lane i of type T is `value`, in which x and y are lanes i of a and b.
#define PRIVTUNER_EACH(T, value)                \
  each<T>([&](std::size_t i) {                  \
    [[maybe_unused]] const T x = lane<T>(a, i); \
    return value;                               \
  })
#define PRIVTUNER_TWO(name, T, value)               \
  inline __m512i name(__m512i a, __m512i b) {       \
    return each<T>([&](std::size_t i) {             \
      const T x = lane<T>(a, i), y = lane<T>(b, i); \
      return value;                                 \
    });                                             \
  }
PRIVTUNER_TWO(_mm512_and_si512, U64, x& y)
PRIVTUNER_TWO(_mm512_xor_si512, U64, x ^ y)
PRIVTUNER_TWO(_mm512_add_epi8, U8, x + y)
PRIVTUNER_TWO(_mm512_add_epi32, U32, x + y)
PRIVTUNER_TWO(_mm512_add_epi64, U64, x + y)
PRIVTUNER_TWO(_mm512_sub_epi32, U32, x - y)
PRIVTUNER_TWO(_mm512_sub_epi64, U64, x - y)
PRIVTUNER_TWO(_mm512_mullo_epi32, U32, x* y)
PRIVTUNER_TWO(_mm512_mullo_epi64, U64, x* y)
PRIVTUNER_TWO(_mm512_mul_epu32, U64, (x & 0xffffffff) * (y & 0xffffffff))
PRIVTUNER_TWO(_mm512_min_epu64, U64, x < y ? x : y)
PRIVTUNER_TWO(_mm512_sllv_epi64, U64, y < 64 ? x << y : 0)

inline __m512i _mm512_setzero_si512() {
  return each<U64>([](std::size_t) { return 0; });
}
inline __m512i _mm512_set1_epi8(int value) {
  return each<U8>([=](std::size_t) { return value; });
}
inline __m512i _mm512_set1_epi32(int value) {
  return each<U32>([=](std::size_t) { return value; });
}
inline __m512i _mm512_set1_epi64(long long value) {
  return each<U64>([=](std::size_t) { return value; });
}
template <class... Values>
__m512i _mm512_setr_epi32(Values... values) {
  static_assert(sizeof...(values) == 16);
  const U32 all[] = {static_cast<U32>(values)...};
  return copy_from<__m512i>(all);
}
template <class... Values>
__m512i _mm512_setr_epi64(Values... values) {
  static_assert(sizeof...(values) == 8);
  const U64 all[] = {static_cast<U64>(values)...};
  return copy_from<__m512i>(all);
}

inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return PRIVTUNER_EACH(U32, n < 32 ? x << n : 0); }
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return PRIVTUNER_EACH(U32, n < 32 ? x >> n : 0); }
inline __m512i _mm512_slli_epi64(__m512i a, unsigned n) { return PRIVTUNER_EACH(U64, n < 64 ? x << n : 0); }
inline __m512i _mm512_srli_epi64(__m512i a, unsigned n) { return PRIVTUNER_EACH(U64, n < 64 ? x >> n : 0); }
inline __m512i _mm512_rol_epi32(__m512i a, int n) { return PRIVTUNER_EACH(U32, x << n | x >> (32 - n)); }

// Within every 128 bits.
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return each<U32>([&](std::size_t i) { return lane<U32>(i % 2 == 0 ? a : b, i / 4 * 4 + i % 4 / 2); });
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return each<U32>([&](std::size_t i) { return lane<U32>(i % 2 == 0 ? a : b, i / 4 * 4 + 2 + i % 4 / 2); });
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return each<U64>([&](std::size_t i) { return lane<U64>(i % 2 == 0 ? a : b, i / 2 * 2); });
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return each<U64>([&](std::size_t i) { return lane<U64>(i % 2 == 0 ? a : b, i / 2 * 2 + 1); });
}
inline __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
  return each<U8>([&](std::size_t i) {
    const U8 index = lane<U8>(b, i);
    return index >= 128 ? 0 : lane<U8>(a, i / 16 * 16 + index % 16);
  });
}
inline __m512i _mm512_shuffle_epi32(__m512i a, int order) {
  return each<U32>([&](std::size_t i) { return lane<U32>(a, i / 4 * 4 + (order >> (2 * (i % 4)) & 3)); });
}

inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  return each<U32>([&](std::size_t i) {
    return lane<U32>(i < 8 ? a : b, 4 * (static_cast<std::size_t>(order) >> (2 * (i / 4)) & 3) + i % 4);
  });
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i index, __m512i b) {
  return each<U32>([&](std::size_t i) {
    const U32 k = lane<U32>(index, i);
    return lane<U32>((k & 16) == 0 ? a : b, k & 15);
  });
}
inline __m512i _mm512_permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
  return each<U64>([&](std::size_t i) {
    const U64 k = lane<U64>(index, i);
    return lane<U64>((k & 8) == 0 ? a : b, k & 7);
  });
}
inline __m512i _mm512_permutexvar_epi32(__m512i index, __m512i a) {
  return each<U32>([&](std::size_t i) { return lane<U32>(a, lane<U32>(index, i) & 15); });
}
inline __m512i _mm512_broadcast_i64x4(__m256i a) {
  return each<U64>([&](std::size_t i) { return lane<U64>(a, i % 4); });
}
inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  return each<U64>([&](std::size_t i) { return lane<U64>(a, i % 2); });
}
inline __m512i _mm512_broadcastq_epi64(__m128i a) {
  return each<U64>([&](std::size_t) { return lane<U64>(a, 0); });
}
inline __m512i _mm512_castsi256_si512(__m256i a) {  // the upper half is anything
  return each<U64>([&](std::size_t i) { return i < 4 ? lane<U64>(a, i) : 0xa5a5a5a5a5a5a5a5u; });
}
inline __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  return each<U64>(
      [&](std::size_t i) { return i / 4 == static_cast<std::size_t>(half) ? lane<U64>(b, i % 4) : lane<U64>(a, i); });
}

// Masks: lane i of the second where bit i is set, else of the first.
template <class T, class Mask>
__m512i blend(Mask k, __m512i clear, __m512i set) {
  return each<T>([&](std::size_t i) { return lane<T>(bit(k, i) ? set : clear, i); });
}
inline __m512i _mm512_mask_blend_epi8(__mmask64 k, __m512i a, __m512i b) { return blend<U8>(k, a, b); }
inline __m512i _mm512_mask_blend_epi16(__mmask32 k, __m512i a, __m512i b) { return blend<U16>(k, a, b); }
inline __m512i _mm512_mask_shuffle_epi32(__m512i kept, __mmask16 k, __m512i a, int order) {
  return blend<U32>(k, kept, _mm512_shuffle_epi32(a, order));
}
inline __m512i _mm512_mask_add_epi32(__m512i kept, __mmask16 k, __m512i a, __m512i b) {
  return blend<U32>(k, kept, _mm512_add_epi32(a, b));
}
inline __m512i _mm512_mask_add_epi64(__m512i kept, __mmask8 k, __m512i a, __m512i b) {
  return blend<U64>(k, kept, _mm512_add_epi64(a, b));
}
inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask_of<U32>([&](std::size_t i) { return lane<U32>(a, i) < lane<U32>(b, i); }));
}
inline __mmask16 _mm512_cmpge_epu32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(mask_of<U32>([&](std::size_t i) { return lane<U32>(a, i) >= lane<U32>(b, i); }));
}
inline __mmask8 _mm512_cmpge_epu64_mask(__m512i a, __m512i b) {
  return static_cast<__mmask8>(mask_of<U64>([&](std::size_t i) { return lane<U64>(a, i) >= lane<U64>(b, i); }));
}
inline __mmask8 _mm512_movepi64_mask(__m512i a) {
  return static_cast<__mmask8>(mask_of<U64>([&](std::size_t i) { return lane<I64>(a, i) < 0; }));
}

// Four products of an unsigned and a signed byte, and their sum.
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  return each<U32>([&](std::size_t i) {
    U32 sum = lane<U32>(sums, i);
    for (std::size_t k = 4 * i; k < 4 * i + 4; ++k) sum += static_cast<U32>(lane<U8>(a, k) * lane<I8>(b, k));
    return sum;
  });
}
inline U128 product52(U64 x, U64 y) {
  constexpr U64 kLow = (U64{1} << 52) - 1;
  return static_cast<U128>(x & kLow) * (y & kLow);
}
inline __m512i _mm512_madd52lo_epu64(__m512i sums, __m512i a, __m512i b) {
  return each<U64>([&](std::size_t i) {
    return lane<U64>(sums, i) + (static_cast<U64>(product52(lane<U64>(a, i), lane<U64>(b, i))) << 12 >> 12);
  });
}
inline __m512i _mm512_madd52hi_epu64(__m512i sums, __m512i a, __m512i b) {
  return each<U64>([&](std::size_t i) {
    return lane<U64>(sums, i) + static_cast<U64>(product52(lane<U64>(a, i), lane<U64>(b, i)) >> 52);
  });
}

inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  return each<U8, __m128i>([&](std::size_t i) { return lane<U32>(a, i); });
}
inline __m256i _mm512_cvtepi64_epi32(__m512i a) {
  return each<U32, __m256i>([&](std::size_t i) { return lane<U64>(a, i); });
}
inline __m512i _mm512_cvtepi32_epi64(__m256i a) {
  return each<I64>([&](std::size_t i) { return lane<I32>(a, i); });
}
template <class F>
__m512d each_real(F f) {
  return each<double, __m512d>(f);
}
inline __m512d _mm512_castsi512_pd(__m512i a) { return copy_from<__m512d>(&a); }
inline __m512i _mm512_castpd_si512(__m512d a) { return copy_from<__m512i>(&a); }
inline __m512d _mm512_cvtepu64_pd(__m512i a) {
  return each_real([&](std::size_t i) { return lane<U64>(a, i); });
}
inline __m512d _mm512_cvtepi64_pd(__m512i a) {
  return each_real([&](std::size_t i) { return lane<I64>(a, i); });
}
inline __m512i _mm512_cvtpd_epi64(__m512d a) {
  return each<I64>([&](std::size_t i) { return std::llrint(a.x[i]); });
}
inline __m512i _mm512_cvttpd_epi64(__m512d a) {
  return each<I64>([&](std::size_t i) { return a.x[i]; });
}
inline __m512d _mm512_set1_pd(double x) {
  return each_real([=](std::size_t) { return x; });
}
inline __m512d _mm512_add_pd(__m512d a, __m512d b) {
  return each_real([&](std::size_t i) { return a.x[i] + b.x[i]; });
}
inline __m512d _mm512_sub_pd(__m512d a, __m512d b) {
  return each_real([&](std::size_t i) { return a.x[i] - b.x[i]; });
}
inline __m512d _mm512_mul_pd(__m512d a, __m512d b) {
  return each_real([&](std::size_t i) { return a.x[i] * b.x[i]; });
}
inline __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return each_real([&](std::size_t i) { return std::fma(a.x[i], b.x[i], c.x[i]); });
}
inline __m512d _mm512_fmsub_pd(__m512d a, __m512d b, __m512d c) {
  return each_real([&](std::size_t i) { return std::fma(a.x[i], b.x[i], -c.x[i]); });
}
inline __m512d _mm512_fnmadd_pd(__m512d a, __m512d b, __m512d c) {
  return each_real([&](std::size_t i) { return std::fma(-a.x[i], b.x[i], c.x[i]); });
}

#undef PRIVTUNER_EACH
#undef PRIVTUNER_TWO

}  // namespace avx512_emulation

using namespace avx512_emulation;

}  // namespace privtuner
