#pragma once

// sampled_lora on tensor cores: the blocks of a cluster, or one block, share kTiles tiles of rows of one sample.
//
// Bound by how fast x, A, B and base come from memory: all warps multiply slices at once while the first columns of B are
// on their way to shared memory; their sums are exchanged through shared memory; then each warp makes columns of its own,
// the next ones' B and base in flight. x is read once, base is read and written once.

#include "cuda/launch.h"
#include "cuda/sampled_lora_fragments.h"

namespace swag::cuda {

// kEights eights of rank, a cluster of kBlocks blocks of kWarps warps.
template <class T_, int kEights_, bool kAligned_, int kTiles_, int kBlocks_, int kWarps_>
struct LoraShape {
  using T = T_;
  static constexpr int kEights = kEights_, kTiles = kTiles_, kBlocks = kBlocks_, kWarps = kWarps_;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWidth = 8 * kEights;
  static constexpr int kSlicesEach = kSlices / (kBlocks * kWarps);
  static constexpr int kStages = kEights == 8 ? 2 : kEights == 4 ? 3 : 4;
  static constexpr int kAhead = kTiles > 1 ? (kEights > 2 ? 1 : 2) : kEights < 8 ? 8 / kEights : 1;
  static constexpr int kBlocksAtOnce = kTiles > 1 && kEights <= 2 ? 2 : 1;  // of a multiprocessor, to have more loads in flight
  static constexpr int kTurn = kBlocks * kWarps * kGroup;  // columns of all warps
  // In which the warps' sums pass through shared memory, of which sm_86 and sm_89 have 99 KB.
  static constexpr int kRounds = kTiles * kEights > 8 ? 4 : 1;
  static constexpr int kPairs = (kTiles * kRows * kWidth / 2 + kThreads - 1) / kThreads;  // of sums, for a thread
  static_assert(kSlicesEach == 1 || kSlicesEach == 2);

  struct Shared {
    uint4 b[kWarps][kStages][kGroup * kEights];
    float sums[kWarps / kRounds][kTiles * kRows][kWidth];
    uint32_t h[kTiles * kRows][kWidth / 2];
  };
};

template <class Shape>
using Sums = float[Shape::kTiles][Shape::kEights][4];

// The sum of a warp's slices.
template <class Shape>
__device__ __forceinline__ void multiply_slices(const typename Shape::T* x, const typename Shape::T* A, const LoraParams& p,
                                                int rows, int warp, Sums<Shape>& sums) {
#pragma unroll
  for (int i = 0; i < Shape::kSlicesEach; ++i) {
    const int begin = (warp * Shape::kSlicesEach + i) * p.slice;
    Sums<Shape> slice = {};
    shrink<typename Shape::T, Shape::kEights, Shape::kAligned, Shape::kTiles, Shape::kAhead>(x, A, p, rows, begin,
                                                                                            min(begin + p.slice, p.in), slice);
#pragma unroll
    for (int t = 0; t < Shape::kTiles; ++t)
#pragma unroll
      for (int c = 0; c < Shape::kEights; ++c)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[t][c][j] = i == 0 ? slice[t][c][j] : sums[t][c][j] + slice[t][c][j];
  }
}

template <class Shape>
__device__ __forceinline__ void keep_sums(const Sums<Shape>& sums, float (&kept)[Shape::kTiles * kRows][Shape::kWidth]) {
  const Lane at;
#pragma unroll
  for (int t = 0; t < Shape::kTiles; ++t)
#pragma unroll
    for (int c = 0; c < Shape::kEights; ++c)
#pragma unroll
      for (int j = 0; j < 4; ++j) kept[t * kRows + j / 2 * 8 + at.row][8 * c + 2 * at.quad + j % 2] = sums[t][c][j];
}

// total plus the sums at an address of a round's warps of all blocks, in order; two slices are added before they join.
template <class Shape>
__device__ __forceinline__ float add_warps(float total, const float* sum) {
  constexpr int warps = Shape::kWarps / Shape::kRounds, stride = Shape::kTiles * kRows * Shape::kWidth;
#pragma unroll
  for (int warp = 0; warp < Shape::kBlocks * warps; warp += 2 / Shape::kSlicesEach) {
    const auto of = [&](int w) {
      const float* const own = sum + w % warps * stride;
      return Shape::kBlocks > 1 ? load_from_block(own, w / warps) : *own;
    };
    total += Shape::kSlicesEach == 2 ? of(warp) : of(warp) + of(warp + 1);
  }
  return total;
}

template <class Shape>
__device__ __forceinline__ void sync_blocks() {
  if constexpr (Shape::kBlocks > 1)
    sync_cluster();
  else
    __syncthreads();
}

// h [kTiles kRows, rank] of a warp's and all others' sums, in the dtype of B; zero for ranks that do not exist.
template <class Shape>
__device__ __forceinline__ void exchange(const Sums<Shape>& sums, const LoraParams& p, int rows, typename Shape::Shared& s) {
  constexpr int warps = Shape::kWarps / Shape::kRounds;
  const int warp = threadIdx.x / 32;
  float totals[Shape::kPairs][2] = {};
#pragma unroll 1
  for (int round = 0; round < Shape::kRounds; ++round) {
    if (round > 0) __syncthreads();
    if (warp / warps == round) keep_sums<Shape>(sums, s.sums[warp % warps]);
    sync_blocks<Shape>();
#pragma unroll
    for (int i = 0; i < Shape::kPairs; ++i) {
      const int pair = i * Shape::kThreads + threadIdx.x, row = 2 * pair / Shape::kWidth, c = 2 * pair % Shape::kWidth;
      if (row >= rows) continue;
      if (c < p.rank) totals[i][0] = add_warps<Shape>(totals[i][0], &s.sums[0][row][c]);
      if (c + 1 < p.rank) totals[i][1] = add_warps<Shape>(totals[i][1], &s.sums[0][row][c + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < Shape::kPairs; ++i) {
    const int pair = i * Shape::kThreads + threadIdx.x, row = 2 * pair / Shape::kWidth, c = 2 * pair % Shape::kWidth;
    if (row < Shape::kTiles * kRows) s.h[row][c / 2] = pack2<typename Shape::T>(totals[i][0], totals[i][1]);
  }
  sync_blocks<Shape>();  // and no block ends while another reads its sums
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksAtOnce) lora_kernel(const __grid_constant__ LoraParams p) {
  using T = typename Shape::T;
  constexpr int kEights = Shape::kEights, kTiles = Shape::kTiles, kStages = Shape::kStages;
  constexpr bool kAligned = Shape::kAligned;
  auto& s = *shared_memory<typename Shape::Shared>();
  const Lane at;
  const int warp = threadIdx.x / 32, everywhere = blockIdx.x % Shape::kBlocks * Shape::kWarps + warp;
  const int tiles = static_cast<int>(ceil_div(p.rows, kTiles * kRows));
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / Shape::kBlocks % tiles) * kTiles * kRows;
  const int64_t sample = blockIdx.x / Shape::kBlocks / tiles;
  const int rows = min(p.rows - static_cast<int>(first_row), kTiles * kRows);
  const T* const x = static_cast<const T*>(p.x) + sample * p.stride_x + first_row * p.in;
  const T* const A = static_cast<const T*>(p.A) + sample * p.stride_A;
  const T* const B = static_cast<const T*>(p.B) + sample * p.stride_B;
  const int64_t base = sample * p.stride_base + first_row * p.out, y = (sample * p.rows + first_row) * p.out;

  const int own = everywhere * kGroup;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    fetch_group<T, kEights, kAligned>(s.b[warp][stage], B, p, own + stage * Shape::kTurn);
    commit_copies();
  }
  Sums<Shape> sums;
  multiply_slices<Shape>(x, A, p, rows, everywhere, sums);
  Part next[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) next[t] = load_base<kAligned>(p, base, Place(p, t, rows, own));

  exchange<Shape>(sums, p, rows, s);
  uint32_t h[kTiles][2 * kEights];
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int i = 0; i < 2 * kEights; ++i) h[t][i] = s.h[t * kRows + i % 2 * 8 + at.row][i / 2 * 4 + at.quad];
  int stage = 0;
  for (int column = own; column < p.out; column += Shape::kTurn) {
    wait_for_copies<kStages - 2>();
    __syncwarp();
    fetch_group<T, kEights, kAligned>(s.b[warp][stage == 0 ? kStages - 1 : stage - 1], B, p, column + (kStages - 1) * Shape::kTurn);
    commit_copies();
    const Columns<kEights> b(s.b[warp][stage]);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const Place place(p, t, rows, column);
      Part part = next[t];
      next[t] = load_base<kAligned>(p, base, Place(p, t, rows, column + Shape::kTurn));
      expand<T, kEights>(h[t], b, p.scaling, part);
      store_y<kAligned>(p, y, place, part);
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
}

template <class T, int kEights, bool kAligned, int kTiles, int kBlocks, int kWarps>
int launch_shape(const char* name, const LoraParams& p, int64_t samples, void* stream) {
  using Shape = LoraShape<T, kEights, kAligned, kTiles, kBlocks, kWarps>;
  const int64_t blocks = samples * ceil_div(p.rows, kTiles * kRows) * kBlocks;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), Shape::kThreads, sizeof(typename Shape::Shared), kBlocks};
  return launch(name, [&] { return describe(p, samples); }, lora_kernel<Shape>, grid, stream, p);
}

// The kernel for the tensors' rank, where they are aligned; else the one for any.
template <class T, int kTiles, int kBlocks, int kWarps>
int launch_rank(const char* name, const LoraParams& p, int64_t samples, bool aligned, void* stream) {
  if (!aligned) return launch_shape<T, 8, false, kTiles, kBlocks, kWarps>(name, p, samples, stream);
  if (p.rank <= 8) return launch_shape<T, 1, true, kTiles, kBlocks, kWarps>(name, p, samples, stream);
  if (p.rank <= 16) return launch_shape<T, 2, true, kTiles, kBlocks, kWarps>(name, p, samples, stream);
  if (p.rank <= 32) return launch_shape<T, 4, true, kTiles, kBlocks, kWarps>(name, p, samples, stream);
  return launch_shape<T, 8, true, kTiles, kBlocks, kWarps>(name, p, samples, stream);
}

template <int kTiles, int kBlocks, int kWarps>
int launch_lora(const char* name, const LoraParams& p, int64_t samples, int dtype, bool aligned, void* stream) {
  const auto rank = dtype == SWAG_BFLOAT16 ? launch_rank<bfloat16, kTiles, kBlocks, kWarps> : launch_rank<float16, kTiles, kBlocks, kWarps>;
  return rank(name, p, samples, aligned, stream);
}

}  // namespace swag::cuda
