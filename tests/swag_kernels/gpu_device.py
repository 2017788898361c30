"""What the device under test can be asked: a GPU everything, Triton's interpreter less."""

from importlib import import_module

import torch

from swag_kernels.backend import choose

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter computes bfloat16 arithmetic and dots wrongly without saying so.
TRITON_DTYPES = DTYPES if ON_GPU else [torch.float32, torch.float16]


def trusted(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float16 for one that the back end on the device computes wrongly."""
    return dtype if choose(device) != "triton" or dtype in TRITON_DTYPES else torch.float16


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The bits of the CPU's kernels, where a fused product and sum is one; else within two roundings of the largest."""
    if choose(ours.device) != "triton" or import_module("triton_device").rounds_fma_once():
        assert torch.equal(ours.cpu(), theirs)
    else:
        unit = torch.finfo(theirs.dtype).eps * theirs.abs().max().item() if theirs.numel() else 0
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2 * unit)
