#pragma once

// Panels: float32 copies [depth, ld] of a piece of a matrix, small enough to stay in the first-level cache.

#include <algorithm>

#include "rank_update.h"
#include "simd.h"

namespace swag::SWAG_ISA {

constexpr int64_t panel_floats = 8192;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Columns of a panel of the given depth; a function of the depth alone, so that sums over panels have one order.
inline int64_t panel_columns(int64_t depth) {
  constexpr int64_t step = update_vectors * f32::width;
  return std::max(panel_floats / std::max<int64_t>(depth, 1) / step, int64_t{1}) * step;
}

// One vector more than the columns: the rows of a panel must not all fall into the same cache sets.
inline int64_t panel_ld(int64_t columns) { return (ceil_div(columns, f32::width) + 1) * f32::width; }

inline int64_t panel_size(int64_t depth) { return depth * panel_ld(panel_columns(depth)); }

// panel[k, i] = p[k ldp + i] for k < depth and i < columns, and 0 up to a multiple of `width` columns.
template <class T>
void pack_rows(const T* p, int64_t ldp, int64_t depth, int64_t columns, float* panel, int64_t ld) {
  for (int64_t k = 0; k < depth; ++k) {
    int64_t i = 0;
    for (; i + f32::width <= columns; i += f32::width) store(panel + k * ld + i, load(p + k * ldp + i));
    if (i < columns) store(panel + k * ld + i, load(p + k * ldp + i, columns - i));
  }
}

}  // namespace swag::SWAG_ISA
