#pragma once

// Each kernel source is compiled once per instruction set with SWAG_ISA set to its name. All of a kernel's code lives in
// the namespace swag::SWAG_ISA, so that the linker can never give an older processor another set's inline function.

#ifndef SWAG_ISA
#error "SWAG_ISA names the instruction set: portable, avx2, avx512 or avx512_bf16"
#endif

#define SWAG_INLINE inline __attribute__((always_inline))
