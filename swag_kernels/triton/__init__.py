"""The ops as Triton kernels, for any GPU that Triton serves. Arguments were checked by :mod:`swag_kernels.ops`.

With ``TRITON_INTERPRET=1`` in the environment of the process, the kernels run on CPU tensors in Triton's interpreter:
slow, for tests.
"""

from __future__ import annotations

import os

import torch

_reason = ""
try:
    from swag_kernels.triton.bayes_average import bayes_average_
    from swag_kernels.triton.collect import collect_, recollect
    from swag_kernels.triton.draw import draw
    from swag_kernels.triton.sampled_lora import sampled_lora, sampled_lora_
    from swag_kernels.triton.sampled_lora_backward import sampled_lora_backward
    from swag_kernels.triton.sampled_lora_linear import sampled_lora_linear
except ImportError as error:
    _reason = f"Triton could not be imported ({error}); install it with 'pip install triton'"

__all__ = [
    "bayes_average_",
    "collect_",
    "draw",
    "recollect",
    "sampled_lora",
    "sampled_lora_",
    "sampled_lora_backward",
    "sampled_lora_linear",
]


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def missing() -> str | None:
    if _reason:
        return _reason
    if not (torch.cuda.is_available() or interpreted()):
        return "torch finds no GPU; with TRITON_INTERPRET=1 set before Python starts, Triton's interpreter runs it on the CPU"
    return None
