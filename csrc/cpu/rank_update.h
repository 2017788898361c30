#pragma once

// rank_update: products of a [rows, depth] coefficient matrix with a [depth, columns] panel, lanes along the columns.
//
// Every output is summed over the depth in one order, whatever the number of rows, columns or threads.

#include <algorithm>

#include "simd.h"

namespace swag::SWAG_ISA {

// The loops over a tile have to disappear, or its accumulators live in memory.
#define SWAG_UNROLL _Pragma("GCC unroll 16")

#ifdef SWAG_ISA_avx512
constexpr int update_vectors = 4;
#else
constexpr int update_vectors = 2;
#endif
constexpr int update_rows = 6;

// Coefficient (m, k) is at data[m row + k step].
template <class E>
struct Coefficients {
  const E* data;
  int64_t row;
  int64_t step;
};

// One step along the depth, for panels of elements E.
template <class E>
struct Outer;
template <>
struct Outer<float> {
  using vector = f32;
  static SWAG_INLINE vector read(const float* p) { return load(p); }
  static SWAG_INLINE vector broadcast(const float* p) { return f32(*p); }
  static SWAG_INLINE f32 add(vector c, vector p, f32 sum) { return muladd(c, p, sum); }
};

#ifdef __AVX512BF16__
// Two bfloat16 of consecutive depth, the lower one first.
struct Pair {
  uint32_t bits;
};
template <>
struct Outer<Pair> {
  using vector = __m512i;
  static SWAG_INLINE vector read(const Pair* p) { return _mm512_loadu_si512(p); }
  static SWAG_INLINE vector broadcast(const Pair* p) { return _mm512_set1_epi32(static_cast<int>(p->bits)); }
  static SWAG_INLINE f32 add(vector c, vector p, f32 sum) {
    return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(c), reinterpret_cast<__m512bh>(p));
  }
};
#endif

// Longest chain of additions: longer sums are cut, as their rounding errors would grow; sooner where products round too.
constexpr int64_t update_depth = f32::width > 4 ? 64 : 16;

template <int MR, int NV, class E>
SWAG_INLINE void multiply_tile(const E* data, Coefficients<E> c, const E* panel, int64_t ld, int64_t depth,
                               f32 (&acc)[MR][NV]) {
  SWAG_UNROLL for (int i = 0; i < MR; ++i)
    SWAG_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = f32(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    typename Outer<E>::vector p[NV];
    SWAG_UNROLL for (int v = 0; v < NV; ++v) p[v] = Outer<E>::read(panel + k * ld + v * f32::width);
    SWAG_UNROLL for (int i = 0; i < MR; ++i) {
      const typename Outer<E>::vector h = Outer<E>::broadcast(data + i * c.row + k * c.step);
      SWAG_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Outer<E>::add(h, p[v], acc[i][v]);
    }
  }
}

template <int MR, int NV, bool Long, class E, class Epilogue>
SWAG_INLINE void update_tile(Coefficients<E> c, int64_t m, const E* panel, int64_t ld, int64_t n, int64_t columns,
                             int64_t depth, const Epilogue& epilogue) {
  const E* data = c.data + m * c.row;
  f32 sums[MR][NV];
  multiply_tile(data, c, panel + n, ld, Long ? update_depth : depth, sums);
  for (int64_t k = update_depth; Long && k < depth; k += update_depth) {
    f32 acc[MR][NV];
    multiply_tile(data + k * c.step, c, panel + k * ld + n, ld, std::min(depth - k, update_depth), acc);
    SWAG_UNROLL for (int i = 0; i < MR; ++i)
      SWAG_UNROLL for (int v = 0; v < NV; ++v) sums[i][v] = sums[i][v] + acc[i][v];
  }
  SWAG_UNROLL for (int i = 0; i < MR; ++i)
    SWAG_UNROLL for (int v = 0; v < NV; ++v)
      epilogue(m + i, n + v * f32::width, sums[i][v], std::min<int64_t>(f32::width, columns - n - v * f32::width));
}

template <int MR, bool Long, class E, class Epilogue>
void update_columns(Coefficients<E> c, int64_t m, const E* panel, int64_t ld, int64_t columns, int64_t depth,
                    const Epilogue& epilogue) {
  constexpr int W = f32::width;
  int64_t n = 0;
  for (; n + update_vectors * W <= columns; n += update_vectors * W)
    update_tile<MR, update_vectors, Long>(c, m, panel, ld, n, columns, depth, epilogue);
  for (; n < columns; n += W) update_tile<MR, 1, Long>(c, m, panel, ld, n, columns, depth, epilogue);
}

template <int MR, class E, class Epilogue>
void update_rows_of(Coefficients<E> c, int64_t m, const E* panel, int64_t ld, int64_t columns, int64_t depth,
                    const Epilogue& epilogue) {
  if (depth > update_depth)
    update_columns<MR, true>(c, m, panel, ld, columns, depth, epilogue);
  else
    update_columns<MR, false>(c, m, panel, ld, columns, depth, epilogue);
}

// Calls epilogue(m, n, sums, count) with Σ_k c(m, k) panel[k, n + lane] for every row m and every vector of columns, of
// which the first `count` lanes exist. The panel is readable up to a multiple of `width` columns.
template <class E, class Epilogue>
void rank_update(Coefficients<E> c, int64_t rows, const E* panel, int64_t ld, int64_t columns, int64_t depth,
                 const Epilogue& epilogue) {
  int64_t m = 0;
  for (; m + update_rows <= rows; m += update_rows) update_rows_of<update_rows>(c, m, panel, ld, columns, depth, epilogue);
  switch (rows - m) {
    case 5: return update_rows_of<5>(c, m, panel, ld, columns, depth, epilogue);
    case 4: return update_rows_of<4>(c, m, panel, ld, columns, depth, epilogue);
    case 3: return update_rows_of<3>(c, m, panel, ld, columns, depth, epilogue);
    case 2: return update_rows_of<2>(c, m, panel, ld, columns, depth, epilogue);
    case 1: return update_rows_of<1>(c, m, panel, ld, columns, depth, epilogue);
  }
}

}  // namespace swag::SWAG_ISA
