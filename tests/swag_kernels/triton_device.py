"""What Triton's interpreter does differently from a GPU."""

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def _fma_kernel(p_out, a, b, c):
    tl.store(p_out, tl.fma(a + tl.load(p_out), b, c))


@cache
def rounds_fma_once() -> bool:
    """A GPU does, the interpreter of Triton 3.9 too; older ones round the product as well."""
    out = torch.zeros((), device="cuda" if torch.cuda.is_available() else "cpu")
    _fma_kernel[1,](out, 1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11)
    return out.item() == 2.0**-24
