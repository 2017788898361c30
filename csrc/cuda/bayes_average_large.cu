// The running average for rows of any length, in one launch that reads the logits from memory once.
//
// A row's log-probabilities need its log-sum-exp first, so each row is read twice; blocks take their tasks in such an order
// that the second reading comes soon enough after the first to be served by the L2. The tasks that scan the rows of batch
// element b + lag come before those that accumulate b. A block that accumulates waits until the rows of its batch element
// are scanned; all of that was started before it, and waits for nothing, so the wait ends.

#include <algorithm>

#include "cuda/bayes_average_accumulate.h"
#include "cuda/bayes_average_scan.h"
#include "cuda/bayes_average_tile.h"
#include "cuda/error.h"
#include "cuda/launch.h"

namespace swag::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kBlocks = 3;  // kBlocks: on a multiprocessor at once
constexpr uint64_t kAhead = 512;  // tasks from a scan to the accumulation: about as many as run at once

struct LargeParams {
  AverageParams average;
  uint32_t* ticket;      // zero at first, as are the next two
  uint32_t* rows_done;   // [batch]
  uint32_t* parts_done;  // [batch, samples]
  Row* rows;             // [batch, samples]
  Piece* pieces;         // [batch, samples, parts]
  uint32_t part, parts;
  uint32_t scans, tiles;  // tasks of one batch element: to scan its rows, and to accumulate its classes
  uint32_t lag;
};

struct Shared {
  Term terms[kTerms];
  Run runs[kTerms / kRun];
  uint32_t ticket;
  // Behind it, of a tile's classes.
  __device__ __forceinline__ uint32_t* votes() { return reinterpret_cast<uint32_t*>(this + 1); }
};

template <class T>
__device__ __forceinline__ const T* row_of_logits(const AverageParams& a, int64_t sample, int64_t b) {
  return static_cast<const T*>(a.logits) + (sample * a.batch + b) * a.classes;
}

__device__ __forceinline__ Piece load_shared_by_blocks(const Piece* p) {
  const float4 raw = __ldcg(reinterpret_cast<const float4*>(p));
  Piece piece;
  piece.max = raw.x;
  piece.sum = raw.y;
  piece.weighted = raw.z;
  piece.first = __float_as_uint(raw.w);
  return piece;
}

// One part of a row by each warp. The warp that has the row's last one puts them together.
template <class T, bool aligned>
__device__ __forceinline__ void scan(const LargeParams& p, uint32_t b, uint32_t task) {
  const AverageParams& a = p.average;
  const uint32_t unit = task * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t samples = a.samples, part = unit / samples, s = unit % samples;
  if (part >= p.parts) return;
  const int64_t index = int64_t{b} * a.samples + s;
  const uint32_t first = part * p.part;
  Piece piece = scan_part<T, aligned>(row_of_logits<T>(a, s, b), static_cast<int>(first),
                                      static_cast<int>(min(first + p.part, static_cast<uint32_t>(a.classes))),
                                      static_cast<int>(lane));
  if (p.parts > 1) {
    Piece* const pieces = p.pieces + index * p.parts;
    uint32_t before = 0;
    if (lane == 0) {
      pieces[part] = piece;
      before = add_release(p.parts_done + index, 1);
      if (before + 1 == p.parts) load_acquire(p.parts_done + index);
    }
    if (__shfl_sync(kFullWarp, before, 0) + 1 < p.parts) return;
    __syncwarp();
    piece = Piece();
    for (uint32_t i = lane; i < p.parts; i += 32) {
      Piece other = load_shared_by_blocks(pieces + i);
      const float top = fmaxf(piece.max, other.max);
      if (other.max > piece.max) piece.first = other.first;
      piece.raise(top);
      other.raise(top);
      piece.sum += other.sum;
      piece.weighted += other.weighted;
    }
    piece = piece_of_lanes(piece, max_of_lanes(piece.max, 32), 32);
  }
  if (lane == 0) {
    p.rows[index] = row_of(piece);
    add_release(p.rows_done + b, 1);
  }
}

// All samples of one tile of classes.
template <class T, bool aligned>
__device__ __forceinline__ void accumulate(const LargeParams& p, uint32_t b, uint32_t tile, uint32_t before, Shared& shared) {
  using Mine = Share<T, aligned, kThreads>;
  const AverageParams& a = p.average;
  const int thread = threadIdx.x, begin = static_cast<int>(tile) * Mine::all;
  const TileClasses<T, aligned, kThreads> own{begin + Mine::first(thread), a.classes};
  const T* const logits = row_of_logits<T>(a, 0, b);
  const int64_t stride = int64_t{a.batch} * a.classes;

  Mine x[kRun];
  const T* row = logits;
  const auto load = [&](int s) {
    if (s + kRun < a.samples) {
#pragma unroll
      for (int i = 0; i < kRun; ++i, row += stride) own.load(row, x[i]);
    } else {  // after the last sample it again
#pragma unroll
      for (int i = 0; i < kRun; ++i, row += s + i < a.samples ? stride : 0) own.load(row, x[i]);
    }
  };
  load(0);
  if (thread == 0)
    while (load_acquire(p.rows_done + b) < static_cast<uint32_t>(a.samples)) __nanosleep(64);
  uint32_t* const votes = shared.votes();
  for (int c = thread; c < Mine::all; c += kThreads) votes[c] = 0;
  __syncthreads();

  const Row* const rows = p.rows + int64_t{b} * a.samples;
  auto* const kept = reinterpret_cast<Sums<Mine::size>*>(votes + Mine::all) + thread;  // if samples come after kTerms
  Sums<Mine::size> sums{};
  for (int from = 0; from < a.samples; from += kTerms) {
    const int samples = min(kTerms, a.samples - from), padded = (samples + kRun - 1) / kRun * kRun;
    for (int s = thread; s < padded; s += kThreads) {
      shared.terms[s] = absent_term();
      if (s < samples) {
        const Row row = rows[from + s];
        shared.terms[s] = term_of(row);
        const uint32_t c = row.argmax - static_cast<uint32_t>(begin);
        if (c < static_cast<uint32_t>(Mine::all)) atomicAdd(votes + c, 1u);
      }
      if (s % kRun == 0) shared.runs[s / kRun] = Run::at(s, samples);
    }
    __syncthreads();
    for (int s = 0; s < samples; s += kRun) {
      Probabilities<Mine::size> probs([&](int i, int j) { return fast_probability(x[i].at(j), shared.terms[s + i]); });
      if (probs.any_large()) {  // loaded again, as the registers do not hold the logits and all that comes of them
        const T* again = logits + (from + s) * stride;
#pragma unroll
        for (int i = 0; i < kRun; ++i, again += from + s + i < a.samples ? stride : 0) own.load(again, x[i]);
        probs = Probabilities<Mine::size>(
            [&](int i, int j) { return precise_probability(x[i].at(j), shared.terms[s + i]); });
      }
      if (from + s + kRun < a.samples) load(from + s + kRun);
      sums.add(probs, shared.terms + s, shared.runs[s / kRun], a.group);
    }
    if (from) {
      Sums<Mine::size> all = *kept;
      all.append(sums, from, samples);
      sums = all;
    }
    if (from + kTerms < a.samples) {
      *kept = sums;
      sums = {};
      __syncthreads();
    }
  }

  const int64_t state = int64_t{b} * a.classes;
  float log_sum[Mine::size], m2[Mine::size];
  own.load_state(a.log_sum + state, log_sum);
  own.load_state(a.m2 + state, m2);
  join(sums, Weights(a, before), a.samples, [&](int s, float(&log_prob)[Mine::size]) {
    Mine x;
    own.load(logits + s * stride, x);
    const Row& r = rows[s];
#pragma unroll
    for (int j = 0; j < Mine::size; ++j) log_prob[j] = x.at(j) - r.max - r.log2_sum * kLn2;
  }, log_sum, m2);
  own.store_state(a.log_sum + state, log_sum);
  own.store_state(a.m2 + state, m2);
#pragma unroll
  for (int j = 0; j < Mine::size; ++j) {
    const uint32_t more = votes[own.at(j) - begin];
    if (more) a.votes[state + own.at(j)] += static_cast<float>(more);
  }
  if (tile == 0 && thread < 32)
    average_entropy(a.entropy + b, before, a.samples, [&](int s) { return rows[s].entropy; });
}

struct Task {
  bool scans;
  uint32_t b, index;
};

// First the scans of `lag` batch elements; then groups of the scans of g + lag and the tiles of g; at last only tiles.
__device__ __forceinline__ Task task_of(uint32_t ticket, uint32_t batch, uint32_t lag, uint32_t scans, uint32_t tiles) {
  if (ticket < lag * scans) return {true, ticket / scans, ticket % scans};
  ticket -= lag * scans;
  const uint32_t groups = batch - lag, g = min(ticket / (scans + tiles), groups);
  ticket -= g * (scans + tiles);
  if (g < groups && ticket < scans) return {true, g + lag, ticket};
  if (g < groups) ticket -= scans;
  // The last tile first: what was scanned last is most likely to be in the L2 still.
  return {false, g + ticket / tiles, tiles - 1 - ticket % tiles};
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kThreads, kBlocks) average_large_kernel(const __grid_constant__ LargeParams p) {
  Shared& shared = *shared_memory<Shared>();
  const uint32_t before = seen(p.average.count);
  if (threadIdx.x == 0) shared.ticket = atomicAdd(p.ticket, 1u);
  __syncthreads();
  const Task task = task_of(shared.ticket, p.average.batch, p.lag, p.scans, p.tiles);
  if (task.scans)
    scan<T, aligned>(p, task.b, task.index);
  else
    accumulate<T, aligned>(p, task.b, task.index, before, shared);
  if (threadIdx.x == 0) advance(p.average.count, before, p.average.samples);
}

int64_t part_of(int32_t dtype) { return dtype == SWAG_FLOAT32 ? kPart<float> : kPart<bfloat16>; }

}  // namespace

LargePlan::LargePlan(const swag_bayes_average_args& a) : part(part_of(a.dtype)), parts(ceil_div(a.classes, part)) {
  flags = 1 + a.batch + (parts > 1 ? a.batch * a.samples : 0);
  rows = a.batch * a.samples;
  pieces = parts > 1 ? rows * parts : 0;
}

size_t LargePlan::workspace() const {
  return ceil_div(flags * sizeof(uint32_t), alignof(Row)) * alignof(Row) + rows * sizeof(Row) + pieces * sizeof(Piece);
}

int launch_large(const AverageParams& p, const LargePlan& plan, int dtype, bool aligned, void* workspace, void* stream) {
  LargeParams params{p};
  params.ticket = static_cast<uint32_t*>(workspace);
  params.rows_done = params.ticket + 1;
  params.parts_done = params.rows_done + p.batch;
  params.rows = reinterpret_cast<Row*>(static_cast<char*>(workspace) + plan.workspace()) - plan.rows;
  params.pieces = reinterpret_cast<Piece*>(params.rows) - plan.pieces;
  params.part = static_cast<uint32_t>(plan.part);
  params.parts = static_cast<uint32_t>(plan.parts);
  const int tile = kThreads * (aligned && dtype != SWAG_FLOAT32 ? 8 : 4);
  const int64_t scans = ceil_div(p.samples * plan.parts, kWarps), tiles = ceil_div(p.classes, tile);
  params.scans = static_cast<uint32_t>(scans);
  params.tiles = static_cast<uint32_t>(tiles);
  params.lag = static_cast<uint32_t>(std::clamp<uint64_t>(kAhead / (scans + tiles), 1, p.batch));
  const int64_t blocks = p.batch * (scans + tiles);
  if (blocks > INT32_MAX)
    return failed(SWAG_INVALID_ARGUMENT, "bayes_average (" + describe(p) + ") needs " + std::to_string(blocks) +
                                             " blocks, more than a launch takes; pass fewer samples or rows at once");

  const cudaError_t error =
      cudaMemsetAsync(workspace, 0, plan.flags * sizeof(uint32_t), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    cudaGetLastError();
    return failed(SWAG_CUDA_ERROR, "bayes_average (" + describe(p) + ") could not clear its workspace: " +
                                       cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  }
  const size_t kept = p.samples > kTerms ? tile * sizeof(Sums<1>) : 0;
  const Grid grid{dim3(static_cast<unsigned>(blocks)), kThreads, sizeof(Shared) + tile * sizeof(uint32_t) + kept};
  const auto run = [&](void (*kernel)(LargeParams)) {
    return launch("bayes_average_large", [&] { return describe(p); }, kernel, grid, stream, params);
  };
  switch (dtype) {
    case SWAG_FLOAT32: return run(aligned ? average_large_kernel<float, true> : average_large_kernel<float, false>);
    case SWAG_BFLOAT16: return run(aligned ? average_large_kernel<bfloat16, true> : average_large_kernel<bfloat16, false>);
    default: return run(aligned ? average_large_kernel<float16, true> : average_large_kernel<float16, false>);
  }
}

}  // namespace swag::cuda
