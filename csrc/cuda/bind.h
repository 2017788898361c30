#pragma once

#include <pybind11/pybind11.h>

namespace swag::cuda {

// Adds cuda_collect, cuda_draw, cuda_sampled_lora, cuda_bayes_average and cuda_bayes_average_workspace: the C functions with
// addresses and the stream as integers. What fails raises ValueError, RuntimeError or MemoryError with its message.
void bind(pybind11::module_& m);

}  // namespace swag::cuda
