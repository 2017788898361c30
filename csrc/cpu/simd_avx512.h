#pragma once

// GCC before 13 warns about its own undefined pass-through operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace swag::SWAG_ISA {

using mask = __mmask16;

struct f32 {
  static constexpr int width = 16;
  __m512 v;
  f32() = default;
  SWAG_INLINE f32(__m512 v) : v(v) {}
  SWAG_INLINE explicit f32(float x) : v(_mm512_set1_ps(x)) {}
};

struct u32 {
  static constexpr int width = 16;
  __m512i v;
  u32() = default;
  SWAG_INLINE u32(__m512i v) : v(v) {}
  SWAG_INLINE explicit u32(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
};

SWAG_INLINE mask first(int64_t n) { return static_cast<mask>((1u << n) - 1); }

SWAG_INLINE f32 operator+(f32 a, f32 b) { return _mm512_add_ps(a.v, b.v); }
SWAG_INLINE f32 operator-(f32 a, f32 b) { return _mm512_sub_ps(a.v, b.v); }
SWAG_INLINE f32 operator*(f32 a, f32 b) { return _mm512_mul_ps(a.v, b.v); }
SWAG_INLINE f32 operator/(f32 a, f32 b) { return _mm512_div_ps(a.v, b.v); }
SWAG_INLINE f32 operator-(f32 a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
SWAG_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
SWAG_INLINE f32 fnma(f32 a, f32 b, f32 c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
SWAG_INLINE f32 muladd(f32 a, f32 b, f32 c) { return fma(a, b, c); }
SWAG_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a.v, b.v); }
SWAG_INLINE f32 max(f32 a, f32 b) { return _mm512_max_ps(a.v, b.v); }
SWAG_INLINE f32 sqrt(f32 a) { return _mm512_sqrt_ps(a.v); }
SWAG_INLINE f32 abs(f32 a) { return _mm512_abs_ps(a.v); }
SWAG_INLINE f32 round(f32 a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

SWAG_INLINE mask operator<(f32 a, f32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
SWAG_INLINE mask operator<=(f32 a, f32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
SWAG_INLINE mask operator>(f32 a, f32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
SWAG_INLINE mask operator>=(f32 a, f32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
SWAG_INLINE mask operator==(f32 a, f32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
SWAG_INLINE mask operator==(u32 a, u32 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
SWAG_INLINE f32 select(mask m, f32 a, f32 b) { return _mm512_mask_blend_ps(m, b.v, a.v); }
SWAG_INLINE u32 select(mask m, u32 a, u32 b) { return _mm512_mask_blend_epi32(m, b.v, a.v); }

SWAG_INLINE u32 bits(f32 a) { return _mm512_castps_si512(a.v); }
SWAG_INLINE f32 from_bits(u32 a) { return _mm512_castsi512_ps(a.v); }
SWAG_INLINE u32 to_int(f32 a) { return _mm512_cvtps_epi32(a.v); }
SWAG_INLINE f32 from_int(u32 a) { return _mm512_cvtepi32_ps(a.v); }
SWAG_INLINE f32 from_uint(u32 a) { return _mm512_cvtepu32_ps(a.v); }

SWAG_INLINE u32 operator+(u32 a, u32 b) { return _mm512_add_epi32(a.v, b.v); }
SWAG_INLINE u32 operator-(u32 a, u32 b) { return _mm512_sub_epi32(a.v, b.v); }
SWAG_INLINE u32 operator^(u32 a, u32 b) { return _mm512_xor_si512(a.v, b.v); }
SWAG_INLINE u32 operator&(u32 a, u32 b) { return _mm512_and_si512(a.v, b.v); }
SWAG_INLINE u32 operator|(u32 a, u32 b) { return _mm512_or_si512(a.v, b.v); }
SWAG_INLINE u32 operator<<(u32 a, int n) { return _mm512_slli_epi32(a.v, static_cast<unsigned>(n)); }
SWAG_INLINE u32 operator>>(u32 a, int n) { return _mm512_srli_epi32(a.v, static_cast<unsigned>(n)); }
SWAG_INLINE u32 shift_right_signed(u32 a, int n) { return _mm512_srai_epi32(a.v, static_cast<unsigned>(n)); }

SWAG_INLINE u32 mul(u32 a, u32 b, u32& high) {
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
}

namespace detail {
SWAG_INLINE f32 widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
SWAG_INLINE f32 widen_f16(__m256i h) { return _mm512_cvtph_ps(h); }
SWAG_INLINE __m256i narrow_bf16(f32 a) {
  const u32 x = bits(a);
  const u32 rounded = (x + u32(0x7fffu) + ((x >> 16) & u32(1u))) >> 16;
  return _mm512_cvtepi32_epi16(select(a == a, rounded, (x >> 16) | u32(0x40u)).v);
}
SWAG_INLINE __m256i narrow_f16(f32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SWAG_INLINE __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
}  // namespace detail

SWAG_INLINE f32 load(const float* p) { return _mm512_loadu_ps(p); }
SWAG_INLINE f32 load(const bfloat16* p) { return detail::widen_bf16(detail::load16(p)); }
SWAG_INLINE f32 load(const float16* p) { return detail::widen_f16(detail::load16(p)); }
SWAG_INLINE f32 load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
SWAG_INLINE f32 load(const bfloat16* p, int64_t n) { return detail::widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
SWAG_INLINE f32 load(const float16* p, int64_t n) { return detail::widen_f16(_mm256_maskz_loadu_epi16(first(n), p)); }

SWAG_INLINE void store(float* p, f32 a) { _mm512_storeu_ps(p, a.v); }
SWAG_INLINE void store(bfloat16* p, f32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), detail::narrow_bf16(a)); }
SWAG_INLINE void store(float16* p, f32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), detail::narrow_f16(a)); }
SWAG_INLINE void store(float* p, f32 a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
SWAG_INLINE void store(bfloat16* p, f32 a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), detail::narrow_bf16(a)); }
SWAG_INLINE void store(float16* p, f32 a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), detail::narrow_f16(a)); }

SWAG_INLINE void stream(float* p, f32 a) { _mm512_stream_ps(p, a.v); }
SWAG_INLINE void stream(bfloat16* p, f32 a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), detail::narrow_bf16(a)); }
SWAG_INLINE void stream(float16* p, f32 a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), detail::narrow_f16(a)); }
SWAG_INLINE void fence() { _mm_sfence(); }

SWAG_INLINE u32 load(const uint32_t* p) { return _mm512_loadu_si512(p); }
SWAG_INLINE u32 load(const uint32_t* p, int64_t n) { return _mm512_maskz_loadu_epi32(first(n), p); }
SWAG_INLINE void store(uint32_t* p, u32 a) { _mm512_storeu_si512(p, a.v); }
SWAG_INLINE void store(uint32_t* p, u32 a, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), a.v); }

SWAG_INLINE float sum(f32 a) {
  const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
SWAG_INLINE float maximum(f32 a) {
  const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 z = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}

SWAG_INLINE u32 quad_index() { return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); }
SWAG_INLINE void transpose4(f32& a, f32& b, f32& c, f32& d) {
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v)), ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v)), cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
  a = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0));
  b = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
  c = _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1));
  d = _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1));
}

}  // namespace swag::SWAG_ISA
