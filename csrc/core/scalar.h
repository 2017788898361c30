#pragma once

// The operations that the templates of this folder are written in, for one float and one uint32_t. They bear the names of
// csrc/cpu/simd.h, so that the same template serves a CPU vector, a CPU scalar and a CUDA thread.

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SWAG_HD __host__ __device__ __forceinline__
#else
#define SWAG_HD inline __attribute__((always_inline))
#endif

namespace swag::core {

SWAG_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// For code that need not give the same bits everywhere.
#if defined(__FP_FAST_FMAF) || defined(__CUDACC__)
SWAG_HD float muladd(float a, float b, float c) { return fma(a, b, c); }
#else
SWAG_HD float muladd(float a, float b, float c) { return a * b + c; }
#endif
#ifdef __CUDA_ARCH__
// Correctly rounded for a >= 2^-101 alone: what the compiler makes of a square root, without the branch for smaller ones.
SWAG_HD float sqrt(float a) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  const float root = a * r;
  return fma(fma(-root, root, a), r * 0.5f, root);
}
#else
SWAG_HD float sqrt(float a) { return __builtin_sqrtf(a); }
#endif
SWAG_HD float min(float a, float b) { return a < b ? a : b; }
SWAG_HD float max(float a, float b) { return a > b ? a : b; }
SWAG_HD float select(bool m, float a, float b) { return m ? a : b; }

SWAG_HD uint32_t bits(float a) {
  uint32_t x;
  memcpy(&x, &a, sizeof x);
  return x;
}
SWAG_HD float from_bits(uint32_t x) {
  float a;
  memcpy(&a, &x, sizeof a);
  return a;
}
SWAG_HD float from_int(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
SWAG_HD float from_uint(uint32_t x) { return static_cast<float>(x); }
SWAG_HD uint32_t shift_right_signed(uint32_t x, int n) { return static_cast<uint32_t>(static_cast<int32_t>(x) >> n); }

SWAG_HD uint32_t mul(uint32_t a, uint32_t b, uint32_t& high) {
#ifdef __CUDA_ARCH__
  uint64_t product;  // in one instruction, where the compiler adds the product of the high halves, which are zero
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
  high = static_cast<uint32_t>(product >> 32);
  return static_cast<uint32_t>(product);
}

}  // namespace swag::core
