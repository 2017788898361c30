// sampled_lora for float32, which has no tensor cores of its accuracy: a block makes 4 rows of a sample.
//
// The sum over `in` goes in kSlices slices as on tensor cores; a lane multiplies four neighbours, a warp a slice.

#include "cuda/launch.h"
#include "cuda/sampled_lora_fragments.h"

namespace swag::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTile = 4;  // rows, and ranks of one pass over a slice
constexpr int kMaxRank = 64;

struct Shared {
  float sums[kSlices][kTile][kMaxRank];
  float h[kTile][kMaxRank];
};

template <bool kAligned>
__device__ __forceinline__ float4 load_four(const float* row, int k, int n, bool valid) {
  if constexpr (kAligned) return valid && k < n ? *reinterpret_cast<const float4*>(row + k) : make_float4(0, 0, 0, 0);
  const auto at = [&](int i) { return valid && k + i < n ? row[k + i] : 0.0f; };
  return make_float4(at(0), at(1), at(2), at(3));
}

__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  return core::fma(a.w, b.w, core::fma(a.z, b.z, core::fma(a.y, b.y, core::fma(a.x, b.x, sum))));
}

template <bool kAligned>
__device__ __forceinline__ void shrink_slice(const float* x, const float* A, const LoraParams& p, int rows, int slice, Shared& s) {
  const int lane = threadIdx.x % 32, begin = slice * p.slice, end = min(begin + p.slice, p.in);
  for (int rank = 0; rank < p.rank; rank += kTile) {
    float sums[kTile][kTile] = {};
    for (int k = begin + 4 * lane; k < end; k += 128) {
      float4 a[kTile];
#pragma unroll
      for (int c = 0; c < kTile; ++c)
        a[c] = load_four<kAligned>(A + static_cast<int64_t>(rank + c) * p.in, k, end, rank + c < p.rank);
#pragma unroll
      for (int m = 0; m < kTile; ++m) {
        const float4 row = load_four<kAligned>(x + static_cast<int64_t>(m) * p.in, k, end, m < rows);
#pragma unroll
        for (int c = 0; c < kTile; ++c) sums[m][c] = dot(row, a[c], sums[m][c]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTile; ++m)
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        const float sum = warp_sum(sums[m][c]);
        if (lane == 0) s.sums[slice][m][rank + c] = sum;
      }
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(32 * kWarps, 1) float32_kernel(const __grid_constant__ LoraParams p) {
  auto& s = *shared_memory<Shared>();
  const int tiles = static_cast<int>(ceil_div(p.rows, kTile));
  const int64_t sample = blockIdx.x / tiles, first_row = static_cast<int64_t>(blockIdx.x % tiles) * kTile;
  const int rows = min(static_cast<int>(p.rows - first_row), kTile);
  const float* const x = static_cast<const float*>(p.x) + sample * p.stride_x + first_row * p.in;
  const float* const A = static_cast<const float*>(p.A) + sample * p.stride_A;
  const float* const B = static_cast<const float*>(p.B) + sample * p.stride_B;
  for (int slice = threadIdx.x / 32; slice < kSlices; slice += kWarps) shrink_slice<kAligned>(x, A, p, rows, slice, s);
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kMaxRank; i += 32 * kWarps) {
    const int m = i / kMaxRank, c = i % kMaxRank;
    float sum = 0;
    if (c < p.rank)
      for (int slice = 0; slice < kSlices; ++slice) sum += s.sums[slice][m][c];
    s.h[m][c] = sum;
  }
  __syncthreads();

  const int64_t row = (sample * p.rows + first_row) * p.out, base_row = sample * p.stride_base + first_row * p.out;
  for (int column = threadIdx.x; column < p.out; column += 32 * kWarps) {
    const float* const weights = B + static_cast<int64_t>(column) * p.rank;
    float sums[kTile] = {};
    for (int c = 0; c < p.rank; c += 4) {
      const float4 b = load_four<kAligned>(weights, c, p.rank, true);
#pragma unroll
      for (int m = 0; m < kTile; ++m) sums[m] = dot(*reinterpret_cast<const float4*>(&s.h[m][c]), b, sums[m]);
    }
    with_dtype(p.base_dtype, [&](auto zero) {
      using V = decltype(zero);
#pragma unroll
      for (int m = 0; m < kTile; ++m) {
        if (m >= rows) continue;
        const int64_t o = m * static_cast<int64_t>(p.out) + column;
        const float before = to_float(static_cast<const V*>(p.base)[base_row + o]);
        static_cast<V*>(p.y)[row + o] = round_to<V>(core::fma(p.scaling, sums[m], before));
      }
    });
  }
}

}  // namespace

int launch_float32(const LoraParams& p, int64_t samples, bool aligned, void* stream) {
  const Grid grid{dim3(static_cast<unsigned>(samples * ceil_div(p.rows, kTile))), 32 * kWarps, sizeof(Shared)};
  return launch("sampled_lora's float32 kernel", [&] { return describe(p, samples); }, aligned ? float32_kernel<true> : float32_kernel<false>, grid, stream, p);
}

}  // namespace swag::cuda
