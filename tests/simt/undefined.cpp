// What UndefinedBehaviorSanitizer, compiled into the kernels, calls when it finds something: a fault, like all others.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "simt.h"

namespace {

struct Place {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void found(const char* what, const Place& at) {
  const char* const slash = strrchr(at.file, '/');
  const std::string where = std::string(slash ? slash + 1 : at.file) + ":" + std::to_string(at.line);
  if (simt::self) simt::fault(std::string(what) + " (" + where + ")");
  fprintf(stderr, "the host's code %s (%s)\n", what, where.c_str());
  abort();
}

}  // namespace

#define SIMT_HANDLE(name, what) \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(const Place* at) { found(what, *at); }

SIMT_HANDLE(type_mismatch_v1, "uses a misaligned address")
SIMT_HANDLE(out_of_bounds, "uses an index outside of its array")
SIMT_HANDLE(shift_out_of_bounds, "shifts by more than there are bits")
SIMT_HANDLE(add_overflow, "adds beyond an integer's range")
SIMT_HANDLE(sub_overflow, "subtracts beyond an integer's range")
SIMT_HANDLE(mul_overflow, "multiplies beyond an integer's range")
SIMT_HANDLE(divrem_overflow, "divides beyond an integer's range")
SIMT_HANDLE(negate_overflow, "negates beyond an integer's range")
