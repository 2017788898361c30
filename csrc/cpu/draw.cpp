// w_s = mean + diag_scale std eps_s + low_rank_scale deviations^T z_s for all samples s, reading the state once.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "core/normal.h"
#include "core/philox.h"
#include "dtypes.h"
#include "kernels.h"
#include "pack.h"
#include "scratch.h"
#include "segments.h"
#include "simd.h"

namespace swag::SWAG_ISA {
namespace {

constexpr int64_t kWidth = f32::width;
constexpr int64_t kTile = 4 * kWidth;  // elements of one vector of quads
constexpr int64_t kBlock = 1024;
constexpr int kDrawsAtOnce = 4;
constexpr int64_t kLargeOutput = 8 << 20;  // bytes, more than stays in the caches

// 4 W consecutive normals of each of K samples; quad holds their W quads in the order of quad_index().
template <int K>
SWAG_INLINE void normals(u32 quad, uint32_t sample, uint32_t tensor, uint32_t stream, uint64_t seed, f32 (&n)[K][4]) {
  using U = pack<u32, K>;
  using F = pack<f32, K>;
  U c0, c1, c2(tensor), c3(stream);
  for (int p = 0; p < K; ++p) {
    c0.v[p] = quad;
    c1.v[p] = u32(sample + static_cast<uint32_t>(p));
  }
  core::philox(c0, c1, c2, c3, seed);
  F n0, n1, n2, n3;
  core::box_muller(c0, c1, n0, n1);
  core::box_muller(c2, c3, n2, n3);
  for (int p = 0; p < K; ++p) {
    transpose4(n0.v[p], n1.v[p], n2.v[p], n3.v[p]);
    n[p][0] = n0.v[p];
    n[p][1] = n1.v[p];
    n[p][2] = n2.v[p];
    n[p][3] = n3.v[p];
  }
}

// The draws that the requested samples need, one for each counter word: with antithetic pairs, one for two samples.
struct Draws {
  uint32_t first;
  int64_t number;
  int64_t stride;
  Scratch<float> z;  // [number, stride], times low_rank_scale

  explicit Draws(const DrawArgs& a)
      : first(a.antithetic ? a.first_sample / 2 : a.first_sample),
        number(a.antithetic ? (int64_t{a.first_sample} + a.num_samples + 1) / 2 - first : a.num_samples),
        stride((a.rank + kTile - 1) / kTile * kTile),
        z(number * stride) {
    for (int64_t k = 0; k < number; ++k)
      for (int64_t r = 0; r < a.rank; r += kTile) {
        f32 n[1][4];
        normals<1>(u32(static_cast<uint32_t>(r / 4)) + quad_index(), sample(k), 0, core::stream_z, a.seed, n);
        for (int j = 0; j < 4; ++j) store(&z[k * stride + r + j * kWidth], n[0][j] * f32(a.low_rank_scale));
      }
  }
  uint32_t sample(int64_t k) const { return first + static_cast<uint32_t>(k); }
};

template <class T, bool kStream>
SWAG_INLINE void put(T* p, f32 v) {
  if constexpr (kStream)
    stream(p, v);
  else
    store(p, v);
}

// What all samples share at one vector of quads: elements [begin, begin + kTile), of which those from `end` on are padding.
struct Tile {
  int64_t begin, end;
  u32 quad;
  uint32_t tensor;
  f32 mean[4], std[4];
  const float* deviations;  // [rank, kTile]
};

// Draws k to k + kDraws - 1 at one tile. Several at once share the loads of the deviations and hide the latency of fma.
template <class T, bool kStream, int kDraws>
SWAG_INLINE void draw_some(const DrawArgs& a, const Draws& draws, const Tile& tile, int64_t k) {
  f32 d[kDraws][4];
  normals<kDraws>(tile.quad, draws.sample(k), tile.tensor, core::stream_eps, a.seed, d);
  for (int p = 0; p < kDraws; ++p)
    for (int j = 0; j < 4; ++j) d[p][j] = d[p][j] * tile.std[j];
  for (int64_t r = 0; r < a.rank; ++r)
    for (int j = 0; j < 4; ++j) {
      const f32 column = load(tile.deviations + r * kTile + j * kWidth);
      for (int p = 0; p < kDraws; ++p) d[p][j] = fma(f32(draws.z[(k + p) * draws.stride + r]), column, d[p][j]);
    }

  const bool partial = tile.begin + kTile > tile.end;
  const auto emit = [&](int64_t row, const f32(&delta)[4], bool negative) {
    T* const out = static_cast<T*>(a.out) + row * a.size + tile.begin;
    for (int j = 0; j < 4; ++j) {
      f32 w = negative ? tile.mean[j] - delta[j] : tile.mean[j] + delta[j];
      if (partial) {
        const int64_t left = tile.end - tile.begin - j * kWidth;
        w = select(first(left < 0 ? 0 : left < kWidth ? left : kWidth), w, f32(0.0f));
      }
      put<T, kStream>(out + j * kWidth, w);
    }
  };
  for (int p = 0; p < kDraws; ++p) {
    if (!a.antithetic) {
      emit(k + p, d[p], false);
      continue;
    }
    const int64_t row = 2 * (k + p) - (a.first_sample & 1);
    if (row >= 0) emit(row, d[p], false);
    if (row + 1 < a.num_samples) emit(row + 1, d[p], true);
  }
}

// All samples of elements [begin, begin + kTile) of segment t; scratch holds [rank, kTile].
template <class T, bool kStream>
void draw_tile(const DrawArgs& a, const Draws& draws, int64_t t, int64_t begin, float* scratch) {
  const Segment& segment = a.layout[t];
  const auto quad = static_cast<uint32_t>((segment.first + begin - segment.offset) / 4);
  Tile tile;
  tile.begin = begin;
  tile.end = segment.offset + segment.numel;
  tile.quad = u32(quad) + quad_index();
  tile.tensor = static_cast<uint32_t>(t);
  tile.deviations = scratch;
  for (int j = 0; j < 4; ++j) {
    tile.mean[j] = load(a.mean + begin + j * kWidth);
    tile.std[j] = load(a.std + begin + j * kWidth) * f32(a.diag_scale);
  }
  // Copied because rows a power of two apart would evict each other from the cache.
  for (int64_t r = 0; r < a.rank; ++r)
    for (int j = 0; j < 4; ++j) store(scratch + r * kTile + j * kWidth, load(a.deviations + r * a.size + begin + j * kWidth));

  int64_t fetched = 0;
  const auto fetch_next_tile = [&](int64_t k) {  // a few rows with each draw, because all at once would fill the miss queue
    for (; fetched < a.rank * k / draws.number; ++fetched)
      for (int j = 0; j < 4; ++j) __builtin_prefetch(a.deviations + fetched * a.size + begin + kTile + j * kWidth);
  };
  int64_t k = 0;
  for (; k + kDrawsAtOnce <= draws.number; k += kDrawsAtOnce) {
    fetch_next_tile(k + kDrawsAtOnce);
    draw_some<T, kStream, kDrawsAtOnce>(a, draws, tile, k);
  }
  for (; k < draws.number; ++k) {
    fetch_next_tile(k + 1);
    draw_some<T, kStream, 1>(a, draws, tile, k);
  }
}

template <class T, bool kStream>
void draw_block(const DrawArgs& a, const Draws& draws, int64_t begin, float* scratch) {
  const int64_t t = segment_at(a.layout, a.num_tensors, begin);
  const int64_t end = t < 0 ? begin : a.layout[t].offset + a.layout[t].numel;
  int64_t i = begin;
  for (; i < begin + kBlock && i < end; i += kTile) draw_tile<T, kStream>(a, draws, t, i, scratch);
  for (; i < begin + kBlock; i += kWidth)
    for (int64_t row = 0; row < a.num_samples; ++row) put<T, kStream>(static_cast<T*>(a.out) + row * a.size + i, f32(0.0f));
}

template <class T, bool kStream>
void draw_blocks(const DrawArgs& a) {
  const Draws draws(a);
  const int64_t blocks = a.size / kBlock;
  const Scratch<float> scratch(a.threads * a.rank * kTile);
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int piece = 0; piece < a.threads; ++piece) {
    for (int64_t block = blocks * piece / a.threads; block < blocks * (piece + 1) / a.threads; ++block)
      draw_block<T, kStream>(a, draws, block * kBlock, &scratch[piece * a.rank * kTile]);
    if constexpr (kStream) fence();
  }
}

// On pages of 4 KB the faults of a fresh output cost more than all the arithmetic. Failure is harmless.
void use_huge_pages([[maybe_unused]] void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(out) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
void draw_as(const DrawArgs& a) {
  const int64_t bytes = a.num_samples * a.size * static_cast<int64_t>(sizeof(T));
  if (bytes >= kLargeOutput && reinterpret_cast<uintptr_t>(a.out) % 64 == 0) {
    use_huge_pages(a.out, bytes);
    draw_blocks<T, true>(a);
  } else {
    draw_blocks<T, false>(a);
  }
}

}  // namespace

void draw(const DrawArgs& a) {
  with_type(a.dtype, [&](auto zero) { draw_as<decltype(zero)>(a); });
}

void philox(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = n - i < kWidth ? n - i : kWidth;
    u32 c[4];
    for (int j = 0; j < 4; ++j) c[j] = load(counters + j * n + i, m);
    core::philox(c[0], c[1], c[2], c[3], key);
    for (int j = 0; j < 4; ++j) store(words + j * n + i, c[j], m);
  }
}

void normal(const uint32_t* words, float* normals, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t m = n - i < kWidth ? n - i : kWidth;
    for (int j = 0; j < 4; j += 2) {
      f32 n0, n1;
      core::box_muller(load(words + j * n + i, m), load(words + (j + 1) * n + i, m), n0, n1);
      store(normals + j * n + i, n0, m);
      store(normals + (j + 1) * n + i, n1, m);
    }
  }
}

}  // namespace swag::SWAG_ISA
