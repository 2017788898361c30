#pragma once

// dots: H = X Aᵀ where both operands are contiguous along the axis that is summed.
//
// Every element of H is summed in one order, whatever the number of rows or threads: the lanes of an
// accumulator run along a chunk of fixed length, then the lanes are added, then the chunks.

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace swag::SWAG_ISA {

template <class X, class A>
struct Dot {
  using vector = f32;
  static constexpr int step = f32::width;
  static constexpr int64_t chunk = 64 * step;
  template <class T>
  static SWAG_INLINE vector read(const T* p) { return load(p); }
  template <class T>
  static SWAG_INLINE vector read(const T* p, int64_t n) { return load(p, n); }
  static SWAG_INLINE f32 add(vector x, vector a, f32 sum) { return muladd(x, a, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bfloat16, bfloat16> {
  using vector = __m512i;
  static constexpr int step = 32;
  static constexpr int64_t chunk = 64 * step;
  static SWAG_INLINE vector read(const bfloat16* p) { return _mm512_loadu_si512(p); }
  static SWAG_INLINE vector read(const bfloat16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static SWAG_INLINE f32 add(vector x, vector a, f32 sum) {
    return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(a));
  }
};
#endif

#ifdef SWAG_ISA_avx512
constexpr int dot_columns = 8;
#else
constexpr int dot_columns = 4;
#endif
constexpr int dot_rows = 3;

// out[n] = sum over the lanes of acc[n], for four vectors.
SWAG_INLINE void sum4(f32 a, f32 b, f32 c, f32 d, float* out) {
  transpose4(a, b, c, d);
  float quads[f32::width];
  store(quads, (a + b) + (c + d));
  for (int n = 0; n < 4; ++n) out[n] = quads[n];
  for (int i = 4; i < f32::width; i += 4)
    for (int n = 0; n < 4; ++n) out[n] += quads[i + n];
}

// A tile of MR rows of X by NR rows of A over one chunk.
template <int MR, int NR, class X, class A>
SWAG_INLINE void dot_tile(const X* x, int64_t ldx, const A* const* a, int64_t depth, float* h, int64_t ldh, int64_t columns,
                          bool first) {
  using D = Dot<X, A>;
  f32 acc[MR][NR];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NR; ++n) acc[m][n] = f32(0.0f);
  int64_t k = 0;
  for (; k + D::step <= depth; k += D::step) {
    typename D::vector xs[MR];
    for (int m = 0; m < MR; ++m) {
      if constexpr (MR == dot_rows) __builtin_prefetch(x + (m + MR) * ldx + k);
      xs[m] = D::read(x + m * ldx + k);
    }
    for (int n = 0; n < NR; ++n) {
      const typename D::vector as = D::read(a[n] + k);
      for (int m = 0; m < MR; ++m) acc[m][n] = D::add(xs[m], as, acc[m][n]);
    }
  }
  if (k < depth) {
    for (int m = 0; m < MR; ++m) {
      const typename D::vector xs = D::read(x + m * ldx + k, depth - k);
      for (int n = 0; n < NR; ++n) acc[m][n] = D::add(xs, D::read(a[n] + k, depth - k), acc[m][n]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    float sums[NR];
    for (int n = 0; n < NR; n += 4) sum4(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], sums + n);
    for (int64_t n = 0; n < columns; ++n) h[m * ldh + n] = first ? sums[n] : h[m * ldh + n] + sums[n];
  }
}

template <int NR, class X, class A>
void dot_rows_of(const X* x, int64_t ldx, int64_t rows, const A* const* a, int64_t depth, float* h, int64_t ldh,
                 int64_t columns, bool first) {
  int64_t m = 0;
  for (; m + 3 <= rows; m += 3) dot_tile<3, NR>(x + m * ldx, ldx, a, depth, h + m * ldh, ldh, columns, first);
  if (rows - m == 2) dot_tile<2, NR>(x + m * ldx, ldx, a, depth, h + m * ldh, ldh, columns, first);
  if (rows - m == 1) dot_tile<1, NR>(x + m * ldx, ldx, a, depth, h + m * ldh, ldh, columns, first);
}

// h[m, j] = Σ_k x[m, k] a[j, k], or += where accumulate is set, in float32; h has row stride ldh.
template <class X, class A>
void dots(const X* x, int64_t ldx, int64_t rows, const A* a, int64_t lda, int64_t rank, int64_t depth, float* h,
          int64_t ldh, bool accumulate = false) {
  using D = Dot<X, A>;
  constexpr bool widen = !std::is_same_v<A, float> && D::step == f32::width;
  constexpr int64_t ld_wide = D::chunk + f32::width;
  for (int64_t j = 0; j < rank; j += dot_columns) {
    const int64_t columns = std::min<int64_t>(dot_columns, rank - j);
    for (int64_t k = 0; k == 0 || k < depth; k += D::chunk) {
      const int64_t length = std::min(D::chunk, depth - k);
      const bool first = k == 0 && !accumulate;
      const A* a_rows[dot_columns];
      for (int n = 0; n < dot_columns; ++n) a_rows[n] = a + (j + std::min<int64_t>(n, columns - 1)) * lda + k;
      if constexpr (widen) {
        if (rows > dot_rows) {  // each element of A is used rows / dot_rows times: convert it once
          alignas(64) float wide[dot_columns * ld_wide];
          const float* wide_rows[dot_columns];
          for (int n = 0; n < dot_columns; ++n) {
            wide_rows[n] = wide + n * ld_wide;
            int64_t i = 0;
            for (; i + f32::width <= length; i += f32::width) store(wide + n * ld_wide + i, load(a_rows[n] + i));
            if (i < length) store(wide + n * ld_wide + i, load(a_rows[n] + i, length - i));
          }
          dot_rows_of<dot_columns>(x + k, ldx, rows, wide_rows, length, h + j, ldh, columns, first);
          continue;
        }
      }
      dot_rows_of<dot_columns>(x + k, ldx, rows, a_rows, length, h + j, ldh, columns, first);
    }
  }
}

}  // namespace swag::SWAG_ISA
