// The running average where the logits of all samples of a batch row fit into shared memory: one launch, which reads each
// logit once. A block takes several neighbouring rows if they are short.

#include <algorithm>

#include "cuda/bayes_average_accumulate.h"
#include "cuda/launch.h"

namespace swag::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostShared = 96 << 10;  // that a block has on every GPU since sm_80
constexpr int kBlockLogits = 4096;     // of several short rows in a block; so few that their terms fit too
constexpr int kLaneLogits = 16;        // of a row for each lane that shares it
constexpr int kLoads = 4;              // of a thread under way at once

struct SmallParams {
  AverageParams average;
  uint32_t rows, lanes;
  bool aligned;
};

// A block's shared memory. A row's terms fill whole runs.
struct Layout {
  int padded;  // samples
  int terms, runs, logits, votes;  // elements
  __host__ __device__ Layout(int samples, int64_t rows, int classes)
      : padded(static_cast<int>(ceil_div(samples, kRun)) * kRun),
        terms(static_cast<int>(rows) * padded),
        runs(padded / kRun),
        logits(static_cast<int>(rows) * classes * samples),
        votes(static_cast<int>(rows) * classes) {}
};

// Neighbouring rows of all samples: [samples, columns]. A warp takes every kWarps-th sample.
template <class T, int N>
__device__ __forceinline__ void stage(const T* logits, int64_t stride, int samples, int columns, float* staged) {
  struct alignas(N * sizeof(T)) Load {
    T elements[N];
  };
  const int lane = threadIdx.x % 32;
  int s = threadIdx.x / 32, c = lane * N;
  while (s < samples) {
    Load loads[kLoads];
    int to[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      to[i] = s < samples && c < columns ? s * columns + c : -1;
      if (to[i] >= 0) loads[i] = *reinterpret_cast<const Load*>(logits + s * stride + c);
      c += 32 * N;
      if (c - lane * N >= columns) {
        c = lane * N;
        s += kWarps;
      }
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (to[i] >= 0) staged[to[i] + j] = to_float(loads[i].elements[j]);
  }
}

// Of a row that `lanes` lanes share.
__device__ __forceinline__ Piece scan(const float* row, int classes, uint32_t lane, uint32_t lanes) {
  Piece piece;
  float top = core::minus_infinity;
  for (uint32_t c = lane; c < static_cast<uint32_t>(classes); c += lanes)
    if (row[c] > top) {
      top = row[c];
      piece.first = c;
    }
  const float own = top;
  top = max_of_lanes(own, lanes);
  if (own != top) piece.first = kNone;
  piece.max = top;
  const float shift = piece.shift();
  for (uint32_t c = lane; c < static_cast<uint32_t>(classes); c += lanes) {
    const float difference = core::bounded(row[c] - shift), factor = core::exp_normal<uint32_t>(difference);
    piece.sum += factor;
    piece.weighted = core::fma(factor, difference, piece.weighted);
  }
  return piece_of_lanes(piece, top, lanes);
}

template <class T>
__global__ void __launch_bounds__(kThreads) average_small_kernel(const __grid_constant__ SmallParams p) {
  const AverageParams& a = p.average;
  const uint32_t before = seen(a.count);
  const int first = static_cast<int>(blockIdx.x * p.rows), rows = min(static_cast<int>(p.rows), a.batch - first);
  const int samples = a.samples, classes = a.classes, columns = rows * classes;
  const Layout layout(samples, rows, classes);
  Term* const terms = shared_memory<Term>();  // [rows, padded]
  Run* const runs = reinterpret_cast<Run*>(terms + layout.terms);
  float* const logits = reinterpret_cast<float*>(runs + layout.runs);  // [samples, rows, classes]
  uint32_t* const votes = reinterpret_cast<uint32_t*>(logits + layout.logits);  // [rows, classes]
  const uint32_t thread = threadIdx.x, warp = thread / 32;

  const int64_t begin = int64_t{first} * classes, stride = int64_t{a.batch} * classes;
  if (p.aligned)
    stage<T, Pack<T>::size>(static_cast<const T*>(a.logits) + begin, stride, samples, columns, logits);
  else
    stage<T, 1>(static_cast<const T*>(a.logits) + begin, stride, samples, columns, logits);
  for (int c = thread; c < columns; c += kThreads) votes[c] = 0;
  for (int s = thread * kRun; s < samples; s += kThreads * kRun)
    runs[s / kRun] = Run::at(s % kTerms, min(kTerms, samples - s / kTerms * kTerms));
  for (int i = thread; i < layout.terms; i += kThreads) terms[i] = absent_term();
  __syncthreads();

  const uint32_t scans = rows * samples, share = thread % p.lanes;
  for (uint32_t next = thread / p.lanes; next - thread / p.lanes < scans; next += kThreads / p.lanes) {
    const uint32_t scan_of = min(next, scans - 1), s = scan_of / rows, r = scan_of % rows;
    const Piece piece = scan(logits + s * columns + r * classes, classes, share, p.lanes);
    if (next < scans && share == 0) {
      const Row row = row_of(piece);
      terms[r * layout.padded + s] = term_of(row);
      atomicAdd(votes + r * classes + row.argmax, 1u);
    }
  }
  __syncthreads();

  const Weights weights(a, before);
  for (int c = thread; c < columns; c += kThreads) {
    const Term* const row = terms + static_cast<uint32_t>(c) / classes * layout.padded;
    const auto logit = [&](int s) { return logits[s * columns + c]; };
    Sums<1> sums;
    for (int from = 0; from < samples; from += kTerms) {
      const int n = min(kTerms, samples - from);
      Sums<1> some{};
      for (int s = 0; s < n; s += kRun) {
        Probabilities<1> probs([&](int i, int) {
          return precise_probability(logit(min(from + s + i, samples - 1)), row[from + s + i]);
        });
        some.add(probs, row + from + s, runs[(from + s) / kRun], a.group);
      }
      if (from)
        sums.append(some, from, n);
      else
        sums = some;
    }
    float log_sum[1] = {a.log_sum[begin + c]}, m2[1] = {a.m2[begin + c]};
    join(sums, weights, samples, [&](int s, float(&log_prob)[1]) {
      log_prob[0] = logit(s) - row[s].max - row[s].log2_sum * kLn2;
    }, log_sum, m2);
    a.log_sum[begin + c] = log_sum[0];
    a.m2[begin + c] = m2[0];
    if (votes[c]) a.votes[begin + c] += static_cast<float>(votes[c]);
  }
  for (int r = warp; r < rows; r += kWarps)
    average_entropy(a.entropy + first + r, before, samples,
                    [&](int s) { return terms[r * layout.padded + s].entropy; });
  if (thread == 0) advance(a.count, before, samples);
}

}  // namespace

SmallPlan::SmallPlan(const swag_bayes_average_args& a) : rows(0), lanes(1), shared(0) {
  if (a.samples > kMostShared || a.classes > kMostShared) return;
  const uint64_t classes = std::max<int64_t>(a.classes, 1), padded = ceil_div(a.samples, kRun) * kRun;
  const uint64_t several = std::clamp<uint64_t>(kBlockLogits / (padded * classes), 1, std::max<int64_t>(a.batch, 1));
  const uint64_t bytes = several * padded * sizeof(Term) + padded / kRun * sizeof(Run) +
                         several * a.classes * (a.samples + 1) * sizeof(float);
  if (bytes > kMostShared) return;
  rows = static_cast<uint32_t>(several);
  while (lanes < 32 && lanes * kLaneLogits < classes) lanes *= 2;
  shared = bytes;
}

int launch_small(const AverageParams& p, const SmallPlan& plan, int dtype, bool aligned, void* stream) {
  const SmallParams params{p, plan.rows, plan.lanes, aligned};
  const uint32_t blocks = (p.batch + plan.rows - 1) / plan.rows;
  const Grid grid{dim3(std::max(blocks, 1u)), kThreads, plan.shared};
  const auto run = [&](void (*kernel)(SmallParams)) {
    return launch("bayes_average_small", [&] { return describe(p); }, kernel, grid, stream, params);
  };
  if (dtype == SWAG_FLOAT32) return run(average_small_kernel<float>);
  return dtype == SWAG_BFLOAT16 ? run(average_small_kernel<bfloat16>) : run(average_small_kernel<float16>);
}

}  // namespace swag::cuda
