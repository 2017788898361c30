#pragma once

// All samples' probabilities of a thread's classes added to the state. Long chains gather rounding errors: the samples of a run
// are added up, with their squared deviations from the run's mean, before they join the others of kTerms, and these the rest.

#include "core/average.h"
#include "cuda/bayes_average_params.h"
#include "cuda/bayes_average_softmax.h"

namespace swag::cuda {

constexpr int kRun = 8;      // samples; even, so that no antithetic pair is torn
constexpr int kTerms = 256;  // samples, whole runs
constexpr float kTiny = 8.756511e-27f;  // e^-60: of a smaller probability only the logarithm is kept

// A sample's row in shared memory. Those that fill up the last run have max = inf, so that their probabilities are 0.
struct alignas(16) Term {
  float max, log2_sum;
  float present;  // 1 or 0
  float entropy;
};

__device__ __forceinline__ Term term_of(const Row& row) { return {row.max, row.log2_sum, 1.0f, row.entropy}; }
__device__ __forceinline__ Term absent_term() { return {-core::minus_infinity, 0.0f, 0.0f, 0.0f}; }

// A run among at most kTerms samples.
struct alignas(16) Run {
  float inverse;         // 1 / n of its n samples
  float inverse_before;  // 1 / (samples before it), or 0
  float weight;          // what the square of the difference of both means counts

  __device__ __forceinline__ static Run at(int first, int samples) {
    const float before = static_cast<float>(first), n = static_cast<float>(min(kRun, samples - first));
    return {1.0f / n, first ? 1.0f / before : 0.0f, before * n / (before + n)};
  }
};

// The probability of the logit x.
__device__ __forceinline__ float precise_probability(float x, const Term& term) {
  return core::exp<uint32_t>(core::fma(-term.log2_sum, kLn2, x - term.max));
}
__device__ __forceinline__ float fast_probability(float x, const Term& term) {
  return exp2_approximate(core::fma(x - term.max, kLog2E, -term.log2_sum));
}

// The probabilities of N classes in a run's samples.
template <int N>
struct Probabilities {
  float p[kRun][N], sums[N];

  // of(i, j) gives that of sample i and class j.
  template <class Of>
  __device__ __forceinline__ Probabilities(const Of& of) {
#pragma unroll
    for (int i = 0; i < kRun; ++i)
#pragma unroll
      for (int j = 0; j < N; ++j) p[i][j] = of(i, j);
#pragma unroll
    for (int j = 0; j < N; ++j)
      sums[j] = ((p[0][j] + p[1][j]) + (p[2][j] + p[3][j])) + ((p[4][j] + p[5][j]) + (p[6][j] + p[7][j]));
  }

  // Whether one may be so large that exp2_approximate's error counts. For smaller ones plain torch's is no less, as it rounds
  // their logarithm.
  __device__ __forceinline__ bool any_large() const {
    float largest = sums[0];
#pragma unroll
    for (int j = 1; j < N; ++j) largest = fmaxf(largest, sums[j]);
    return largest >= 0.125f;
  }
};

template <int N>
struct Sums {
  float total[N], squares[N];

  // One run, which is used up.
  __device__ __forceinline__ void add(Probabilities<N>& given, const Term* terms, const Run& run, int group) {
    auto& p = given.p;
    if (group == 2) {  // a draw is the mean of a pair, and counts for both
#pragma unroll
      for (int i = 0; i < kRun; i += 2)
#pragma unroll
        for (int j = 0; j < N; ++j) p[i][j] = p[i + 1][j] = 0.5f * (p[i][j] + p[i + 1][j]);
    }
    float mean[N], own[N];
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = given.sums[j] * run.inverse;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float present = terms[i].present;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float deviation = core::fma(-present, mean[j], p[i][j]);
        own[j] = i ? core::fma(deviation, deviation, own[j]) : deviation * deviation;
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float delta = core::fma(-total[j], run.inverse_before, mean[j]);
      total[j] += given.sums[j];
      squares[j] += core::combine_m2(own[j], delta, run.weight);
    }
  }

  // Those of the `n` samples that come after `before` samples.
  __device__ __forceinline__ void append(const Sums& later, int before, int n) {
    const float old = static_cast<float>(before), now = static_cast<float>(n), weight = old * now / (old + now);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      squares[j] += core::combine_m2(later.squares[j], later.total[j] / now - total[j] / old, weight);
      total[j] += later.total[j];
    }
  }
};

// What joins a call's sums to a state that has `seen` samples.
struct Weights {
  float inverse;         // 1 / samples
  float inverse_before;  // 1 / seen, or 1
  float weight;          // n_a n_b / (n_a + n_b) in draws
  float inverse_group;

  __device__ __forceinline__ Weights(const AverageParams& p, uint32_t seen)
      : inverse(1.0f / static_cast<float>(p.samples)),
        inverse_before(1.0f / static_cast<float>(seen ? seen : 1)),
        inverse_group(p.group == 2 ? 0.5f : 1.0f) {
    const float before = static_cast<float>(seen) * inverse_group, now = static_cast<float>(p.samples) * inverse_group;
    weight = before * now / (before + now);
  }
};

// The new log_sum and m2 of N classes. log_prob(s, lp) gives their log-probabilities in sample s, for probabilities so small
// that only these can be added.
template <int N, class LogProb>
__device__ __forceinline__ void join(const Sums<N>& sums, const Weights& w, int samples, const LogProb& log_prob,
                                     float (&log_sum)[N], float (&m2)[N]) {
  float both[N];
  bool any_tiny = false;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float old = core::exp<uint32_t>(log_sum[j]);
    both[j] = old + sums.total[j];
    any_tiny |= both[j] < kTiny;
    const float delta = core::fma(sums.total[j], w.inverse, -(old * w.inverse_before));
    m2[j] += core::combine_m2(sums.squares[j] * w.inverse_group, delta, w.weight);
  }
  float shifts[N] = {}, shifted[N] = {};
  if (any_tiny) {
    float lp[N];
    bool any = false;
#pragma unroll
    for (int j = 0; j < N; ++j) shifts[j] = log_sum[j];
#pragma unroll 4
    for (int s = 0; s < samples; ++s) {
      log_prob(s, lp);
#pragma unroll
      for (int j = 0; j < N; ++j) shifts[j] = fmaxf(shifts[j], lp[j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const bool none = shifts[j] == core::minus_infinity;
      any |= !none;
      shifted[j] = core::exp<uint32_t>(none ? core::minus_infinity : log_sum[j] - shifts[j]);
    }
    if (any) {
#pragma unroll 1
      for (int s = 0; s < samples; ++s) {
        log_prob(s, lp);
#pragma unroll
        for (int j = 0; j < N; ++j) shifted[j] += core::exp<uint32_t>(lp[j] - shifts[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const bool tiny = both[j] < kTiny;
    const float shift = tiny ? shifts[j] : 0.0f;
    const float log = core::log<uint32_t>(tiny ? shifted[j] : both[j]);
    log_sum[j] = shift == core::minus_infinity ? shift : shift + log;
  }
}

// One warp: what becomes of the mean entropy of `seen` samples with those of entropy_of(s). In float64, as on the CPU.
template <class EntropyOf>
__device__ __forceinline__ void average_entropy(float* mean, uint32_t seen, int samples, const EntropyOf& entropy_of) {
  const int lane = threadIdx.x % 32;
  const double before = *mean;
  double change = 0;
  for (int s = lane; s < samples; s += 32) change += entropy_of(s) - before;
  for (int offset = 16; offset; offset /= 2) change += __shfl_xor_sync(kFullWarp, change, offset);
  if (lane == 0) *mean = static_cast<float>(before + change / (static_cast<double>(seen) + samples));
}

}  // namespace swag::cuda
