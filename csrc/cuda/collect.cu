// mean, m2 and one deviation row updated in one pass over every tensor.

#include <string>

#include "core/moments.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/segments.h"

namespace swag::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQuads = kBlockElements / kThreads / 4;  // of a thread, whose loads are all under way before the first is used

template <int N>
struct CollectParams {
  Segments<const void*, N> segments;  // tagged with a tensor's address, of its dtype's kind
  float* mean;
  float* m2;
  float* deviations;
  int64_t* count;
  int64_t size;
  uint32_t rank;
  bool last;  // of the call's launches
};

__device__ __forceinline__ int quad_begin(int i) { return (i * kThreads + static_cast<int>(threadIdx.x)) * 4; }

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T elements[4];
};

// The thread's elements of a block that begins at `theta` and has `held` of them. Quads and not packs of 16 bytes for narrow
// types too, so that neighbouring threads read and write neighbouring quads of the float32 buffers, ten times as many bytes.
template <class T>
__device__ __forceinline__ void load_block(const T* theta, int held, float (&values)[kQuads][4]) {
  if (held == kBlockElements && reinterpret_cast<uintptr_t>(theta) % sizeof(Quad<T>) == 0) {
    Quad<T> quads[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quads[i] = *reinterpret_cast<const Quad<T>*>(theta + quad_begin(i));
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = to_float(quads[i].elements[j]);
  } else {
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i][j] = quad_begin(i) + j < held ? to_float(theta[quad_begin(i) + j]) : 0.0f;
  }
}

__device__ __forceinline__ void load_parameters(const void* address, int dtype, int64_t within, int held,
                                                float (&theta)[kQuads][4]) {
  if (dtype == SWAG_FLOAT32)
    load_block(static_cast<const float*>(address) + within, held, theta);
  else if (dtype == SWAG_BFLOAT16)
    load_block(static_cast<const bfloat16*>(address) + within, held, theta);
  else
    load_block(static_cast<const float16*>(address) + within, held, theta);
}

template <int N>
__global__ void __launch_bounds__(kThreads) collect_kernel(const __grid_constant__ CollectParams<N> p) {
  const auto& segments = p.segments;
  const uint32_t before = seen(p.count);
  const uint32_t block = segments.first_blocks[0] + blockIdx.x;
  const int segment = segments.find(block);
  const int held = segments.size_of(segment, block);

  if (held) {
    const int64_t begin = int64_t{block} * kBlockElements;
    Pack<float> mean[kQuads], m2[kQuads], deviation[kQuads];
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      mean[i] = load_pack(p.mean + begin + quad_begin(i));
      m2[i] = load_pack(p.m2 + begin + quad_begin(i));
    }
    float theta[kQuads][4];
    load_parameters(segments.tags[segment], segments.kinds[segment],
                    int64_t{block - segments.first_blocks[segment]} * kBlockElements, held, theta);

    const float n = static_cast<float>(before + 1);
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool valid = quad_begin(i) + j < held;
        float new_mean = mean[i].elements[j], new_m2 = m2[i].elements[j];
        const float left = core::welford(theta[i][j], n, new_mean, new_m2);
        mean[i].elements[j] = core::select(valid, new_mean, mean[i].elements[j]);
        m2[i].elements[j] = core::select(valid, new_m2, m2[i].elements[j]);
        deviation[i].elements[j] = core::select(valid, left, 0.0f);
      }
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      store_pack(p.mean + begin + quad_begin(i), mean[i]);
      store_pack(p.m2 + begin + quad_begin(i), m2[i]);
    }
    if (p.rank) {
      float* const slot = p.deviations + before % p.rank * p.size + begin;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) store_pack(slot + quad_begin(i), deviation[i]);
    }
  }
  if (p.last) {
    __syncthreads();
    if (threadIdx.x == 0) advance(p.count, before, 1);
  }
}

using AllSegments = Segments<const void*, kMostSegments>;

template <int N>
int launch_collect(const swag_collect_args& args, const AllSegments& segments, bool last, void* stream) {
  CollectParams<N> p;
  copy_segments(segments, p.segments);
  p.mean = args.mean;
  p.m2 = args.m2;
  p.deviations = args.deviations;
  p.count = args.count;
  p.size = args.size;
  p.rank = static_cast<uint32_t>(args.rank);
  p.last = last;
  const auto describe = [&] {
    return std::to_string(args.num_tensors) + " tensors in an arena of " + std::to_string(args.size) + " elements, rank " +
           std::to_string(args.rank);
  };
  const Grid grid{dim3(segments.number_of_blocks()), kThreads};
  return launch("collect", describe, collect_kernel<N>, grid, stream, p);
}

}  // namespace

int collect(const swag_collect_args& args, void* stream) {
  const auto tag_of = [&](int64_t t) { return args.params[t]; };
  const auto kind_of = [&](int64_t t) { return static_cast<uint8_t>(args.dtypes[t]); };
  const auto launch_one = [&](const AllSegments& segments, bool last) {
    const auto run = segments.number <= kFewSegments    ? launch_collect<kFewSegments>
                     : segments.number <= kSomeSegments ? launch_collect<kSomeSegments>
                                                        : launch_collect<kMostSegments>;
    return run(args, segments, last, stream);
  };
  return in_launches<const void*, kMostSegments>(args.layout, args.num_tensors, 0, tag_of, kind_of, launch_one);
}

}  // namespace swag::cuda
