// bayes_average: streams samples of logits into the running average of the class probabilities.
//
// Each row's logits are touched twice: for the sums of its softmax, then tile by tile over the classes to add all samples
// to the state. Both are summed in an order that depends on the sizes alone, not on the threads.

#include "core/average.h"

#include <algorithm>

#include "dtypes.h"
#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace swag::SWAG_ISA {
namespace {

constexpr int64_t kWidth = f32::width;
constexpr int64_t kBlock = 128 * kWidth;  // classes read for their maximum and again for the sums while in the cache
constexpr int64_t kTileFloats = 8192;  // log-probabilities of all samples for one tile of classes
// Terms added up before they join the total, along the classes and the samples: long chains gather rounding errors.
constexpr int64_t kClassRun = kWidth, kSampleRun = 32;
constexpr int64_t worth_threads = 1 << 13;

// What the first touch leaves of each row, by sample: the log-probability of x is (x - shift) - log_sum.
struct Rows {
  explicit Rows(int64_t samples) : floats(3 * (samples + kWidth)), argmax(samples), stride(samples + kWidth) {}
  float* shift() const { return floats.get(); }  // the largest logit
  float* log_sum() const { return floats.get() + stride; }
  float* entropy() const { return floats.get() + 2 * stride; }

  Scratch<float> floats;
  Scratch<int64_t> argmax;
  int64_t stride;
};

// Lanes that do not exist read as logits of −inf.
template <class T>
SWAG_INLINE f32 load_logits(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : select(first(n), load(p, n), f32(core::minus_infinity));
}

template <class T>
float largest_of(const T* x, int64_t n) {
  f32 largest(core::minus_infinity);
  for (int64_t i = 0; i < n; i += kWidth) largest = max(load_logits(x + i, n - i), largest);
  return maximum(largest);
}

template <class T>
core::SoftmaxSums sums_of(const T* x, int64_t n, float largest) {
  core::SoftmaxSums sums;
  sums.max = largest;
  f32 total(0.0f), weighted(0.0f);
  for (int64_t i = 0; i < n;) {
    f32 run_total(0.0f), run_weighted(0.0f);
    for (const int64_t end = std::min(n, i + kClassRun * kWidth); i < end; i += kWidth) {
      const f32 d = core::bounded(load_logits(x + i, n - i) - f32(sums.shift()));
      const f32 e = core::exp_normal<u32>(d);
      run_total = run_total + e;
      run_weighted = muladd(e, d, run_weighted);
    }
    total = total + run_total;
    weighted = weighted + run_weighted;
  }
  sums.sum = sum(total);
  sums.weighted = sum(weighted);
  return sums;
}

// First index of the value among the n <= kBlock logits; kBlock if it is none of them.
template <class T>
int64_t index_of(const T* x, int64_t n, float value) {
  float lanes[kWidth];
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = static_cast<float>(lane);
  f32 index = load(lanes), first(static_cast<float>(kBlock));
  for (int64_t i = 0; i < n; i += kWidth) {
    first = min(first, select(load_logits(x + i, n - i) == f32(value), index, first));
    index = index + f32(static_cast<float>(kWidth));
  }
  return static_cast<int64_t>(-maximum(-first));
}

// First touch of the rows from x on, `stride` apart, as samples s0 to s1. log_sum and entropy hold the sum and the weighted
// sum until finish().
template <class T>
void scan(const T* x, int64_t stride, int64_t classes, const Rows& rows, int64_t s0, int64_t s1) {
  // Without a largest logit, or with a NaN, all log-probabilities are NaN, of which class 0 is the first.
  const auto put = [&](int64_t s, const core::SoftmaxSums& sums, const T* block, int64_t c) {
    rows.shift()[s] = sums.max;
    rows.log_sum()[s] = sums.sum;
    rows.entropy()[s] = sums.weighted;
    const bool defined = sums.sum == sums.sum && sums.max > core::minus_infinity;
    rows.argmax[s] = defined ? c + index_of(block, std::min(kBlock, classes - c), sums.max) : 0;
  };
  if (classes <= kBlock) {  // one step for all rows before the next, as a short row leaves the processor waiting between steps
    for (int64_t s = s0; s < s1; ++s) rows.shift()[s] = largest_of(x + (s - s0) * stride, classes);
    for (int64_t s = s0; s < s1; ++s) put(s, sums_of(x + (s - s0) * stride, classes, rows.shift()[s]), x + (s - s0) * stride, 0);
    return;
  }
  for (int64_t s = s0; s < s1; ++s, x += stride) {
    core::SoftmaxSums sums;
    int64_t best = 0;
    for (int64_t c = 0; c < classes; c += kBlock) {
      const int64_t n = std::min(kBlock, classes - c);
      const core::SoftmaxSums block = sums_of(x + c, n, largest_of(x + c, n));
      if (block.max > sums.max) best = c;
      sums = c == 0 ? block : core::merge(sums, block);
    }
    put(s, sums, x + best, best);
  }
}

void finish(const Rows& rows, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; s += kWidth) {
    const int64_t n = std::min(kWidth, end - s);
    const f32 sum = load(rows.log_sum() + s, n), log_sum = core::log<u32>(sum);
    const f32 entropy = core::softmax_entropy(load(rows.shift() + s, n), sum, load(rows.entropy() + s, n), log_sum);
    store(rows.log_sum() + s, log_sum, n);
    store(rows.entropy() + s, entropy, n);
  }
}

// What all rows share.
struct Weights {
  f32 samples;    // of this call
  f32 before;     // samples in the state, at least 1
  f32 combine;    // n_a n_b / (n_a + n_b) in draws
  explicit Weights(const BayesAverageArgs& a)
      : samples(static_cast<float>(a.samples)), before(static_cast<float>(std::max<int64_t>(a.count, 1))), combine(0.0f) {
    const double old = static_cast<double>(a.count / a.group), now = static_cast<double>(a.samples / a.group);
    combine = f32(static_cast<float>(old * now / (old + now)));
  }
};

// Sum over the samples of term(s).
template <class Term>
SWAG_INLINE f32 sum_samples(int64_t samples, int64_t step, const Term& term) {
  f32 total(0.0f);
  for (int64_t s = 0; s < samples;) {
    f32 part(0.0f);
    for (const int64_t end = std::min(samples, s + kSampleRun); s < end; s += step) part = part + term(s);
    total = total + part;
  }
  return total;
}

// Adds one vector of classes of all samples to the state; lp [samples] with stride ld holds their log-probabilities, and is
// overwritten, and largest is their maximum.
SWAG_INLINE void accumulate(const BayesAverageArgs& a, const Weights& w, float* lp, int64_t ld, f32 largest, float* log_sum,
                            float* m2, int64_t n) {
  const f32 before = load_logits(log_sum, n);
  largest = max(largest, before);
  // Probabilities as they are, unless all are so small that only their logarithm can be kept.
  const auto tiny = largest < f32(-60.0f), none = largest == f32(core::minus_infinity);
  const f32 shift = select(none, f32(0.0f), select(tiny, largest, f32(0.0f)));

  const f32 old = core::exp<u32>(before - shift);
  const f32 now = sum_samples(a.samples, 1, [&](int64_t s) {
    const f32 p = core::exp<u32>(load(lp + s * ld) - shift);
    store(lp + s * ld, p);
    return p;
  });
  const f32 mean = now / w.samples;
  f32 squares;
  if (a.group == 1) {
    squares = sum_samples(a.samples, 1, [&](int64_t s) {
      const f32 d = load(lp + s * ld) - mean;
      return d * d;
    });
  } else {
    squares = sum_samples(a.samples, 2, [&](int64_t s) {
      const f32 d = (load(lp + s * ld) + load(lp + (s + 1) * ld)) * f32(0.5f) - mean;
      return d * d;
    });
  }
  squares = core::combine_m2(squares, mean - old / w.before, w.combine) * select(tiny, f32(0.0f), f32(1.0f));
  n = std::min(n, kWidth);
  store(log_sum, select(none, largest, shift + core::log<u32>(old + now)), n);
  store(m2, load(m2, n) + squares, n);
}

int64_t tile_classes(int64_t samples) {
  return std::min<int64_t>(std::max(kTileFloats / samples / kWidth, int64_t{1}), 32) * kWidth;
}

// Classes c0 to c1 of batch row b, whose samples are the rows from `first` on.
template <class T>
void add_classes(const BayesAverageArgs& a, const Weights& w, const Rows& rows, int64_t first, int64_t b, int64_t c0, int64_t c1,
                 float* lp, float* largest) {
  const int64_t tile = tile_classes(a.samples), ld = tile + kWidth;
  for (int64_t c = c0; c < c1; c += tile) {
    const int64_t n = std::min(tile, c1 - c);
    for (int64_t i = 0; i < n; i += kWidth) store(largest + i, f32(core::minus_infinity));
    for (int64_t s = 0; s < a.samples; ++s) {
      const T* x = static_cast<const T*>(a.logits) + (s * a.batch + b) * a.classes + c;
      const f32 shift(rows.shift()[first + s]), log_sum(rows.log_sum()[first + s]);
      for (int64_t i = 0; i < n; i += kWidth) {
        __builtin_prefetch(x + i + tile, 0, 2);  // the runs are too short for the hardware to see
        const f32 l = load_logits(x + i, n - i) - shift - log_sum;
        store(lp + s * ld + i, l);
        store(largest + i, max(l, load(largest + i)));
      }
      const int64_t argmax = rows.argmax[first + s];
      if (argmax >= c && argmax < c + n) a.votes[b * a.classes + argmax] += 1.0f;
    }
    float* log_sum = a.log_sum + b * a.classes + c;
    float* m2 = a.m2 + b * a.classes + c;
    for (int64_t i = 0; i < n; i += kWidth) accumulate(a, w, lp + i, ld, load(largest + i), log_sum + i, m2 + i, n - i);
  }
}

void add_entropy(const BayesAverageArgs& a, const Rows& rows, int64_t first, int64_t b) {
  const double before = a.entropy[b];
  double change = 0;
  for (int64_t s = 0; s < a.samples; ++s) change += rows.entropy()[first + s] - before;
  a.entropy[b] = static_cast<float>(before + change / static_cast<double>(a.count + a.samples));
}

template <class T>
void run(const BayesAverageArgs& a) {
  const Weights w(a);
  const T* logits = static_cast<const T*>(a.logits);
  const int64_t tile = tile_classes(a.samples);
  const int64_t lp_floats = a.samples * (tile + kWidth);
  const int threads = a.samples * a.batch * a.classes < worth_threads ? 1 : a.threads;
  if (a.batch >= 4 * threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Scratch<float> lp(lp_floats), largest(tile);
      const Rows rows(a.samples);
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < a.batch; ++b) {
        scan(logits + b * a.classes, a.batch * a.classes, a.classes, rows, 0, a.samples);
        finish(rows, 0, a.samples);
        add_classes<T>(a, w, rows, 0, b, 0, a.classes, lp.get(), largest.get());
        add_entropy(a, rows, 0, b);
      }
    }
    return;
  }
  const int64_t part = 8 * tile, parts = (a.classes + part - 1) / part;
  const Rows rows(a.batch * a.samples);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scratch<float> lp(lp_floats), largest(tile);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < a.batch * a.samples; ++row) {
      const int64_t b = row / a.samples, s = row % a.samples;
      scan(logits + (s * a.batch + b) * a.classes, a.classes, a.classes, rows, row, row + 1);
    }
#pragma omp single
    finish(rows, 0, a.batch * a.samples);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.batch * parts; ++task) {
      const int64_t b = task / parts, c = task % parts * part;
      add_classes<T>(a, w, rows, b * a.samples, b, c, std::min(a.classes, c + part), lp.get(), largest.get());
      if (c == 0) add_entropy(a, rows, b * a.samples, b);
    }
  }
}

}  // namespace

void bayes_average(const BayesAverageArgs& a) {
  if (a.samples == 0 || a.batch == 0 || a.classes == 0) return;
  with_type(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

void exp_log(const float* x, float* exps, float* logs, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t count = std::min(n - i, kWidth);
    store(exps + i, core::exp<u32>(load(x + i, count)), count);
    store(logs + i, core::log<u32>(load(x + i, count)), count);
  }
}

}  // namespace swag::SWAG_ISA
