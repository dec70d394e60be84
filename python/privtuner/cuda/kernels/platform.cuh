// What the kernels stand on, twice: as CUDA, and as host C++ that runs the same bodies thread by thread.
//
// A kernel body is a function of a Block and of its arguments. It is a sequence of phases, `block.each(f)`, each ending
// in a barrier; f is called with the thread's number. What a thread keeps from one phase to the next lives in a
// PerThread. On the host a phase is a loop over the threads, so a body computes there what a GPU computes, bit for bit,
// and can be tested without one. Within a phase no thread may read what another one writes.
#pragma once

#if defined(__CUDACC__)
#define PT_FN __device__ __forceinline__
#define PT_UNROLL _Pragma("unroll")
#else
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>
#define PT_FN inline
#define PT_UNROLL
#endif

namespace pt {

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr unsigned kWarp = 32;

#if defined(__CUDACC__)

struct Block {
  unsigned x, y, z;   // this block's place in the grid
  unsigned threads;   // of a block
  u8* shared;         // dynamic shared memory, aligned to 16 bytes

  // f(thread) for every thread of the block, then a barrier.
  template <class F>
  PT_FN void each(F f) const {
    f(threadIdx.x);
    __syncthreads();
  }
  // The same without a barrier: for what touches registers and this thread's own words alone.
  template <class F>
  PT_FN void own(F f) const {
    f(threadIdx.x);
  }
  // f(warp) for every warp, with all its lanes: for warp-wide instructions on PerThread values.
  template <class F>
  PT_FN void warps(F f) const {
    f(threadIdx.x / kWarp);
  }
};

template <class T>
struct PerThread {
  T value;
  PT_FN explicit PerThread(const Block&) {}
  PT_FN T& operator[](unsigned) { return value; }
};

#else

struct Block {
  unsigned x, y, z, threads;
  u8* shared;
  bool backwards;  // run the threads in the other order: results must not change

  template <class F>
  void each(F f) const {
    for (unsigned i = 0; i < threads; ++i) f(backwards ? threads - 1 - i : i);
  }
  template <class F>
  void own(F f) const {
    each(f);
  }
  template <class F>
  void warps(F f) const {
    for (unsigned i = 0; i < threads / kWarp; ++i) f(i);
  }
};

template <class T>
struct PerThread {
  std::vector<T> values;
  explicit PerThread(const Block& block) : values(block.threads) {}
  T& operator[](unsigned thread) { return values[thread]; }
};

// Kernels by name, for whoever runs them on the host.
struct Entry {
  const char* name;
  void (*run)(const Block&, void**);
  const Entry* next;
};
inline const Entry*& entries() {
  static const Entry* first = nullptr;
  return first;
}
template <class... Args, unsigned long... I>
void call(void (*body)(const Block&, Args...), const Block& block, void** args, std::index_sequence<I...>) {
  body(block, *static_cast<Args*>(args[I])...);
}
template <class... Args>
void call(void (*body)(const Block&, Args...), const Block& block, void** args) {
  call(body, block, args, std::index_sequence_for<Args...>());
}

#endif

}  // namespace pt

// PT_KERNEL(name, threads, (type a, type b, ...), a, b, ...): the entry point `name` of the body pt::name(block, a, b,
// ...). threads: the most a block has. The parameters are pointers to, or values of, the types above, float or double;
// they are read from the source by whoever launches kernels, so they stand on lines of their own with plain types.
#if defined(__CUDACC__)
#define PT_KERNEL(name, max_threads, params, ...)                                \
  extern "C" __global__ void __launch_bounds__(max_threads) name params {       \
    extern __shared__ __align__(16) unsigned char pt_shared[];                   \
    const pt::Block block{blockIdx.x, blockIdx.y, blockIdx.z, blockDim.x, pt_shared}; \
    pt::name(block, __VA_ARGS__);                                                \
  }
#else
#define PT_STRIP(...) __VA_ARGS__
#define PT_KERNEL(name, max_threads, params, ...)                                                    \
  namespace pt_entries {                                                                             \
  using namespace pt;                                                                                \
  static void name(const Block& block, PT_STRIP params) { pt::name(block, __VA_ARGS__); }            \
  static Entry name##_entry{#name, [](const Block& block, void** args) { call(&name, block, args); }, nullptr}; \
  static const bool name##_known = (name##_entry.next = entries(), entries() = &name##_entry, true); \
  }
#endif
