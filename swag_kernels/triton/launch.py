"""What every kernel and every launch needs: one compilation for each set of constants, the device, the compiler's options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

ON_AMD = torch.version.hip is not None


def kernel(function: Callable[..., None]) -> Any:
    """``triton.jit`` for a kernel that is compiled once for the types and constants of a call, and not again for integers
    that happen to be 1 or a multiple of 16, or for where a pointer points. What it may assume of them a constant says."""
    parameters = inspect.signature(function).parameters.values()
    given = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=given, do_not_specialize_on_alignment=given)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device's current stream; inside, that is the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def options(
    num_warps: int, *, exact: bool = False, registers: int | None = None, stages: int | None = None
) -> dict[str, Any]:
    """``exact`` keeps products and sums as they are written. ``registers`` is the most that a thread may have: unless told,
    NVIDIA's assembler takes fewer than there are, and puts the rest of the values into memory. ``stages`` of a loop's loads
    are in flight; AMD's shared memory holds two."""
    chosen: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": not exact}
    if registers is not None and not ON_AMD:
        chosen["maxnreg"] = registers
    if stages is not None:
        chosen["num_stages"] = min(stages, 2) if ON_AMD else stages
    return chosen
