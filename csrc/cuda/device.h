#pragma once

// What the kernels share: loads and stores of 16 bytes, reductions over a warp, and the counter of calls.

#include "cuda/ptx.h"

namespace swag::cuda {

constexpr int kBlockElements = 1024;  // of the arena; no block straddles two tensors
constexpr unsigned kFullWarp = 0xffffffffu;

// 16 bytes of elements.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T elements[size];
};

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0; }

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(p) = pack;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// How many calls, or samples, came before this one. The high half counts blocks, see advance().
__device__ __forceinline__ uint32_t seen(const int64_t* count) { return static_cast<uint32_t>(*count); }

// Called by one thread of every block, after all threads of the block have read the count: the last block adds `step`. Until
// then the blocks are counted in the high half, so that no memory has to be cleared before the launch.
__device__ __forceinline__ void advance(int64_t* count, uint32_t before, uint32_t step) {
  const unsigned long long one = 1ull << 32;
  const unsigned long long blocks = static_cast<unsigned long long>(gridDim.x) * gridDim.y * gridDim.z;
  const unsigned long long old = atomicAdd(reinterpret_cast<unsigned long long*>(count), one);
  if ((old >> 32) + 1 == blocks) *count = static_cast<int64_t>(before) + step;
}

}  // namespace swag::cuda
