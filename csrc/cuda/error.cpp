#include "cuda/error.h"

#include <utility>

namespace {

thread_local std::string kept;
thread_local const char* last = "";

}  // namespace

namespace swag::cuda {

int failed(swag_status status, std::string message) noexcept {
  kept = std::move(message);
  last = kept.c_str();
  return status;
}

int out_of_memory() noexcept {
  last = "the host has no memory left for the call: what it was to write is undefined";
  return SWAG_OUT_OF_MEMORY;
}

}  // namespace swag::cuda

extern "C" const char* swag_last_error(void) { return last; }
