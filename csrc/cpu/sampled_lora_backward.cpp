// Gradients of sampled_lora. With H = x Aᵀ and G = scaling grad B:
//
//   dx = G A, summed over the samples in ascending order where x was broadcast;  dA = Gᵀ x;  dB = scaling gradᵀ H
//
// Every output belongs to one task and is summed in one order, so the number of threads changes no bit.

#include <algorithm>

#include "dots.h"
#include "dtypes.h"
#include "kernels.h"
#include "panel.h"
#include "rank_update.h"
#include "scratch.h"
#include "transpose.h"

namespace swag::SWAG_ISA {
namespace {

using Args = SampledLoraBackwardArgs;

constexpr int64_t row_block = 96;
constexpr int64_t outer_columns = 128;  // of one task of dA and dB
constexpr int64_t outer_depth = panel_floats / outer_columns;

template <class T>
const T* at(const void* p, int64_t offset) {
  return static_cast<const T*>(p) + offset;
}

struct Assign {
  float* out;
  int64_t ld;
  bool accumulate;
  SWAG_INLINE void operator()(int64_t m, int64_t n, f32 sums, int64_t count) const {
    float* p = out + m * ld + n;
    store(p, accumulate ? load(p, count) + sums : sums, count);
  }
};

// H rows m0 to m1 of sample s.
void hidden(const Args& a, int64_t s, int64_t m0, int64_t m1, float* H) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    dots(at<T>(a.x, s * a.stride_x + m0 * a.in), a.in, m1 - m0, at<T>(a.A, s * a.stride_A), a.in, a.rank, a.in, H, a.rank);
  });
}

// G rows m0 to m1 of sample s.
void hidden_gradient(const Args& a, int64_t s, int64_t m0, int64_t m1, float* G, float* panel) {
  const int64_t columns = panel_columns(a.rank);
  for (int64_t n = 0; n == 0 || n < a.out; n += columns) {
    const int64_t count = std::min(columns, a.out - n), ld = panel_ld(count);
    with_type(a.dtype, [&](auto t) {
      using T = decltype(t);
      pack_transposed(at<T>(a.B, s * a.stride_B + n * a.rank), count, a.rank, panel, ld);
    });
    with_type(a.base_dtype, [&](auto t) {
      using Y = decltype(t);
      dots(at<Y>(a.grad, (s * a.rows + m0) * a.out + n), a.out, m1 - m0, static_cast<const float*>(panel), ld, a.rank, count, G,
           a.rank, n > 0);
    });
  }
  for (int64_t i = 0; i < (m1 - m0) * a.rank; ++i) G[i] *= a.scaling;
}

// dx rows m0 to m1, columns n0 to n1 of samples s0 to s1, which are added up.
void input_gradient(const Args& a, int64_t s0, int64_t s1, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const float* G,
                    float* dx, float* panel) {
  const int64_t ld = panel_ld(n1 - n0);
  for (int64_t s = s0; s < s1; ++s) {
    with_type(a.dtype, [&](auto t) {
      using T = decltype(t);
      pack_rows(at<T>(a.A, s * a.stride_A + n0), a.in, a.rank, n1 - n0, panel, ld);
    });
    rank_update<float>({G + (s * a.rows + m0) * a.rank, a.rank, 1}, m1 - m0, panel, ld, n1 - n0, a.rank,
                Assign{dx + m0 * a.in + n0, a.in, s > s0});
  }
}

// out[j, n] = Σ_m c[m, j] p[m, n] for `columns` columns: c is [rows, rank], p and out have row strides ldp and ldo.
template <class T>
void outer(const Args& a, const float* c, const T* p, int64_t ldp, int64_t columns, float* out, int64_t ldo, float* panel) {
  const int64_t ld = panel_ld(columns);
  for (int64_t m = 0; m == 0 || m < a.rows; m += outer_depth) {
    const int64_t depth = std::min(outer_depth, a.rows - m);
    pack_rows(p + m * ldp, ldp, depth, columns, panel, ld);
    rank_update<float>({c + m * a.rank, 1, a.rank}, a.rank, panel, ld, columns, depth, Assign{out, ldo, m > 0});
  }
}

void a_gradient(const Args& a, int64_t s, int64_t n0, int64_t n1, const float* G, float* panel) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    outer(a, G + s * a.rows * a.rank, at<T>(a.x, s * a.stride_x + n0), a.in, n1 - n0, a.dA + s * a.rank * a.in + n0, a.in,
          panel);
  });
}

void b_gradient(const Args& a, int64_t s, int64_t n0, int64_t n1, const float* H, float* panel, float* tile) {
  with_type(a.base_dtype, [&](auto t) {
    using Y = decltype(t);
    outer(a, H + s * a.rows * a.rank, at<Y>(a.grad, s * a.rows * a.out + n0), a.out, n1 - n0, tile, outer_columns, panel);
  });
  for (int64_t n = n0; n < n1; ++n)
    for (int64_t j = 0; j < a.rank; ++j) a.dB[(s * a.out + n) * a.rank + j] = a.scaling * tile[j * outer_columns + n - n0];
}

}  // namespace

void sampled_lora_backward(const Args& a) {
  if (a.samples == 0) return;
  const int64_t blocks = ceil_div(a.rows, row_block);
  const bool summed = a.stride_x == 0;
  const int64_t outputs = summed ? 1 : a.samples, terms = summed ? a.samples : 1;
  const int64_t dx_columns = panel_columns(a.rank);
  const int64_t dx_parts = ceil_div(a.in, dx_columns);
  const int64_t A_parts = ceil_div(a.in, outer_columns), B_parts = ceil_div(a.out, outer_columns);
  const Scratch<float> G(a.samples * a.rows * a.rank), H(a.samples * a.rows * a.rank);
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
  {
    const Scratch<float> panel(std::max(panel_size(a.rank), outer_depth * panel_ld(outer_columns)));
    const Scratch<float> tile(a.rank * outer_columns);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.samples * blocks; ++task) {
      const int64_t s = task / blocks, m0 = task % blocks * row_block, m1 = std::min(a.rows, m0 + row_block);
      const int64_t offset = (s * a.rows + m0) * a.rank;
      if (a.dB) hidden(a, s, m0, m1, H.get() + offset);
      if (a.dx || a.dA) hidden_gradient(a, s, m0, m1, G.get() + offset, panel.get());
    }
    if (a.dx) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < outputs * blocks * dx_parts; ++task) {
        const int64_t s = task / dx_parts / blocks, m0 = task / dx_parts % blocks * row_block;
        const int64_t n0 = task % dx_parts * dx_columns;
        input_gradient(a, s, s + terms, m0, std::min(a.rows, m0 + row_block), n0, std::min(a.in, n0 + dx_columns), G.get(),
                       a.dx + s * a.rows * a.in, panel.get());
      }
    }
    if (a.dA) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < a.samples * A_parts; ++task) {
        const int64_t n0 = task % A_parts * outer_columns;
        a_gradient(a, task / A_parts, n0, std::min(a.in, n0 + outer_columns), G.get(), panel.get());
      }
    }
    if (a.dB) {
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < a.samples * B_parts; ++task) {
        const int64_t n0 = task % B_parts * outer_columns;
        b_gradient(a, task / B_parts, n0, std::min(a.out, n0 + outer_columns), H.get(), panel.get(), tile.get());
      }
    }
  }
}

}  // namespace swag::SWAG_ISA
