#pragma once

#include <string>

#include "include/swag_kernels.h"

namespace swag::cuda {

// Keeps the message for swag_last_error() and returns the status.
int failed(swag_status status, std::string message);

}  // namespace swag::cuda
