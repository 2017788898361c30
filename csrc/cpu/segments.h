#pragma once

#include "isa.h"
#include "kernels.h"

namespace swag::SWAG_ISA {

// The last segment that begins at or before an element of the arena, or -1 if there is none.
SWAG_INLINE int64_t segment_at(const Segment* layout, int64_t num_tensors, int64_t element) {
  int64_t low = 0, high = num_tensors;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (layout[middle].offset <= element)
      low = middle + 1;
    else
      high = middle;
  }
  return low - 1;
}

}  // namespace swag::SWAG_ISA
