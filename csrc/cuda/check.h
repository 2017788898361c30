#pragma once

// What each function demands of its arguments, tested on the host. SWAG_OK, or SWAG_INVALID_ARGUMENT with a message that names
// the function, the argument, its value and the way out.

#include "include/swag_kernels.h"

namespace swag::cuda {

int check(const swag_collect_args* args);
int check(const swag_draw_args* args);
int check(const swag_sampled_lora_args* args);
int check(const swag_bayes_average_args* args);

// The sizes alone, as swag_bayes_average_workspace has no use for more.
int check_sizes(const swag_bayes_average_args* args);

}  // namespace swag::cuda
