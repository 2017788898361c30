"""What the device under test can be asked: a GPU everything, Triton's interpreter less."""

from functools import cache

import torch
import triton
import triton.language as tl

# The interpreter computes bfloat16 arithmetic and dots wrongly without saying so.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@triton.jit
def _fma_kernel(p_out, a, b, c):
    tl.store(p_out, tl.fma(a + tl.load(p_out), b, c))


@cache
def rounds_fma_once() -> bool:
    """A GPU does, the interpreter of Triton 3.9 too; older ones round the product as well."""
    out = torch.zeros((), device="cuda" if torch.cuda.is_available() else "cpu")
    _fma_kernel[1,](out, 1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11)
    return out.item() == 2.0**-24


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The bits of the CPU's kernels, where a fused product and sum is one; else within two roundings of the largest."""
    if rounds_fma_once():
        assert torch.equal(ours.cpu(), theirs)
    else:
        unit = torch.finfo(theirs.dtype).eps * theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2 * unit)
