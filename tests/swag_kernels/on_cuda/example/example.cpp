// From training to a prediction without Python: snapshots of a LoRA layer's A and B are collected, samples are drawn from
// them, the layer runs for all samples at once, and the samples' probabilities are averaged.
//
//   nvcc -std=c++17 example.cpp -I <package>/include -L <package> -lswag_kernels -Xlinker -rpath=<package>
//
// Prints what each function said. Exits with 0 if all succeeded with the right numbers, with 2 if a launch failed.

#include <cmath>
#include <cstdio>

#include "memory.h"
#include "swag_kernels.h"

namespace {

constexpr int64_t kIn = 64, kOut = 32, kRank = 4;  // of the layer
constexpr int64_t kSize = 2048;                    // of the arena: each tensor starts at a multiple of 1024 elements
constexpr int64_t kKept = 2;                       // deviations
constexpr int64_t kSamples = 8, kRows = 3;

bool launch_failed = false, numbers_wrong = false;

void said(const char* function, int status) {
  std::printf("%s: %d %s\n", function, status, status == SWAG_OK ? "" : swag_last_error());
  if (status == SWAG_CUDA_ERROR) launch_failed = true;
}

void expect(const char* what, double value, double expected) {
  if (launch_failed || std::fabs(value - expected) <= 1e-5 * std::fabs(expected)) return;
  std::printf("%s is %g instead of %g\n", what, value, expected);
  numbers_wrong = true;
}

}  // namespace

int main() {
  float* mean = shared_array<float>(kSize);
  float* m2 = shared_array<float>(kSize);
  float* deviations = shared_array<float>(kKept * kSize);
  int64_t* count = shared_array<int64_t>(1);
  const swag_segment layout[] = {{0, kRank * kIn, 0}, {1024, kOut * kRank, 0}};

  // A is 1, then 3; B is always 0.5. Parameters may have different types.
  float* A = shared_array<float>(kRank * kIn, 1.0f);
  uint16_t* B = shared_array<uint16_t>(kOut * kRank, bfloat16(0.5f));
  const void* params[] = {A, B};
  const int32_t dtypes[] = {SWAG_FLOAT32, SWAG_BFLOAT16};
  swag_collect_args collect{};
  collect.params = params;
  collect.dtypes = dtypes;
  collect.layout = layout;
  collect.num_tensors = 2;
  collect.size = kSize;
  collect.mean = mean;
  collect.m2 = m2;
  collect.deviations = deviations;
  collect.rank = kKept;
  collect.count = count;
  said("swag_collect", swag_collect(&collect, nullptr));
  cudaDeviceSynchronize();
  for (int64_t i = 0; i < kRank * kIn; ++i) A[i] = 3.0f;
  said("swag_collect", swag_collect(&collect, nullptr));
  cudaDeviceSynchronize();
  expect("count", static_cast<double>(*count), 2);
  expect("mean of A", mean[kRank * kIn - 1], 2);
  expect("m2 of A", m2[0], 2);
  expect("second deviation of A", deviations[kSize], 1);
  expect("mean of B", mean[1024], 0.5);

  // With a standard deviation and a scale of 0, every sample is the mean.
  uint16_t* weights = shared_array<uint16_t>(kSamples * kSize);
  swag_draw_args draw{};
  draw.mean = mean;
  draw.std = shared_array<float>(kSize);
  draw.deviations = deviations;
  draw.rank = kKept;
  draw.size = kSize;
  draw.layout = layout;
  draw.num_tensors = 2;
  draw.out = weights;
  draw.dtype = SWAG_BFLOAT16;
  draw.num_samples = kSamples;
  draw.seed = 1;
  draw.first_sample = 0;
  draw.diag_scale = 0.7f;
  draw.low_rank_scale = 0;
  draw.antithetic = 1;
  said("swag_draw", swag_draw(&draw, nullptr));
  cudaDeviceSynchronize();
  expect("last sample of A", weights[(kSamples - 1) * kSize], bfloat16(2));

  // The samples of A and B lie where they were drawn, an arena apart; x and the base's output are shared by the samples.
  uint16_t* y = shared_array<uint16_t>(kSamples * kRows * kOut);
  swag_sampled_lora_args lora{};
  lora.x = shared_array<uint16_t>(kRows * kIn, bfloat16(1));
  lora.A = weights + layout[0].offset;
  lora.B = weights + layout[1].offset;
  lora.base = shared_array<uint16_t>(kRows * kOut, bfloat16(1));
  lora.y = y;
  lora.samples = kSamples;
  lora.rows = kRows;
  lora.in = kIn;
  lora.out = kOut;
  lora.rank = kRank;
  lora.stride_x = lora.stride_base = 0;
  lora.stride_A = lora.stride_B = kSize;
  lora.scaling = 0.5f;
  lora.dtype = lora.base_dtype = SWAG_BFLOAT16;
  said("swag_sampled_lora", swag_sampled_lora(&lora, nullptr));
  cudaDeviceSynchronize();
  expect("last element of y", y[kSamples * kRows * kOut - 1], bfloat16(1 + 0.5f * kIn * 2 * kRank * 0.5f));

  // Equal logits: every class has the same probability.
  float* log_sum = shared_array<float>(kRows * kOut, -INFINITY);
  float* entropy = shared_array<float>(kRows);
  int64_t* samples_seen = shared_array<int64_t>(1);
  swag_bayes_average_args average{};
  average.logits = y;
  average.dtype = SWAG_BFLOAT16;
  average.samples = kSamples;
  average.batch = kRows;
  average.classes = kOut;
  average.log_sum = log_sum;
  average.m2 = shared_array<float>(kRows * kOut);
  average.votes = shared_array<float>(kRows * kOut);
  average.entropy = entropy;
  average.count = samples_seen;
  average.group = 2;  // samples 2j and 2j + 1 are antithetic
  average.workspace = shared_array<char>(swag_bayes_average_workspace(&average) + 1);
  said("swag_bayes_average", swag_bayes_average(&average, nullptr));
  cudaDeviceSynchronize();
  expect("samples seen", static_cast<double>(*samples_seen), kSamples);
  expect("log_sum", log_sum[kRows * kOut - 1], std::log(static_cast<double>(kSamples) / kOut));
  expect("entropy", entropy[kRows - 1], std::log(static_cast<double>(kOut)));
  expect("votes of the first class", average.votes[0], kSamples);

  return numbers_wrong ? 1 : launch_failed ? 2 : 0;
}
