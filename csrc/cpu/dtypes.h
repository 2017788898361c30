#pragma once

// with_type: runs a generic lambda with a value of the element type that a Dtype names.

#include "kernels.h"
#include "simd.h"

namespace swag::SWAG_ISA {

template <class Body>
SWAG_INLINE void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(float{});
    case Dtype::bfloat16: return body(bfloat16{});
    case Dtype::float16: return body(float16{});
  }
}

}  // namespace swag::SWAG_ISA
