// Which kernel serves a call of sampled_lora, by shape, dtype and alignment.

#include "cuda/error.h"
#include "cuda/kernels.h"
#include "cuda/sampled_lora.h"

namespace swag::cuda {
namespace {

// Whether every row of every tensor starts at a multiple of 16 bytes and has whole multiples of them.
bool aligned(const swag_sampled_lora_args& a) {
  return is_aligned(a.x) && is_aligned(a.A) && is_aligned(a.B) && is_aligned(a.base) && is_aligned(a.y) &&
         (a.in | a.out | a.rank | a.stride_x | a.stride_A | a.stride_B | a.stride_base) % 8 == 0;
}

struct Device {
  int major = 0, multiprocessors = 0;
  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
};

}  // namespace

int sampled_lora(const swag_sampled_lora_args& a, void* stream) {
  const int in = static_cast<int>(a.in), rank = static_cast<int>(a.rank);
  const LoraParams p{a.x,
                     a.A,
                     a.B,
                     a.base,
                     a.y,
                     a.stride_x,
                     a.stride_A,
                     a.stride_B,
                     a.stride_base,
                     static_cast<int>(a.rows),
                     in,
                     static_cast<int>(a.out),
                     rank,
                     static_cast<int>(ceil_div(in, kSlices * kStep)) * kStep,
                     a.scaling,
                     a.base_dtype};
  // Of the kernel that takes most. Others have as many blocks for more rows.
  if (const int64_t blocks = a.samples * ceil_div(a.rows, kRows) * 4; blocks > INT32_MAX)
    return failed(SWAG_INVALID_ARGUMENT, "swag_sampled_lora: " + describe(p, a.samples) + " needs " + std::to_string(blocks) +
                                             " blocks, more than a launch takes; pass fewer samples or rows at once");
  if (a.dtype == SWAG_FLOAT32) return launch_float32(p, a.samples, aligned(a), stream);

  const Device device;
  // With rows enough for every multiprocessor, sharing the sums of fewer rows costs more than it gives.
  if (a.samples * ceil_div(a.rows, 2 * kRows) >= device.multiprocessors && a.rows > kRows)
    return launch_prefill(p, a.samples, a.dtype, aligned(a), stream);
  const bool cluster = device.major >= 9 && a.samples * ceil_div(a.rows, kRows) < 4 * device.multiprocessors;
  return launch_decode(p, a.samples, a.dtype, aligned(a), cluster, stream);
}

}  // namespace swag::cuda
