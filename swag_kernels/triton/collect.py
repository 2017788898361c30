"""mean, m2 and one deviation row updated in one launch over every tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swag_kernels.describe import describe
from swag_kernels.layout import BLOCK
from swag_kernels.triton.launch import kernel, on_device_of, options
from swag_kernels.triton.tables import block_table, keep_for_graph

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1


@triton.jit
def _load_as(address, TYPE: tl.constexpr, o_n, held, ALIGNED: tl.constexpr):
    p_theta = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        p_theta = tl.multiple_of(p_theta, 16)
    if held == o_n.shape[0]:  # without a mask, so in wide loads
        theta = tl.load(p_theta + o_n)
    else:
        theta = tl.load(p_theta + o_n, mask=o_n < held, other=0.0)
    return theta.to(tl.float32)


@triton.jit
def _load_parameter(address, dtype, o_n, held, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a float32 (0), bfloat16 (1) or float16 (2) tensor, as float32."""
    if DTYPE == 0:
        theta = _load_as(address, tl.float32, o_n, held, ALIGNED)
    elif DTYPE == 1:
        theta = _load_as(address, tl.bfloat16, o_n, held, ALIGNED)
    elif DTYPE == 2:
        theta = _load_as(address, tl.float16, o_n, held, ALIGNED)
    elif dtype == 0:
        theta = _load_as(address, tl.float32, o_n, held, ALIGNED)
    elif dtype == 1:
        theta = _load_as(address, tl.bfloat16, o_n, held, ALIGNED)
    else:
        theta = _load_as(address, tl.float16, o_n, held, ALIGNED)
    return theta


@kernel
def collect_kernel(
    p_addresses,
    p_blocks,
    p_mean,
    p_m2,
    p_deviations,
    p_count,
    size: tl.int64,
    rank: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_DEVIATIONS: tl.constexpr,
    B_N: tl.constexpr,
):
    """B_N elements, a block of the arena and so of one tensor."""
    i_block = tl.program_id(0)
    held = tl.load(p_blocks + i_block * 4 + 1)
    if held == 0:
        return
    address = tl.load(p_addresses + i_block * 2)
    dtype = tl.load(p_addresses + i_block * 2 + 1)
    seen = tl.load(p_count)
    n = (seen + 1).to(tl.float32)

    o_n = tl.arange(0, B_N)
    m_n = o_n < held
    o_begin = i_block.to(tl.int64) * B_N
    p_mean, p_m2 = p_mean + o_begin, p_m2 + o_begin
    if ALIGNED:
        p_mean, p_m2 = tl.multiple_of(p_mean, 16), tl.multiple_of(p_m2, 16)
    theta = _load_parameter(address, dtype, o_n, held, DTYPE, ALIGNED)  # [B_N]
    mean = tl.load(p_mean + o_n)
    m2 = tl.load(p_m2 + o_n)
    delta = theta - mean
    new_mean = mean + tl.div_rn(delta, n)
    deviation = theta - new_mean
    tl.store(p_mean + o_n, tl.where(m_n, new_mean, mean))
    tl.store(p_m2 + o_n, tl.where(m_n, tl.fma(delta, deviation, m2), m2))
    if HAS_DEVIATIONS:
        p_slot = p_deviations + (seen % rank) * size + o_begin
        if ALIGNED:
            p_slot = tl.multiple_of(p_slot, 16)
        tl.store(p_slot + o_n, tl.where(m_n, deviation, 0.0))


@dataclass
class _Known:
    """The table of a layout's last collection, and the descriptions of all that it was made from and checked for."""

    params: object  # contiguous ones, all of them
    buffers: object
    wide: bool  # whether the buffers start at multiples of 16 bytes
    version: int
    addresses: Tensor
    blocks: Tensor
    dtype: int
    aligned: bool


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    with on_device_of(mean):
        if mean.numel():
            contiguous = [p if p.is_contiguous() else p.contiguous() for p in params]
            known = _table(contiguous, layout, mean.numel(), mean.device)
            known.buffers = _buffers(mean, m2, deviations, count)
            known.wide = all(t is None or t.data_ptr() % 16 == 0 for t in (mean, m2, deviations))
            _launch(known, mean, m2, deviations, count)
        count += 1


def recollect(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> bool:
    """Collects and is true if nothing but values changed since a collection of this layout, which was checked then.

    With some hundred tensors, the checks of the op take longer than its kernel.
    """
    known = _known.get(layout)
    if (
        known is None
        or known.version != layout._version
        or known.buffers != _buffers(mean, m2, deviations, count)
        or known.params != describe(params)
    ):
        return False
    with on_device_of(mean):
        _launch(known, mean, m2, deviations, count)
        count += 1
    return True


def _buffers(mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor) -> object:
    return describe([mean, m2, count] if deviations is None else [mean, m2, count, deviations])


def _launch(known: _Known, mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor) -> None:
    keep_for_graph(known.addresses, known.blocks)
    size = mean.numel()
    collect_kernel[size // BLOCK,](
        known.addresses,
        known.blocks,
        mean,
        m2,
        mean if deviations is None else deviations,
        count,
        size,
        1 if deviations is None else len(deviations),
        DTYPE=known.dtype,
        ALIGNED=known.aligned and known.wide,
        HAS_DEVIATIONS=deviations is not None,
        B_N=BLOCK,
        **options(4, exact=True),
    )


def _table(params: list[Tensor], layout: Tensor, size: int, device: torch.device) -> _Known:
    """The kept table, or one made anew: int64 ``[size / BLOCK, 2]``, the address of each block's part of its tensor and
    the dtype of that."""
    described, blocks, known = describe(params), block_table(layout, size, device), _known.get(layout)
    if known is not None and known.params == described and known.blocks is blocks:
        return known
    pointers, dtypes = [p.data_ptr() for p in params], [p.dtype for p in params]
    starts = torch.tensor([pointers, [DTYPES[d] for d in dtypes], [d.itemsize for d in dtypes]], dtype=torch.int64)
    tensor, _, _, within = blocks.long().unbind(1)
    if params:
        start, code, itemsize = starts.to(device)[:, tensor]
    else:
        start, code, itemsize = torch.zeros(3, len(tensor), dtype=torch.int64, device=device)
    made = _Known(
        described,
        None,
        False,
        layout._version,
        torch.stack((start + within * BLOCK * itemsize, code), dim=1),
        blocks,
        DTYPES[dtypes[0]] if len(set(dtypes)) == 1 else MIXED,
        all(pointer % 16 == 0 for pointer in pointers),
    )
    _known[layout] = made
    return made
