// The C functions: a check, a launch, and no exception across the boundary.

#include "cuda/check.h"
#include "cuda/error.h"
#include "cuda/kernels.h"

namespace {

template <class Call>
int guarded(const Call& call) noexcept {
  try {
    return call();
  } catch (...) {  // of lists and messages, which throw for want of memory
    return swag::cuda::out_of_memory();
  }
}

}  // namespace

extern "C" int swag_collect(const swag_collect_args* args, swag_stream stream) {
  return guarded([=] {
    if (int status = swag::cuda::check(args)) return status;
    return swag::cuda::collect(*args, stream);
  });
}

extern "C" int swag_draw(const swag_draw_args* args, swag_stream stream) {
  return guarded([=] {
    if (int status = swag::cuda::check(args)) return status;
    return args->num_samples && args->size ? swag::cuda::draw(*args, stream) : SWAG_OK;
  });
}

extern "C" int swag_sampled_lora(const swag_sampled_lora_args* args, swag_stream stream) {
  return guarded([=] {
    if (int status = swag::cuda::check(args)) return status;
    return args->samples && args->rows && args->out ? swag::cuda::sampled_lora(*args, stream) : SWAG_OK;
  });
}

extern "C" int swag_bayes_average(const swag_bayes_average_args* args, swag_stream stream) {
  return guarded([=] {
    if (int status = swag::cuda::check(args)) return status;
    return args->samples ? swag::cuda::bayes_average(*args, stream) : SWAG_OK;
  });
}

extern "C" size_t swag_bayes_average_workspace(const swag_bayes_average_args* args) {
  size_t bytes = 0;
  guarded([&] {
    if (int status = swag::cuda::check_sizes(args)) return status;
    if (args->samples && args->batch && args->classes) bytes = swag::cuda::bayes_average_workspace(*args);
    return int{SWAG_OK};
  });
  return bytes;
}
