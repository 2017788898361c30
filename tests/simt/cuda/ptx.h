#pragma once

// The functions of csrc/cuda/ptx.h, on the CPU.

#include <cuda_runtime.h>

#include <cstdint>

namespace swag::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return __uint_as_float(sign | __float_as_uint(magnitude * 0x1p-24f));
  return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
}

template <class T>
T round_to(float x);
template <>
inline float round_to<float>(float x) {
  return x;
}
template <>
inline bfloat16 round_to<bfloat16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 round_to<float16>(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (x != x) return {0x7fff};
  uint32_t half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  if (magnitude < 0x38800000)  // 2^-14: below, the sum's last place is that of a subnormal half
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  if (magnitude >= 0x477ff000) half = 0x7c00;  // 65520
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
uint32_t pack2(float first, float second) {
  return round_to<T>(first).bits | static_cast<uint32_t>(round_to<T>(second).bits) << 16;
}

// 2^x, off by about as much as ex2.approx may be, which gives 1 for 0 and no subnormal numbers.
inline float exp2_approximate(float x) {
  const double off = __float_as_uint(x) & 1 ? 0x1p-23 : -0x1p-23, power = exp2(static_cast<double>(x)) * (1 + off);
  return x == 0 ? 1.0f : power < 0x1p-126 ? 0.0f : static_cast<float>(power);
}

inline void copy_async(void* shared, const void* global, bool valid) { simt::copy_async(shared, global, valid); }
inline void commit_copies() { simt::commit_copies(); }
template <int N>
void wait_for_copies() {
  simt::wait_for_copies(N);
}

struct LoadMatrices {
  uint32_t* words;
  uint32_t row[4];
};
void load_matrices(void* const* operands);

inline void load_matrices(uint32_t (&words)[4], const void* shared_row, int line = __builtin_LINE()) {
  simt::check_shared(shared_row, 16, "loads a matrix from");
  if (reinterpret_cast<uintptr_t>(shared_row) % 16) simt::fault("loads a row of a matrix from no multiple of 16 bytes");
  LoadMatrices operand{words, {}};
  memcpy(operand.row, shared_row, 16);  // before the other lanes have come: what they write is seen after a barrier alone
  simt::across_warp("load_matrices", line, &operand, load_matrices);
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};
template <class T>
void mma(void* const* operands);

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  Mma operand{d, a, b};
  simt::across_warp("mma", line, &operand, mma<T>);
}

inline void sync_cluster(int line = __builtin_LINE()) { simt::across_cluster("sync_cluster", line); }
inline float load_from_block(const float* shared, uint32_t rank) {
  return *static_cast<const float*>(simt::shared_memory_of(rank, shared, sizeof *shared));
}

inline uint32_t add_release(uint32_t* address, uint32_t value) { return atomicAdd(address, value); }
inline uint32_t load_acquire(const uint32_t* address, int line = __builtin_LINE()) {
  if (simt::self->polled == address && simt::self->value == *address) simt::sleep("load_acquire", line);
  simt::self->polled = address;
  return simt::self->value = *address;
}

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(simt::shared_memory());
}

}  // namespace swag::cuda
