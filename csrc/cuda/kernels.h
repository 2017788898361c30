#pragma once

// The kernels' launches, each in the .cu file of its op. api.cpp calls them with arguments that check.h has passed: sizes and
// products of sizes are representable, addresses are aligned. Each returns a swag_status.

#include <cstddef>

#include "include/swag_kernels.h"

namespace swag::cuda {

// Without tensors or elements only the count advances.
int collect(const swag_collect_args& args, void* stream);

// With samples and elements.
int draw(const swag_draw_args& args, void* stream);

// With samples, rows, in and out.
int sampled_lora(const swag_sampled_lora_args& args, void* stream);

// With samples; without rows or classes only the count advances.
int bayes_average(const swag_bayes_average_args& args, void* stream);
size_t bayes_average_workspace(const swag_bayes_average_args& args);

}  // namespace swag::cuda
