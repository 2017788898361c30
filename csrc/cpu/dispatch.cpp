#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace swag {

namespace portable {
extern const Kernels table;
}
#ifdef SWAG_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#ifdef SWAG_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels table;
}
#endif
#endif

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets;
#ifdef SWAG_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef SWAG_AVX512_BF16
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_bf16::table);
#endif
  if (has_avx512) sets.push_back(&avx512::table);
  if (has_avx2) sets.push_back(&avx2::table);
#endif
  sets.push_back(&portable::table);
  return sets;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* set : supported()) names.emplace_back(set->isa);
  return names;
}

void select_isa(const std::string& name) {
  std::string known;
  for (const Kernels* set : supported()) {
    if (name == set->isa) {
      current().store(set, std::memory_order_relaxed);
      return;
    }
    known += known.empty() ? set->isa : std::string(", ") + set->isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; this processor and build have: " + known);
}

bool openmp_enabled() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace swag
