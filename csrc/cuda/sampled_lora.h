#pragma once

// What the host and the kernels of sampled_lora share: y_s = base_s + scaling (x_s A_s^T) B_s^T as
//   shrink  h = x A^T                 [rows, in] x [rank, in] -> [rows, rank]
//   expand  y = base + scaling h B^T  [rows, rank] x [out, rank] -> [rows, out]
// The sum over `in` goes in kSlices slices, each on its own, whose sums are added in one order in every kernel. So a row's
// bits depend on neither the kernel nor the other rows.

#include <string>

#include "core/scalar.h"
#include "cuda/device.h"
#include "include/swag_kernels.h"

namespace swag::cuda {

constexpr int kRows = 16;    // of x in a product of the tensor cores
constexpr int kSlices = 16;  // of the sum over `in`
constexpr int kStep = 32;    // elements of a row that a warp multiplies at once: 8, or 16 bytes, for each lane of a quad
constexpr int kGroup = 32;   // columns of y that a warp makes at once: 8 for each lane of a quad

struct LoraParams {
  const void* x;
  const void* A;
  const void* B;
  const void* base;
  void* y;
  int64_t stride_x, stride_A, stride_B, stride_base;
  int rows, in, out, rank;
  int slice;  // elements, a multiple of kStep
  float scaling;
  int base_dtype;
};

// aligned: all rows start at multiples of 16 bytes and have whole multiples of them.
int launch_decode(const LoraParams& p, int64_t samples, int dtype, bool aligned, bool cluster, void* stream);
int launch_prefill(const LoraParams& p, int64_t samples, int dtype, bool aligned, void* stream);
int launch_float32(const LoraParams& p, int64_t samples, bool aligned, void* stream);

inline std::string describe(const LoraParams& p, int64_t samples) {
  const auto text = [](const char* name, int64_t value) { return std::string(name) + "=" + std::to_string(value); };
  return text("S", samples) + text(", M", p.rows) + text(", in", p.in) + text(", out", p.out) + text(", r", p.rank);
}

}  // namespace swag::cuda
