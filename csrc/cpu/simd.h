#pragma once

// Vectors of the instruction set being compiled, under one set of names in swag::SWAG_ISA:
//
//   f32, u32        width lanes of float or uint32_t; f32(x) and u32(x) broadcast. width is a multiple of 4.
//   mask            one truth value a lane: from < <= > >= == on f32 and == on u32, or first(n), the lanes below n
//   load, store     contiguous, any alignment, from and to float, bfloat16 and float16; with a count n, only lanes below n
//                   are touched in memory and the others read as zero (0 <= n <= width)
//   stream          like a full store, past the cache, to an address aligned to width elements; fence() when all is written
//   + - * /         and fma(a, b, c) = a b + c, fnma(a, b, c) = c - a b with one rounding each, on every instruction set;
//   muladd          is fma where it is one instruction and a b + c elsewhere: for code that need not give the same bits
//   min, max        a < b ? a : b and a > b ? a : b, so b where either is NaN
//   sqrt, abs, select(mask, a, b), bits(f32), from_bits(u32), round (to nearest even, as a float)
//   to_int          nearest integer, ties to even, as two's complement in a u32
//   from_int, from_uint   correctly rounded
//   u32             + - ^ & | << >> (logical), shift_right_signed, mul(a, b, high) = low word of the 64-bit product
//   sum, maximum    over lanes: lane i with lane i + width/2, then halve, until one is left
//   transpose4      (a, b, c, d), four words of one quad a lane -> four vectors of consecutive elements, where
//                   quad_index() says which of the `width` quads each lane has to hold
//
// Conversions to bfloat16 and float16 round to nearest even; NaN stays NaN.

#include <cstdint>

#include "isa.h"

namespace swag {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace swag

#if defined(SWAG_ISA_avx512)
#include "simd_avx512.h"
#elif defined(SWAG_ISA_avx2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
