"""mean, m2 and one deviation row updated in one launch over every tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels.describe import describe
from swag_kernels.layout import BLOCK
from swag_kernels.recollect import Collections, describe_buffers
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


@dataclass(frozen=True)
class _Table:
    """int64 ``[size / BLOCK, 2]``, the address of each block's part of its tensor and the dtype of that; the constants of the
    kernel."""

    addresses: Tensor
    blocks: Tensor
    dtype: int
    aligned: bool


_collections: Collections[_Table] = Collections()


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    with on_device_of(mean):
        if mean.numel():
            contiguous = [p if p.is_contiguous() else p.contiguous() for p in params]
            described = describe(contiguous)
            table = _table(contiguous, described, layout, mean.numel(), mean.device)
            _collections.keep(described, describe_buffers(mean, m2, deviations, count), layout, table)
            _launch(table, mean, m2, deviations, count)
        count += 1


def recollect(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> bool:
    """Collects and is true if nothing but values changed since a collection of this layout, which was checked then."""
    table = _collections.repeated(params, describe_buffers(mean, m2, deviations, count), layout)
    if table is None:
        return False
    with on_device_of(mean):
        _launch(table, mean, m2, deviations, count)
        count += 1
    return True


def _launch(table: _Table, mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor) -> None:
    keep_for_graph(table.addresses, table.blocks)
    wide = all(t is None or t.data_ptr() % 16 == 0 for t in (mean, m2, deviations))
    size = mean.numel()
    collect_kernel[size // BLOCK,](
        table.addresses,
        table.blocks,
        mean,
        m2,
        mean if deviations is None else deviations,
        count,
        size,
        1 if deviations is None else len(deviations),
        DTYPE=table.dtype,
        ALIGNED=table.aligned and wide,
        HAS_DEVIATIONS=deviations is not None,
        B_N=BLOCK,
        **options(4, exact=True),
    )


def _table(params: list[Tensor], described: object, layout: Tensor, size: int, device: torch.device) -> _Table:
    """The last collection's table, or one made anew."""
    blocks, last = block_table(layout, size, device), _collections.last(layout)
    if last is not None and last.params == described and last.table.blocks is blocks:
        return last.table
    pointers, dtypes = [p.data_ptr() for p in params], [p.dtype for p in params]
    starts = torch.tensor([pointers, [DTYPES[d] for d in dtypes], [d.itemsize for d in dtypes]], dtype=torch.int64)
    tensor, _, _, within = blocks.long().unbind(1)
    if params:
        start, code, itemsize = starts.to(device)[:, tensor]
    else:
        start, code, itemsize = torch.zeros(3, len(tensor), dtype=torch.int64, device=device)
    return _Table(
        torch.stack((start + within * BLOCK * itemsize, code), dim=1),
        blocks,
        DTYPES[dtypes[0]] if len(set(dtypes)) == 1 else MIXED,
        all(pointer % 16 == 0 for pointer in pointers),
    )
