// Which kernel serves a call of bayes_average, by its sizes.

#include "cuda/bayes_average_params.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace swag::cuda {

int bayes_average(const swag_bayes_average_args& a, void* stream) {
  const AverageParams p{a.logits,
                        a.log_sum,
                        a.m2,
                        a.votes,
                        a.entropy,
                        a.count,
                        static_cast<int>(a.samples),
                        static_cast<int>(a.classes ? a.batch : 0),
                        static_cast<int>(a.classes),
                        a.group};
  const int64_t elements = a.dtype == SWAG_FLOAT32 ? 4 : 8;  // in 16 bytes
  const bool aligned = a.classes % elements == 0 && is_aligned(a.logits) && is_aligned(a.log_sum) && is_aligned(a.m2);
  const SmallPlan small(a);
  if (small.fits()) return launch_small(p, small, a.dtype, aligned, stream);
  return launch_large(p, LargePlan(a), a.dtype, aligned, a.workspace, stream);
}

size_t bayes_average_workspace(const swag_bayes_average_args& a) { return SmallPlan(a).fits() ? 0 : LargePlan(a).workspace(); }

}  // namespace swag::cuda
