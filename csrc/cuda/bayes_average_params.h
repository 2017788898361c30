#pragma once

// What the host and the two kernels of bayes_average share.

#include <cstdint>
#include <string>

#include "include/swag_kernels.h"

namespace swag::cuda {

struct AverageParams {
  const void* logits;  // [samples, batch, classes]
  float *log_sum, *m2, *votes, *entropy;
  int64_t* count;
  int samples, batch, classes, group;
};

// Rows of which one block holds all samples' logits.
struct SmallPlan {
  uint32_t rows;   // of the batch in a block; 0 if not even one fits
  uint32_t lanes;  // that share the log-sum-exp of one sample's row
  size_t shared;
  explicit SmallPlan(const swag_bayes_average_args& args);
  bool fits() const { return rows > 0; }
};

// Of any size.
struct LargePlan {
  int64_t part, parts;          // classes that a warp scans, and how many such parts a row has
  int64_t flags, pieces, rows;  // elements in the workspace, in this order
  explicit LargePlan(const swag_bayes_average_args& args);
  size_t workspace() const;
};

// aligned: all rows of the logits and of the state start at multiples of 16 bytes.
int launch_small(const AverageParams& p, const SmallPlan& plan, int dtype, bool aligned, void* stream);
int launch_large(const AverageParams& p, const LargePlan& plan, int dtype, bool aligned, void* workspace, void* stream);

inline std::string describe(const AverageParams& p) {
  return "S=" + std::to_string(p.samples) + ", B=" + std::to_string(p.batch) + ", C=" + std::to_string(p.classes);
}

}  // namespace swag::cuda
