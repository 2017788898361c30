// mean, m2 and one deviation row updated in one pass over every tensor.

#include "core/moments.h"
#include "dtypes.h"
#include "kernels.h"
#include "segments.h"
#include "simd.h"

namespace swag::SWAG_ISA {
namespace {

constexpr int64_t kWidth = f32::width;
constexpr int64_t kBlock = 1024;

// slot is null, or is written past the cache (kStream): nobody reads it before the next draw.
template <class T, bool kStream>
void update(const T* theta, float* mean, float* m2, float* slot, int64_t numel, float n) {
  int64_t i = 0;
  for (; i + kWidth <= numel; i += kWidth) {
    f32 mu = load(mean + i), sum = load(m2 + i);
    const f32 deviation = core::welford(load(theta + i), f32(n), mu, sum);
    store(mean + i, mu);
    store(m2 + i, sum);
    if constexpr (kStream)
      stream(slot + i, deviation);
    else if (slot)
      store(slot + i, deviation);
  }
  if (const int64_t left = numel - i; left > 0) {
    f32 mu = load(mean + i, left), sum = load(m2 + i, left);
    const f32 deviation = core::welford(load(theta + i, left), f32(n), mu, sum);
    store(mean + i, mu, left);
    store(m2 + i, sum, left);
    if (slot) store(slot + i, deviation, left);
  }
}

// Elements [begin, end) of the arena, all of tensor t.
void update_segment(const CollectArgs& a, int64_t t, int64_t begin, int64_t end, bool streamed) {
  const float n = static_cast<float>(a.count + 1);
  float* const slot = a.slot ? a.slot + begin : nullptr;
  with_type(a.dtypes[t], [&](auto zero) {
    using T = decltype(zero);
    const T* theta = static_cast<const T*>(a.params[t]) + (begin - a.layout[t].offset);
    const auto run = streamed ? update<T, true> : update<T, false>;
    run(theta, a.mean + begin, a.m2 + begin, slot, end - begin, n);
  });
}

// Elements [begin, end) of the arena, whole blocks.
void collect_range(const CollectArgs& a, int64_t begin, int64_t end, bool streamed) {
  int64_t t = segment_at(a.layout, a.num_tensors, begin);
  if (t < 0) t = 0;
  for (; t < a.num_tensors && a.layout[t].offset < end; ++t) {
    const Segment& segment = a.layout[t];
    const int64_t stop = segment.offset + segment.numel;
    const int64_t padded = (stop + kBlock - 1) / kBlock * kBlock;
    const int64_t from = segment.offset > begin ? segment.offset : begin;
    if (from < stop) update_segment(a, t, from, stop < end ? stop : end, streamed);
    if (a.slot)
      for (int64_t i = stop > begin ? stop : begin; i < padded && i < end; ++i) a.slot[i] = 0.0f;
  }
  if (streamed) fence();
}

}  // namespace

void collect(const CollectArgs& a) {
  if (a.num_tensors == 0) return;
  const Segment& last = a.layout[a.num_tensors - 1];
  const int64_t blocks = (last.offset + last.numel + kBlock - 1) / kBlock;
  const bool streamed = a.slot && reinterpret_cast<uintptr_t>(a.slot) % 64 == 0;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int piece = 0; piece < a.threads; ++piece)
    collect_range(a, blocks * piece / a.threads * kBlock, blocks * (piece + 1) / a.threads * kBlock, streamed);
}

}  // namespace swag::SWAG_ISA
