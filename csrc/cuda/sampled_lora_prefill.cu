// sampled_lora for many rows, 32 to a block, so that A and B come half as often from the cache as x and base from memory.

#include "cuda/sampled_lora_kernel.h"

namespace swag::cuda {

int launch_prefill(const LoraParams& p, int64_t samples, int dtype, bool aligned, void* stream) {
  return launch_lora<2, 1, 8>("sampled_lora's prefill kernel", p, samples, dtype, aligned, stream);
}

}  // namespace swag::cuda
