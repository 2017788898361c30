#pragma once

// The log-sum-exp, the entropy and the argmax of a row of logits, put together from what the lanes of a warp have seen.

#include "core/average.h"
#include "cuda/device.h"

namespace swag::cuda {

constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
constexpr uint32_t kNone = 0xffffffffu;

// e^x for x <= 0, relative to which the error is below 2^-22.5 + |x| 2^-23.5: exp2_approximate's, and that of x log2(e).
__device__ __forceinline__ float exp_of_difference(float x) { return exp2_approximate(x * kLog2E); }

// A difference of logits that may be -inf or NaN, as a factor of its own exponential, which then is 0 or NaN.
__device__ __forceinline__ float as_factor(float difference) { return fmaxf(difference, core::exp_underflow); }

// Some of a row's logits x.
struct alignas(16) Piece {
  float max = core::minus_infinity;
  float sum = 0;           // Σ e^(x - max)
  float weighted = 0;      // Σ e^(x - max) (x - max)
  uint32_t first = kNone;  // class that has the maximum

  __device__ __forceinline__ float shift() const { return max == core::minus_infinity ? 0.0f : max; }

  // The same sums relative to a higher maximum. The factor is precise, as is the 1 that the old maximum has added, so that
  // the row's largest logits, which most likely are different lanes', count without exp2_approximate's error.
  __device__ __forceinline__ void raise(float higher) {
    const float old = max;
    max = higher;
    const float distance = as_factor(old - shift()), factor = core::exp_normal<uint32_t>(distance);
    weighted = factor * core::fma(distance, sum, weighted);
    sum *= factor;
  }
};

// What the accumulation needs of a row: the log-probability of x is ((x - max) log2(e) - log2_sum) / log2(e).
struct alignas(16) Row {
  float max, log2_sum;
  float entropy;
  uint32_t argmax;
};

// `lanes`, a power of two, neighbours get the union of their pieces, whose maximum is `top`.
__device__ __forceinline__ float max_of_lanes(float x, int lanes) {
  for (int offset = lanes / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}
__device__ __forceinline__ Piece piece_of_lanes(Piece piece, float top, int lanes) {
  if (piece.max != top) piece.first = kNone;
  piece.raise(top);
  for (int offset = lanes / 2; offset; offset /= 2) {
    piece.sum += __shfl_xor_sync(kFullWarp, piece.sum, offset);
    piece.weighted += __shfl_xor_sync(kFullWarp, piece.weighted, offset);
    const uint32_t other = __shfl_xor_sync(kFullWarp, piece.first, offset);
    piece.first = other < piece.first ? other : piece.first;
  }
  return piece;
}

// Of x >= 1, or NaN. The whole part is exact: as a multiple of the natural logarithm it would be off by more than the rest.
__device__ __forceinline__ float log2(float x) {
  const uint32_t exponent = core::bits(x) >> 23, whole = exponent - 127;
  const float rest = core::log<uint32_t>(core::from_bits(core::bits(x) - (whole << 23)));
  return x == x ? core::fma(rest, kLog2E, core::from_int(whole)) : x;
}

// Of a whole row. Without a finite maximum, or with a NaN, all its log-probabilities are NaN, of which class 0 is the first.
__device__ __forceinline__ Row row_of(const Piece& piece) {
  const float undefined = piece.max - piece.max, log_sum = core::log<uint32_t>(piece.sum) + undefined;
  return {piece.max, log2(piece.sum) + undefined,
          core::softmax_entropy(piece.max, piece.sum, piece.weighted, log_sum), log_sum == log_sum ? piece.first : 0};
}

}  // namespace swag::cuda
