#pragma once

#include <string>

#include "include/swag_kernels.h"

namespace swag::cuda {

// Keeps the message for swag_last_error() and returns the status.
int failed(swag_status status, std::string message) noexcept;

// The same for want of memory, which a message would need.
int out_of_memory() noexcept;

}  // namespace swag::cuda
