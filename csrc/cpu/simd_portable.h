#pragma once

// Four lanes in the compiler's vector extension: SSE2 on any x86-64, NEON on aarch64.

#include <cmath>
#include <cstring>

namespace swag::SWAG_ISA {

using float4 __attribute__((vector_size(16))) = float;
using uint4 __attribute__((vector_size(16))) = uint32_t;
using int4 __attribute__((vector_size(16))) = int32_t;

struct mask {
  int4 v;
  mask() = default;
  SWAG_INLINE mask(int4 v) : v(v) {}
};

struct f32 {
  static constexpr int width = 4;
  float4 v;
  f32() = default;
  SWAG_INLINE f32(float4 v) : v(v) {}
  SWAG_INLINE explicit f32(float x) : v{x, x, x, x} {}
};

struct u32 {
  static constexpr int width = 4;
  uint4 v;
  u32() = default;
  SWAG_INLINE u32(uint4 v) : v(v) {}
  SWAG_INLINE explicit u32(uint32_t x) : v{x, x, x, x} {}
};

SWAG_INLINE u32 bits(f32 a) { return reinterpret_cast<uint4>(a.v); }
SWAG_INLINE f32 from_bits(u32 a) { return reinterpret_cast<float4>(a.v); }

SWAG_INLINE u32 operator+(u32 a, u32 b) { return a.v + b.v; }
SWAG_INLINE u32 operator-(u32 a, u32 b) { return a.v - b.v; }
SWAG_INLINE u32 operator^(u32 a, u32 b) { return a.v ^ b.v; }
SWAG_INLINE u32 operator&(u32 a, u32 b) { return a.v & b.v; }
SWAG_INLINE u32 operator|(u32 a, u32 b) { return a.v | b.v; }
SWAG_INLINE u32 operator<<(u32 a, int n) { return a.v << n; }
SWAG_INLINE u32 operator>>(u32 a, int n) { return a.v >> n; }
SWAG_INLINE u32 shift_right_signed(u32 a, int n) { return reinterpret_cast<uint4>(reinterpret_cast<int4>(a.v) >> n); }

SWAG_INLINE mask first(int64_t n) { return int4{0, 1, 2, 3} < int4{} + static_cast<int>(n); }
SWAG_INLINE mask operator<(f32 a, f32 b) { return a.v < b.v; }
SWAG_INLINE mask operator<=(f32 a, f32 b) { return a.v <= b.v; }
SWAG_INLINE mask operator>(f32 a, f32 b) { return a.v > b.v; }
SWAG_INLINE mask operator>=(f32 a, f32 b) { return a.v >= b.v; }
SWAG_INLINE mask operator==(f32 a, f32 b) { return a.v == b.v; }
SWAG_INLINE mask operator==(u32 a, u32 b) { return reinterpret_cast<int4>(a.v == b.v); }
SWAG_INLINE mask operator&(mask a, mask b) { return a.v & b.v; }
SWAG_INLINE mask operator|(mask a, mask b) { return a.v | b.v; }
SWAG_INLINE u32 select(mask m, u32 a, u32 b) {
  const uint4 k = reinterpret_cast<uint4>(m.v);
  return (a.v & k) | (b.v & ~k);
}
SWAG_INLINE f32 select(mask m, f32 a, f32 b) { return from_bits(select(m, bits(a), bits(b))); }

template <class Op>
SWAG_INLINE f32 each(Op op) {
  return float4{op(0), op(1), op(2), op(3)};
}

SWAG_INLINE f32 operator+(f32 a, f32 b) { return a.v + b.v; }
SWAG_INLINE f32 operator-(f32 a, f32 b) { return a.v - b.v; }
SWAG_INLINE f32 operator*(f32 a, f32 b) { return a.v * b.v; }
SWAG_INLINE f32 operator/(f32 a, f32 b) { return a.v / b.v; }
SWAG_INLINE f32 operator-(f32 a) { return from_bits(bits(a) ^ u32(0x80000000u)); }
SWAG_INLINE f32 fma(f32 a, f32 b, f32 c) {
  return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
SWAG_INLINE f32 fnma(f32 a, f32 b, f32 c) { return fma(-a, b, c); }
#ifdef __FP_FAST_FMAF
SWAG_INLINE f32 muladd(f32 a, f32 b, f32 c) { return fma(a, b, c); }
#else
SWAG_INLINE f32 muladd(f32 a, f32 b, f32 c) { return a * b + c; }
#endif
SWAG_INLINE f32 min(f32 a, f32 b) { return select(a < b, a, b); }
SWAG_INLINE f32 max(f32 a, f32 b) { return select(a > b, a, b); }
SWAG_INLINE f32 sqrt(f32 a) {
  return each([&](int i) { return std::sqrt(a.v[i]); });
}
SWAG_INLINE f32 abs(f32 a) { return from_bits(bits(a) & u32(0x7fffffffu)); }
SWAG_INLINE f32 round(f32 a) {
  return each([&](int i) { return std::nearbyint(a.v[i]); });
}

SWAG_INLINE u32 to_int(f32 a) { return reinterpret_cast<uint4>(__builtin_convertvector(round(a).v, int4)); }
SWAG_INLINE f32 from_int(u32 a) { return __builtin_convertvector(reinterpret_cast<int4>(a.v), float4); }
// Both halves are exact, so the sum rounds once.
SWAG_INLINE f32 from_uint(u32 a) { return from_int(a >> 16) * f32(65536.0f) + from_int(a & u32(0xffffu)); }

SWAG_INLINE u32 mul(u32 a, u32 b, u32& high) {
  const auto product = [&](int i) { return static_cast<uint64_t>(a.v[i]) * b.v[i]; };
  const uint64_t p[4] = {product(0), product(1), product(2), product(3)};
  high = uint4{static_cast<uint32_t>(p[0] >> 32), static_cast<uint32_t>(p[1] >> 32), static_cast<uint32_t>(p[2] >> 32),
               static_cast<uint32_t>(p[3] >> 32)};
  return uint4{static_cast<uint32_t>(p[0]), static_cast<uint32_t>(p[1]), static_cast<uint32_t>(p[2]),
               static_cast<uint32_t>(p[3])};
}

// Scaling by powers of two lets the float unit place and round subnormal halves.
SWAG_INLINE f32 widen(u32 h, float16) {
  const u32 magnitude = (h & u32(0x7fffu)) << 13;
  const f32 finite = from_bits(magnitude) * from_bits(u32(0x77800000u));  // 2^112, the difference of the exponent biases
  const f32 special = from_bits(magnitude | u32(0x7f800000u));
  return from_bits(bits(select(finite < f32(65536.0f), finite, special)) | ((h & u32(0x8000u)) << 16));
}
SWAG_INLINE u32 narrow(f32 a, float16) {
  const u32 sign = (bits(a) >> 16) & u32(0x8000u);
  const f32 x = abs(a);
  const u32 subnormal = bits(x + f32(0.5f)) - bits(f32(0.5f));  // one unit in the last place of 0.5 is 2^-24, as in a half
  const u32 rounded = bits(x) + u32(0xfffu) + ((bits(x) >> 13) & u32(1u));
  const u32 normal = (rounded - u32(112u << 23)) >> 13;
  u32 h = select(x < f32(6.103515625e-05f), subnormal, normal);
  h = select(x >= f32(65520.0f), u32(0x7c00u), h);
  h = select(x == x, h, u32(0x7e00u) | ((bits(x) >> 13) & u32(0x3ffu)));
  return h | sign;
}
SWAG_INLINE f32 widen(u32 h, bfloat16) { return from_bits(h << 16); }
SWAG_INLINE u32 narrow(f32 a, bfloat16) {
  const u32 x = bits(a);
  const u32 rounded = (x + u32(0x7fffu) + ((x >> 16) & u32(1u))) >> 16;
  return select(a == a, rounded, (x >> 16) | u32(0x40u));
}

SWAG_INLINE f32 load(const float* p, int64_t n = 4) {
  float4 v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
SWAG_INLINE u32 load(const uint32_t* p, int64_t n = 4) {
  uint4 v{};
  std::memcpy(&v, p, static_cast<size_t>(n) * 4);
  return v;
}
template <class Half>
SWAG_INLINE f32 load(const Half* p, int64_t n = 4) {
  uint16_t h[4] = {};
  std::memcpy(h, p, static_cast<size_t>(n) * 2);
  return widen(uint4{h[0], h[1], h[2], h[3]}, Half{});
}
SWAG_INLINE void store(float* p, f32 a, int64_t n = 4) { std::memcpy(p, &a.v, static_cast<size_t>(n) * 4); }
SWAG_INLINE void store(uint32_t* p, u32 a, int64_t n = 4) { std::memcpy(p, &a.v, static_cast<size_t>(n) * 4); }
template <class Half>
SWAG_INLINE void store(Half* p, f32 a, int64_t n = 4) {
  const uint4 v = narrow(a, Half{}).v;
  const uint16_t h[4] = {static_cast<uint16_t>(v[0]), static_cast<uint16_t>(v[1]), static_cast<uint16_t>(v[2]),
                         static_cast<uint16_t>(v[3])};
  std::memcpy(p, h, static_cast<size_t>(n) * 2);
}
template <class T>
SWAG_INLINE void stream(T* p, f32 a) {
  store(p, a);
}
SWAG_INLINE void fence() {}

SWAG_INLINE float sum(f32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
SWAG_INLINE float maximum(f32 a) {
  const f32 x = max(a, f32(float4{a.v[2], a.v[3], a.v[2], a.v[3]}));
  return x.v[0] > x.v[1] ? x.v[0] : x.v[1];
}

SWAG_INLINE u32 quad_index() { return uint4{0, 1, 2, 3}; }
SWAG_INLINE void transpose4(f32& a, f32& b, f32& c, f32& d) {
  const float4 x = a.v, y = b.v, z = c.v, w = d.v;
  a = float4{x[0], y[0], z[0], w[0]};
  b = float4{x[1], y[1], z[1], w[1]};
  c = float4{x[2], y[2], z[2], w[2]};
  d = float4{x[3], y[3], z[3], w[3]};
}

}  // namespace swag::SWAG_ISA
