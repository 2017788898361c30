"""What every launch needs: the device of its tensors, and the compiler's options."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

ON_AMD = torch.version.hip is not None


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device's current stream; inside, that is the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def options(num_warps: int, *, exact: bool = False, registers: int | None = None, amd: bool = ON_AMD) -> dict[str, Any]:
    """``exact`` keeps products and sums as they are written. ``registers`` is the most that a thread may have: unless told,
    NVIDIA's assembler takes fewer than there are, and puts the rest of the values into memory."""
    limit = {} if amd or registers is None else {"maxnreg": registers}
    return {"num_warps": num_warps, "enable_fp_fusion": not exact, **limit}
