// sampled_lora for few rows, whose 16 at a time are shared by four blocks on four multiprocessors where clusters exist: one
// could not ask for A and B as fast as memory gives them.

#include "cuda/sampled_lora_kernel.h"

namespace swag::cuda {

int launch_decode(const LoraParams& p, int64_t samples, int dtype, bool aligned, bool cluster, void* stream) {
  const auto launch = cluster ? launch_lora<1, 4, 4> : launch_lora<1, 1, 8>;
  return launch("sampled_lora's decode kernel", p, samples, dtype, aligned, stream);
}

}  // namespace swag::cuda
