#pragma once

// pack_transposed: rows of a [n, depth] matrix become the columns of a float32 panel [depth, ld].

#include <type_traits>

#include "rank_update.h"
#include "simd.h"

namespace swag::SWAG_ISA {

// Four consecutive elements from each of width / 4 addresses p, p + stride, ...
#if defined(SWAG_ISA_avx512)
SWAG_INLINE f32 load_quads(const float* p, int64_t stride) {
  const __m512 a = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(a, _mm_loadu_ps(p + 2 * stride), 2), _mm_loadu_ps(p + 3 * stride), 3);
}
#elif defined(SWAG_ISA_avx2)
SWAG_INLINE f32 load_quads(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
#else
SWAG_INLINE f32 load_quads(const float* p, int64_t) { return load(p); }
#endif

template <class T>
SWAG_INLINE f32 load_quads(const T* p, int64_t stride) {
  T quads[f32::width];
  for (int i = 0; i < f32::width / 4; ++i) __builtin_memcpy(quads + 4 * i, p + i * stride, 8);
  return load(quads);
}

// Columns j to j + 3 of `width` rows.
template <class T>
SWAG_INLINE void pack4(const T* p, int64_t depth, float* panel, int64_t ld) {
  f32 a = load_quads(p, 4 * depth), b = load_quads(p + depth, 4 * depth);
  f32 c = load_quads(p + 2 * depth, 4 * depth), d = load_quads(p + 3 * depth, 4 * depth);
  transpose4(a, b, c, d);
  store(panel, a);
  store(panel + ld, b);
  store(panel + 2 * ld, c);
  store(panel + 3 * ld, d);
}

// Columns j to j + 7 of `width` rows of bfloat16, two to a word: word k of a lane holds columns j + 2 k and j + 2 k + 1.
SWAG_INLINE void load_pairs(const bfloat16* p, int64_t depth, u32 (&pairs)[4]) {
  const float* words = reinterpret_cast<const float*>(p);
  const int64_t row = depth / 2;
  f32 w[4];
  for (int k = 0; k < 4; ++k) w[k] = load_quads(words + k * row, 4 * row);
  transpose4(w[0], w[1], w[2], w[3]);
  for (int k = 0; k < 4; ++k) pairs[k] = bits(w[k]);
}

SWAG_INLINE void pack8(const bfloat16* p, int64_t depth, float* panel, int64_t ld) {
  u32 pairs[4];
  load_pairs(p, depth, pairs);
  for (int k = 0; k < 4; ++k) {
    store(panel + 2 * k * ld, from_bits(pairs[k] << 16));
    store(panel + (2 * k + 1) * ld, from_bits(pairs[k] & u32(0xffff0000u)));
  }
}

template <class T>
void pack_partial(const T* p, int64_t n, int64_t depth, float* panel, int64_t ld) {
  constexpr int W = f32::width;
  float row[W];
  for (int64_t j = 0; j < depth; j += W) {
    const int64_t count = depth - j < W ? depth - j : W;
    for (int64_t i = 0; i < W; ++i) {
      store(row, i < n ? load(p + i * depth + j, count) : f32(0.0f));
      for (int64_t k = 0; k < count; ++k) panel[(j + k) * ld + i] = row[k];
    }
  }
}

// panel[j, i] = p[i, j] for i < n and j < depth; columns n up to a multiple of `width` are zero. ld is at least that multiple.
template <class T>
void pack_transposed(const T* p, int64_t n, int64_t depth, float* panel, int64_t ld) {
  constexpr int W = f32::width;
  int64_t i = 0;
  if (depth % 4 == 0) {
    for (; i + W <= n; i += W) {
      if constexpr (std::is_same_v<T, float>)  // the quads are taken across the rows, which the hardware does not follow
        for (int64_t k = 0; k < W * depth; k += W) __builtin_prefetch(p + (i + 4 * W) * depth + k);
      int64_t j = 0;
      if constexpr (std::is_same_v<T, bfloat16>) {
        if (depth % 8 == 0)
          for (; j < depth; j += 8) pack8(p + i * depth + j, depth, panel + j * ld + i, ld);
      }
      for (; j < depth; j += 4) pack4(p + i * depth + j, depth, panel + j * ld + i, ld);
    }
  }
  for (; i < n; i += W) pack_partial(p + i * depth, n - i < W ? n - i : W, depth, panel + i, ld);
}

#ifdef __AVX512BF16__
// The same with pairs of columns j in each element: the panel is [ceil(depth / 2), ld], an odd last column paired with 0.
inline void pack_transposed(const bfloat16* p, int64_t n, int64_t depth, Pair* panel, int64_t ld) {
  constexpr int W = f32::width;
  for (int64_t i = 0; i < n; i += W) {
    if (depth % 8 == 0 && i + W <= n) {
      for (int64_t j = 0; j < depth; j += 8) {
        u32 pairs[4];
        load_pairs(p + i * depth + j, depth, pairs);
        for (int k = 0; k < 4; ++k) store(reinterpret_cast<uint32_t*>(panel + (j / 2 + k) * ld + i), pairs[k]);
      }
      continue;
    }
    for (int64_t lane = i; lane < i + W; ++lane)
      for (int64_t j = 0; j < depth; j += 2) {
        const uint32_t low = lane < n ? p[lane * depth + j].bits : 0;
        const uint32_t high = lane < n && j + 1 < depth ? p[lane * depth + j + 1].bits : 0;
        panel[j / 2 * ld + lane] = {low | high << 16};
      }
  }
}
#endif

}  // namespace swag::SWAG_ISA
