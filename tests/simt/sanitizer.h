#pragma once

// What AddressSanitizer wants to know of stacks, and nothing where it is not compiled in.

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_SANITIZED 1
#endif
#endif

#ifdef SIMT_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_START_SWITCH __sanitizer_start_switch_fiber
#define SIMT_FINISH_SWITCH __sanitizer_finish_switch_fiber
#define SIMT_UNPOISON __asan_unpoison_memory_region
#else
#define SIMT_SANITIZED 0
#define SIMT_START_SWITCH(...)
#define SIMT_FINISH_SWITCH(...)
#define SIMT_UNPOISON(...)
#endif
