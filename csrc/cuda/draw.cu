// w_s = mean + diag_scale std eps_s + low_rank_scale deviations^T z_s for all samples s, reading the state once.

#include <algorithm>
#include <string>

#include "core/normal.h"
#include "core/philox.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/segments.h"

namespace swag::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 4 * kThreads;         // elements of which the threads have the state in registers
constexpr int64_t kSharedFloats = 3 << 10;  // for z: so few that registers alone limit the number of blocks

struct Tensor {
  uint32_t quad;  // of its first element within the whole tensor
  uint32_t index;
};

template <int N>
struct DrawParams {
  Segments<Tensor, N> segments;
  const float* mean;
  const float* std;
  const float* deviations;
  void* out;
  int64_t size;
  uint64_t seed;
  uint32_t num_samples;
  uint32_t first_draw;
  uint32_t draws;  // one for each counter word: with antithetic pairs, one for two samples
  uint32_t chunk;  // draws of which z is in shared memory at a time
  int rank;
  float diag_scale;
  float low_rank_scale;
  bool antithetic;
  bool odd;  // the first sample is the second of a pair
};

__device__ __forceinline__ void normals(uint32_t quad, uint32_t sample, uint32_t tensor, uint32_t stream, uint64_t seed,
                                        float (&n)[4]) {
  uint32_t c0 = quad, c1 = sample, c2 = tensor, c3 = stream;
  core::philox(c0, c1, c2, c3, seed);
  core::box_muller(c0, c1, n[0], n[1]);
  core::box_muller(c2, c3, n[2], n[3]);
}

// z [number, z_quads] of draws first to first + number - 1, times low_rank_scale, with zeros from rank on. Every block makes
// it anew while its loads of the state are under way: little beside the block's own normals, and no second kernel.
template <int N>
__device__ __forceinline__ void make_z(const DrawParams<N>& p, uint32_t first, uint32_t number, uint32_t z_quads, float4* z) {
  for (uint32_t i = threadIdx.x; i < number * z_quads; i += kThreads) {
    const uint32_t quad = i % z_quads;
    float n[4];
    normals(quad, first + i / z_quads, 0, core::stream_z, p.seed, n);
#pragma unroll
    for (int j = 0; j < 4; ++j) n[j] = static_cast<int>(4 * quad) + j < p.rank ? n[j] * p.low_rank_scale : 0.0f;
    z[i] = make_float4(n[0], n[1], n[2], n[3]);
  }
}

__device__ __forceinline__ void add_column(float z, const Pack<float>& column, float (&d)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) d[j] = core::fma(z, column.elements[j], d[j]);
}

// mean + sign d, written past the caches: nobody reads it soon.
template <class T>
__device__ __forceinline__ void put(T* out, const Pack<float>& mean, const float (&d)[4], float sign) {
  float w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = mean.elements[j] + sign * d[j];
  if constexpr (sizeof(T) == 4)
    __stcs(reinterpret_cast<float4*>(out), make_float4(w[0], w[1], w[2], w[3]));
  else
    __stcs(reinterpret_cast<uint2*>(out), make_uint2(pack2<T>(w[0], w[1]), pack2<T>(w[2], w[3])));
}

// Makes all samples of a block. The rank is more than LEAST. A thread has four elements at a time and up to HELD of their
// deviations in registers; later ones, if LEAST is HELD, are read again for every draw. Eight elements a thread, which
// would fill 16 bytes of a narrow type, take as many instructions for each and leave room for half as many threads.
template <class T, int LEAST, int HELD, int N>
__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ DrawParams<N> p) {
  float4* const z = shared_memory<float4>();
  const uint32_t z_quads = static_cast<uint32_t>(p.rank + 3) / 4;
  const uint32_t block = p.segments.first_blocks[0] + blockIdx.x;
  const int segment = p.segments.find(block);
  const int block_size = p.segments.size_of(segment, block);
  const Tensor tensor = p.segments.tags[segment];
  const uint32_t block_quad = tensor.quad + (block - p.segments.first_blocks[segment]) * (kBlockElements / 4);

  for (int tile = 0; tile < kBlockElements; tile += kTile) {
    const int within = tile + 4 * static_cast<int>(threadIdx.x);
    const int64_t begin = int64_t{block} * kBlockElements + within;
    T* const out = static_cast<T*>(p.out) + begin;
    if (tile < block_size) {
      const uint32_t quad = block_quad + within / 4;
      const Pack<float> mean = load_pack(p.mean + begin);
      Pack<float> std = load_pack(p.std + begin);
      Pack<float> columns[HELD ? HELD : 1];
#pragma unroll
      for (int r = 0; r < HELD; ++r)  // z (-0) adds nothing, not even to -0
        columns[r] = r <= LEAST || r < p.rank ? load_pack(p.deviations + r * p.size + begin)
                                              : Pack<float>{{-0.0f, -0.0f, -0.0f, -0.0f}};
#pragma unroll
      for (int j = 0; j < 4; ++j) std.elements[j] = std.elements[j] * p.diag_scale;

      T* next = out;
      for (uint32_t first = 0; first < p.draws; first += p.chunk) {
        const uint32_t number = p.draws - first < p.chunk ? p.draws - first : p.chunk;
        if (z_quads && (tile == 0 || p.draws > p.chunk)) {
          __syncthreads();
          make_z(p, p.first_draw + first, number, z_quads, z);
          __syncthreads();
        }
        const float4* z_row = z;
        for (uint32_t k = 0; k < number; ++k, z_row += z_quads) {
          float d[4];
          normals(quad, p.first_draw + first + k, tensor.index, core::stream_eps, p.seed, d);
#pragma unroll
          for (int j = 0; j < 4; ++j) d[j] = d[j] * std.elements[j];
#pragma unroll
          for (int r = 0; r < HELD; r += 4)
            if (r <= LEAST || r < p.rank) {
              const float4 q = z_row[r / 4];
              add_column(q.x, columns[r], d);
              add_column(q.y, columns[r + 1], d);
              add_column(q.z, columns[r + 2], d);
              add_column(q.w, columns[r + 3], d);
            }
          if constexpr (HELD && LEAST == HELD)
            for (int r = HELD; r < p.rank; ++r)
              add_column(reinterpret_cast<const float*>(z_row)[r], load_pack(p.deviations + r * p.size + begin), d);

          if (!p.antithetic) {
            put(next, mean, d, 1.0f);
            next += p.size;
            continue;
          }
          const uint32_t pair = 2 * (first + k) - p.odd;  // the row of its first sample, 2^32 - 1 if that is not asked for
          if (pair < p.num_samples) {
            put(next, mean, d, 1.0f);
            next += p.size;
          }
          if (pair + 1 < p.num_samples) {
            put(next, mean, d, -1.0f);
            next += p.size;
          }
        }
      }
    }
    for (int j = max(block_size - within, 0); j < 4; ++j)
      for (uint32_t row = 0; row < p.num_samples; ++row) out[row * p.size + j] = round_to<T>(0.0f);
  }
}

template <class T, int LEAST, int HELD, int N>
int launch_draw(const swag_draw_args& args, const Segments<Tensor, kSomeSegments>& segments, void* stream) {
  const int64_t last = args.first_sample + args.num_samples - 1;
  const int64_t first_draw = args.antithetic ? args.first_sample / 2 : args.first_sample;
  const int64_t last_draw = args.antithetic ? last / 2 : last;
  const int64_t z_size = ceil_div(args.rank, 4) * 4;
  DrawParams<N> p;
  copy_segments(segments, p.segments);
  p.mean = args.mean;
  p.std = args.std;
  p.deviations = args.deviations;
  p.out = args.out;
  p.size = args.size;
  p.seed = args.seed;
  p.num_samples = static_cast<uint32_t>(args.num_samples);
  p.first_draw = static_cast<uint32_t>(first_draw);
  p.draws = static_cast<uint32_t>(last_draw - first_draw + 1);
  p.chunk = z_size ? static_cast<uint32_t>(std::clamp<int64_t>(kSharedFloats / z_size, 1, p.draws)) : p.draws;
  p.rank = static_cast<int>(args.rank);
  p.diag_scale = args.diag_scale;
  p.low_rank_scale = args.low_rank_scale;
  p.antithetic = args.antithetic;
  p.odd = args.antithetic && args.first_sample % 2;
  const auto describe = [&] {
    return std::to_string(args.num_samples) + " samples of " + std::to_string(args.size) + " elements, rank " +
           std::to_string(args.rank);
  };
  const Grid grid{dim3(segments.number_of_blocks()), kThreads, static_cast<size_t>(p.chunk * z_size) * sizeof(float)};
  return launch("draw", describe, draw_kernel<T, LEAST, HELD, N>, grid, stream, p);
}

template <class T, int LEAST, int HELD>
int launch_draw(const swag_draw_args& args, const Segments<Tensor, kSomeSegments>& segments, void* stream) {
  return segments.number <= kFewSegments ? launch_draw<T, LEAST, HELD, kFewSegments>(args, segments, stream)
                                         : launch_draw<T, LEAST, HELD, kSomeSegments>(args, segments, stream);
}

template <class T>
auto launch_for(int64_t rank) {
  return rank == 0    ? launch_draw<T, 0, 0>
         : rank <= 4  ? launch_draw<T, 0, 4>
         : rank <= 12 ? launch_draw<T, 4, 12>
         : rank <= 20 ? launch_draw<T, 12, 20>
         : rank <= 32 ? launch_draw<T, 20, 32>
                      : launch_draw<T, 32, 32>;
}

}  // namespace

int draw(const swag_draw_args& args, void* stream) {
  const auto run = args.dtype == SWAG_FLOAT32    ? launch_for<float>(args.rank)
                   : args.dtype == SWAG_BFLOAT16 ? launch_for<bfloat16>(args.rank)
                                                 : launch_for<float16>(args.rank);
  const auto tag_of = [&](int64_t t) {
    return Tensor{static_cast<uint32_t>(args.layout[t].first / 4), static_cast<uint32_t>(t)};
  };
  const auto kind_of = [](int64_t) { return uint8_t{0}; };
  const auto launch_one = [&](const Segments<Tensor, kSomeSegments>& segments, bool) { return run(args, segments, stream); };
  return in_launches<Tensor, kSomeSegments>(args.layout, args.num_tensors, args.size / kBlockElements, tag_of, kind_of,
                                            launch_one);
}

}  // namespace swag::cuda
