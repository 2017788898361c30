// sampled_lora: y_s = base_s + scaling (x_s A_sᵀ) B_sᵀ.
//
// All sums are in float32, and h = x Aᵀ stays in it; only where processors multiply bfloat16 and everything else is
// bfloat16 is h rounded once (see Operands). Every output is summed in one order (see dots.h and rank_update.h), so how the
// work is cut, and over how many threads, changes no bit.

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

constexpr int64_t row_block = 128;
constexpr int64_t column_step = update_vectors * f32::width;

template <class T>
const T* at(const void* p, int64_t offset) {
  return static_cast<const T*>(p) + offset;
}

// Starting threads for less than this many multiply-adds costs more than it gains.
constexpr int64_t worth_threads = 1 << 16;

int team(int threads, int64_t work) { return work < worth_threads ? 1 : threads; }

template <class Y>
SWAG_INLINE void put(Y* p, f32 a) {
  store(p, a);
}
#ifdef __AVX512BF16__
SWAG_INLINE void put(bfloat16* p, f32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)));
}
#endif

template <class Y>
struct AddToBase {
  const Y* base;
  Y* y;
  int64_t ld;
  f32 scaling;
  int64_t ahead;  // to the next rows: each is read in pieces, too short for the hardware to run ahead
  SWAG_INLINE void operator()(int64_t m, int64_t n, f32 sums, int64_t count) const {
    const int64_t i = m * ld + n;
    __builtin_prefetch(base + i + ahead);
    if (count == f32::width)
      put(y + i, muladd(scaling, sums, load(base + i)));
    else
      store(y + i, muladd(scaling, sums, load(base + i, count)), count);
  }
};

// h[rows m0 to m1, columns j0 to j1] of sample s; h has `rank` columns and starts at row m0.
void shrink(const SampledLoraArgs& a, int64_t s, int64_t m0, int64_t m1, int64_t j0, int64_t j1, float* h) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    dots(at<T>(a.x, s * a.stride_x + m0 * a.in), a.in, m1 - m0, at<T>(a.A, s * a.stride_A + j0 * a.in), a.in, j1 - j0, a.in,
         h + j0, a.rank);
  });
}

// What expand() multiplies: h and a panel of B in float32. With an instruction that adds two bfloat16 products to a float32,
// for a result that is rounded to bfloat16 anyway, both in bfloat16: half the instructions, and plain torch rounds h too.
template <class T, class Y>
struct Operands {
  using element = float;
  static constexpr int64_t per_element = 1;
  static const float* coefficients(const float* h, int64_t, int64_t, float*) { return h; }
};
#ifdef __AVX512BF16__
template <>
struct Operands<bfloat16, bfloat16> {
  using element = Pair;
  static constexpr int64_t per_element = 2;
  static const Pair* coefficients(const float* h, int64_t rows, int64_t rank, Pair* rounded) {
    const int64_t depth = ceil_div(rank, 2);
    for (int64_t m = 0; m < rows; ++m) {
      bfloat16* out = reinterpret_cast<bfloat16*>(rounded + m * depth);
      if (rank % 2) __builtin_memset(out + rank, 0, sizeof *out);
      for (int64_t j = 0; j < rank; j += f32::width) {
        const int64_t n = std::min<int64_t>(f32::width, rank - j);
        store(out + j, load(h + m * rank + j, n), n);
      }
    }
    return rounded;
  }
};
#endif

// y[rows m0 to m1, columns n0 to n1] of sample s from its h, which starts at row m0.
template <class T, class Y>
void expand_as(const SampledLoraArgs& a, int64_t s, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const float* h,
               float* scratch) {
  using E = typename Operands<T, Y>::element;
  static_assert(sizeof(E) == sizeof(float));
  const int64_t depth = ceil_div(a.rank, Operands<T, Y>::per_element), columns = panel_columns(depth);
  E* panel = reinterpret_cast<E*>(scratch);
  const E* coefficients = Operands<T, Y>::coefficients(h, m1 - m0, a.rank, panel + panel_size(depth));
  for (int64_t n = n0; n < n1; n += columns) {
    const int64_t count = std::min(columns, n1 - n), ld = panel_ld(count);
    pack_transposed(at<T>(a.B, s * a.stride_B + n * a.rank), count, a.rank, panel, ld);
    const int64_t first = m0 * a.out + n;
    const AddToBase<Y> epilogue{at<Y>(a.base, s * a.stride_base + first), static_cast<Y*>(a.y) + s * a.rows * a.out + first,
                                a.out, f32(a.scaling), m1 - m0 > update_rows ? update_rows * a.out : 0};
    rank_update<E>({coefficients, depth, 1}, m1 - m0, panel, ld, count, depth, epilogue);
  }
}

void expand(const SampledLoraArgs& a, int64_t s, int64_t m0, int64_t m1, int64_t n0, int64_t n1, const float* h,
            float* scratch) {
  with_type(a.dtype, [&](auto t) {
    with_type(a.base_dtype, [&](auto y) { expand_as<decltype(t), decltype(y)>(a, s, m0, m1, n0, n1, h, scratch); });
  });
}

// Floats that expand() needs for a block of rows.
int64_t expand_scratch(int64_t rank, int64_t rows) {
  return std::max(panel_size(rank), panel_size(ceil_div(rank, 2)) + rows * ceil_div(rank, 2));
}

}  // namespace

void sampled_lora(const SampledLoraArgs& a) {
  if (a.samples == 0 || a.rows == 0 || a.out == 0) return;
  const int64_t blocks = ceil_div(a.rows, row_block);
  const int64_t block = ceil_div(a.rows, blocks);
  const int threads = team(a.threads, a.samples * a.rank * (a.in + a.out) * (a.rows + 4));
  if (a.samples * blocks >= 4 * threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Scratch<float> h(block * a.rank), scratch(expand_scratch(a.rank, block));
#pragma omp for schedule(static)
      for (int64_t task = 0; task < a.samples * blocks; ++task) {
        const int64_t s = task / blocks, m0 = task % blocks * block, m1 = std::min(a.rows, m0 + block);
        shrink(a, s, m0, m1, 0, a.rank, h.get());
        expand(a, s, m0, m1, 0, a.out, h.get(), scratch.get());
      }
    }
    return;
  }
  // Fewer blocks than the threads need: h of all blocks first, cut over the rank too, then y, cut over its columns.
  const int64_t rank_blocks = ceil_div(a.rank, dot_columns);
  const int64_t parts = ceil_div(4 * threads, a.samples * blocks);
  const int64_t columns = ceil_div(ceil_div(a.out, parts), column_step) * column_step;
  const int64_t column_blocks = ceil_div(a.out, columns);
  const Scratch<float> h(a.samples * a.rows * a.rank);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scratch<float> scratch(expand_scratch(a.rank, block));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.samples * blocks * rank_blocks; ++task) {
      const int64_t s = task / rank_blocks / blocks, m0 = task / rank_blocks % blocks * block;
      const int64_t j0 = task % rank_blocks * dot_columns;
      shrink(a, s, m0, std::min(a.rows, m0 + block), j0, std::min(a.rank, j0 + dot_columns),
             h.get() + (s * a.rows + m0) * a.rank);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.samples * blocks * column_blocks; ++task) {
      const int64_t s = task / column_blocks / blocks, m0 = task / column_blocks % blocks * block;
      const int64_t n0 = task % column_blocks * columns;
      expand(a, s, m0, std::min(a.rows, m0 + block), n0, std::min(a.out, n0 + columns),
             h.get() + (s * a.rows + m0) * a.rank, scratch.get());
    }
  }
}

}  // namespace swag::SWAG_ISA
