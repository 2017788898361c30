"""The arena: every random tensor's values in one flat buffer, and the table that says where each one lies.

A *layout* is an int64 tensor ``[T, 3]`` on the CPU. Row ``t`` describes tensor ``t``:

========== =====================================================================================
``offset`` first element in the arena, a multiple of :data:`BLOCK`
``numel``  number of elements
``first``  index of that first element within the whole tensor: 0 unless the tensor is a shard,
           always a multiple of 4
========== =====================================================================================

Elements between segments are padding: zero in every buffer and in every draw. The row number is the tensor word of the
random counter, so a layout must keep its order for a sample to keep its name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024
"""Alignment of a segment, in elements: no kernel block straddles two tensors."""


def segment_table(numels: Sequence[int]) -> Tensor:
    """Layout of whole tensors of the given sizes, packed in order: int64 ``[T, 3]``."""
    rows = []
    offset = 0
    for numel in numels:
        rows.append((offset, numel, 0))
        offset += _aligned(numel)
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def arena_size(layout: Tensor) -> int:
    """Elements of the smallest arena that holds the layout, a multiple of :data:`BLOCK`."""
    return max((offset + _aligned(numel) for offset, numel, _ in layout.tolist()), default=0)


def _aligned(numel: int) -> int:
    return -(-numel // BLOCK) * BLOCK


def check_layout(layout: Tensor, size: int) -> list[list[int]]:
    """The layout's rows, after a check that they fit an arena of ``size`` elements without overlap."""
    if layout.dtype != torch.int64 or layout.dim() != 2 or layout.shape[1] != 3 or layout.device.type != "cpu":
        raise ValueError(
            f"layout must be an int64 tensor [T, 3] on the CPU (see swag_kernels.segment_table), "
            f"got {layout.dtype} {list(layout.shape)} on {layout.device}"
        )
    rows: list[list[int]] = layout.tolist()
    end = 0
    for row, (offset, numel, first) in enumerate(rows):
        if offset % BLOCK or offset < end or numel < 0 or first % 4 or first < 0:
            raise ValueError(
                f"layout row {row} (offset {offset}, numel {numel}, first {first}) is not valid: segments ascend "
                f"without overlap from multiples of {BLOCK}, and first is a multiple of 4"
            )
        end = offset + numel
    if end > size:
        raise ValueError(f"layout needs an arena of {end} elements, the buffers have {size}")
    return rows
