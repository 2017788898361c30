#pragma once

#include <immintrin.h>

#include <cstring>

namespace swag::SWAG_ISA {

struct mask {
  __m256 v;
  mask() = default;
  SWAG_INLINE mask(__m256 v) : v(v) {}
};

struct f32 {
  static constexpr int width = 8;
  __m256 v;
  f32() = default;
  SWAG_INLINE f32(__m256 v) : v(v) {}
  SWAG_INLINE explicit f32(float x) : v(_mm256_set1_ps(x)) {}
};

struct u32 {
  static constexpr int width = 8;
  __m256i v;
  u32() = default;
  SWAG_INLINE u32(__m256i v) : v(v) {}
  SWAG_INLINE explicit u32(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
};

SWAG_INLINE mask first(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}

SWAG_INLINE f32 operator+(f32 a, f32 b) { return _mm256_add_ps(a.v, b.v); }
SWAG_INLINE f32 operator-(f32 a, f32 b) { return _mm256_sub_ps(a.v, b.v); }
SWAG_INLINE f32 operator*(f32 a, f32 b) { return _mm256_mul_ps(a.v, b.v); }
SWAG_INLINE f32 operator/(f32 a, f32 b) { return _mm256_div_ps(a.v, b.v); }
SWAG_INLINE f32 operator-(f32 a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
SWAG_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
SWAG_INLINE f32 fnma(f32 a, f32 b, f32 c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
SWAG_INLINE f32 muladd(f32 a, f32 b, f32 c) { return fma(a, b, c); }
SWAG_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a.v, b.v); }
SWAG_INLINE f32 max(f32 a, f32 b) { return _mm256_max_ps(a.v, b.v); }
SWAG_INLINE f32 sqrt(f32 a) { return _mm256_sqrt_ps(a.v); }
SWAG_INLINE f32 abs(f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
SWAG_INLINE f32 round(f32 a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

SWAG_INLINE mask operator<(f32 a, f32 b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
SWAG_INLINE mask operator<=(f32 a, f32 b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ); }
SWAG_INLINE mask operator>(f32 a, f32 b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
SWAG_INLINE mask operator>=(f32 a, f32 b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ); }
SWAG_INLINE mask operator==(f32 a, f32 b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
SWAG_INLINE mask operator==(u32 a, u32 b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v)); }
SWAG_INLINE mask operator&(mask a, mask b) { return _mm256_and_ps(a.v, b.v); }
SWAG_INLINE mask operator|(mask a, mask b) { return _mm256_or_ps(a.v, b.v); }
SWAG_INLINE f32 select(mask m, f32 a, f32 b) { return _mm256_blendv_ps(b.v, a.v, m.v); }
SWAG_INLINE u32 select(mask m, u32 a, u32 b) { return _mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v)); }

SWAG_INLINE u32 bits(f32 a) { return _mm256_castps_si256(a.v); }
SWAG_INLINE f32 from_bits(u32 a) { return _mm256_castsi256_ps(a.v); }
SWAG_INLINE u32 to_int(f32 a) { return _mm256_cvtps_epi32(a.v); }
SWAG_INLINE f32 from_int(u32 a) { return _mm256_cvtepi32_ps(a.v); }

SWAG_INLINE u32 operator+(u32 a, u32 b) { return _mm256_add_epi32(a.v, b.v); }
SWAG_INLINE u32 operator-(u32 a, u32 b) { return _mm256_sub_epi32(a.v, b.v); }
SWAG_INLINE u32 operator^(u32 a, u32 b) { return _mm256_xor_si256(a.v, b.v); }
SWAG_INLINE u32 operator&(u32 a, u32 b) { return _mm256_and_si256(a.v, b.v); }
SWAG_INLINE u32 operator|(u32 a, u32 b) { return _mm256_or_si256(a.v, b.v); }
SWAG_INLINE u32 operator<<(u32 a, int n) { return _mm256_slli_epi32(a.v, n); }
SWAG_INLINE u32 operator>>(u32 a, int n) { return _mm256_srli_epi32(a.v, n); }
SWAG_INLINE u32 shift_right_signed(u32 a, int n) { return _mm256_srai_epi32(a.v, n); }

// Both halves are exact, so the sum rounds once.
SWAG_INLINE f32 from_uint(u32 a) { return fma(from_int(a >> 16), f32(65536.0f), from_int(a & u32(0xffffu))); }

SWAG_INLINE u32 mul(u32 a, u32 b, u32& high) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

namespace detail {
SWAG_INLINE f32 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
SWAG_INLINE f32 widen_f16(__m128i h) { return _mm256_cvtph_ps(h); }
SWAG_INLINE __m128i narrow_bf16(f32 a) {
  const u32 x = bits(a);
  const u32 rounded = (x + u32(0x7fffu) + ((x >> 16) & u32(1u))) >> 16;
  const __m256i h = select(a == a, rounded, (x >> 16) | u32(0x40u)).v;
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
SWAG_INLINE __m128i narrow_f16(f32 a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SWAG_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
SWAG_INLINE void store16(void* p, __m128i h) { _mm_storeu_si128(static_cast<__m128i*>(p), h); }
SWAG_INLINE __m128i load16(const void* p, int64_t n) {
  uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * 2);
  return load16(buffer);
}
SWAG_INLINE void store16(void* p, __m128i h, int64_t n) {
  uint16_t buffer[8];
  store16(buffer, h);
  std::memcpy(p, buffer, static_cast<size_t>(n) * 2);
}
}  // namespace detail

SWAG_INLINE f32 load(const float* p) { return _mm256_loadu_ps(p); }
SWAG_INLINE f32 load(const bfloat16* p) { return detail::widen_bf16(detail::load16(p)); }
SWAG_INLINE f32 load(const float16* p) { return detail::widen_f16(detail::load16(p)); }
SWAG_INLINE f32 load(const float* p, int64_t n) { return _mm256_maskload_ps(p, _mm256_castps_si256(first(n).v)); }
SWAG_INLINE f32 load(const bfloat16* p, int64_t n) { return detail::widen_bf16(detail::load16(p, n)); }
SWAG_INLINE f32 load(const float16* p, int64_t n) { return detail::widen_f16(detail::load16(p, n)); }

SWAG_INLINE void store(float* p, f32 a) { _mm256_storeu_ps(p, a.v); }
SWAG_INLINE void store(bfloat16* p, f32 a) { detail::store16(p, detail::narrow_bf16(a)); }
SWAG_INLINE void store(float16* p, f32 a) { detail::store16(p, detail::narrow_f16(a)); }
SWAG_INLINE void store(float* p, f32 a, int64_t n) { _mm256_maskstore_ps(p, _mm256_castps_si256(first(n).v), a.v); }
SWAG_INLINE void store(bfloat16* p, f32 a, int64_t n) { detail::store16(p, detail::narrow_bf16(a), n); }
SWAG_INLINE void store(float16* p, f32 a, int64_t n) { detail::store16(p, detail::narrow_f16(a), n); }

SWAG_INLINE void stream(float* p, f32 a) { _mm256_stream_ps(p, a.v); }
SWAG_INLINE void stream(bfloat16* p, f32 a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), detail::narrow_bf16(a)); }
SWAG_INLINE void stream(float16* p, f32 a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), detail::narrow_f16(a)); }
SWAG_INLINE void fence() { _mm_sfence(); }

SWAG_INLINE u32 load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
SWAG_INLINE u32 load(const uint32_t* p, int64_t n) {
  return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_castps_si256(first(n).v));
}
SWAG_INLINE void store(uint32_t* p, u32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
SWAG_INLINE void store(uint32_t* p, u32 a, int64_t n) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(p), _mm256_castps_si256(first(n).v), a.v);
}

SWAG_INLINE float sum(f32 a) {
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
SWAG_INLINE float maximum(f32 a) {
  const __m128 y = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

SWAG_INLINE u32 quad_index() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
SWAG_INLINE void transpose4(f32& a, f32& b, f32& c, f32& d) {
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v)), ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v)), cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
  a = _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0));
  b = _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0));
  c = _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1));
  d = _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1));
}

}  // namespace swag::SWAG_ISA
