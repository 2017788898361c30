#pragma once

// What a CPU kernel receives: plain addresses and sizes, checked before by swag_kernels/ops.py.
// Every kernel exists once per instruction set, in a namespace of its own (see isa.h).

#include <cstdint>

namespace swag {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// One row of the layout table.
struct Segment {
  int64_t offset;  // first element in the arena, a multiple of 1024
  int64_t numel;
  int64_t first;  // index of that element within the whole tensor, a multiple of 4; 0 unless sharded
};

struct CollectArgs {
  const void* const* params;  // [num_tensors], contiguous
  const Dtype* dtypes;        // [num_tensors]
  const Segment* layout;      // [num_tensors]
  int64_t num_tensors;
  float* mean;
  float* m2;
  float* slot;    // row (count mod R) of the deviations, or null
  int64_t count;  // collections before this one
  int threads;
};

struct DrawArgs {
  const float* mean;        // [size]
  const float* std;         // [size]
  const float* deviations;  // [rank, size], or null when rank is 0
  int64_t rank;
  int64_t size;  // N, the arena
  const Segment* layout;
  int64_t num_tensors;
  void* out;  // [num_samples, size]; padding is set to zero
  Dtype dtype;
  int64_t num_samples;
  uint64_t seed;
  uint32_t first_sample;
  float diag_scale;
  float low_rank_scale;
  bool antithetic;
  int threads;
};

// Element strides over the sample axis are 0 where that axis is broadcast.
struct SampledLoraArgs {
  const void* x;     // [samples, rows, in]
  const void* A;     // [samples, rank, in]
  const void* B;     // [samples, out, rank]
  const void* base;  // [samples, rows, out]
  void* y;           // [samples, rows, out]; may be base itself
  int64_t samples, rows, in, out, rank;
  int64_t stride_x, stride_A, stride_B, stride_base;  // the last two axes are contiguous
  float scaling;
  Dtype dtype;       // of x, A and B
  Dtype base_dtype;  // of base and y
  int threads;
};

struct SampledLoraBackwardArgs {
  const void* grad;  // [samples, rows, out], contiguous, dtype base_dtype
  const void* x;
  const void* A;
  const void* B;
  float* dx;  // [samples or 1, rows, in], summed over samples where x was broadcast; any of the three may be null
  float* dA;  // [samples, rank, in]
  float* dB;  // [samples, out, rank]
  int64_t samples, rows, in, out, rank;
  int64_t stride_x, stride_A, stride_B;
  float scaling;
  Dtype dtype;
  Dtype base_dtype;
  int threads;
};

struct BayesAverageArgs {
  const void* logits;  // [samples, batch, classes], contiguous
  Dtype dtype;
  int64_t samples, batch, classes;
  float* log_sum;  // [batch, classes] log of the sum over samples of the class probabilities
  float* m2;       // [batch, classes] sum of squared deviations of the draws' probabilities from their mean
  float* votes;    // [batch, classes] how often the class was a sample's argmax (the first one at a tie)
  float* entropy;  // [batch] mean of the samples' entropies, in nats
  int64_t count;   // samples seen before this call
  int group;       // samples that make one draw: 1, or 2 for antithetic pairs
  int threads;
};

struct Kernels {
  const char* isa;
  void (*collect)(const CollectArgs&);
  void (*draw)(const DrawArgs&);
  void (*sampled_lora)(const SampledLoraArgs&);
  void (*sampled_lora_backward)(const SampledLoraBackwardArgs&);
  void (*bayes_average)(const BayesAverageArgs&);
  // words [4, n] of Philox4x32-10 for counters [4, n], and the four normals made from each quad of words
  void (*philox)(const uint32_t* counters, uint64_t key, uint32_t* words, int64_t n);
  void (*normal)(const uint32_t* words, float* normals, int64_t n);
  // e^x and ln x of core/average.h
  void (*exp_log)(const float* x, float* exps, float* logs, int64_t n);
};

}  // namespace swag
