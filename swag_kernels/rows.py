"""How kernels address the rows of a tensor with a sample axis."""

from __future__ import annotations

from torch import Tensor


def rows_and_stride(t: Tensor) -> tuple[Tensor, int]:
    """``t`` with its last two axes contiguous, and its stride over the samples: 0 where that axis has size 1."""
    samples, rows, columns = t.shape
    if t.is_contiguous():
        return t, rows * columns if samples > 1 else 0
    stride, row, step = t.stride()
    if (row != columns and rows > 1) or (step != 1 and columns > 1):
        t = t.contiguous()
        stride = t.stride(0)
    return t, stride if samples > 1 else 0
