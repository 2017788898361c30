"""Tables on the device that tell a program which tensor its block of the arena belongs to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swag_kernels.layout import BLOCK

_blocks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_captured: dict[int, Tensor] = {}


def block_table(layout: Tensor, size: int, device: torch.device) -> Tensor:
    """int32 ``[size / BLOCK, 4]``: the tensor of each block of the arena, how many of the block's elements are held, the
    quad within the whole tensor of its first element, and the index of that element's block within the segment.

    A block that no segment holds has 0 held elements. Kept for as long as the layout lives and is not written to.
    """
    key = (layout._version, size, device)
    known = _blocks.get(layout)
    if known is not None and known[0] == key:
        return known[1]
    table = torch.zeros(size // BLOCK, 4, dtype=torch.int32)
    for index, (offset, numel, first) in enumerate(layout.tolist()):
        blocks = -(-numel // BLOCK)
        within = torch.arange(blocks)
        rows = table[offset // BLOCK : offset // BLOCK + blocks]
        rows[:, 0] = index
        rows[:, 1] = (numel - within * BLOCK).clamp(max=BLOCK)
        rows[:, 2] = (first // 4 + within * (BLOCK // 4)).to(torch.int32)  # the low 32 bits
        rows[:, 3] = within
    table = table.to(device)
    _blocks[layout] = (key, table)
    return table


def keep_for_graph(*tables: Tensor) -> None:
    """Keeps tables for the life of the process if the current stream is being captured.

    A CUDA graph reads at every replay what it was captured with, and nothing tells when it ends. A table is held once,
    however often it is captured: 32 bytes for every 1024 elements of the arena.
    """
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.update((id(table), table) for table in tables)
