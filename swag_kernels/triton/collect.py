"""mean, m2 and one deviation row updated in one launch over every tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swag_kernels.layout import BLOCK
from swag_kernels.triton.launch import on_device_of, options
from swag_kernels.triton.tables import block_table

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1
_addresses: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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


@triton.jit(do_not_specialize=["rank"])
def collect_kernel(
    p_addresses,
    p_blocks,
    p_mean,
    p_m2,
    p_deviations,
    p_count,
    size,
    rank,
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
    o_arena = i_block.to(tl.int64) * B_N + o_n
    theta = _load_parameter(address, dtype, o_n, held, DTYPE, ALIGNED)  # [B_N]
    mean = tl.load(p_mean + o_arena)
    m2 = tl.load(p_m2 + o_arena)
    delta = theta - mean
    new_mean = mean + tl.div_rn(delta, n)
    deviation = theta - new_mean
    tl.store(p_mean + o_arena, tl.where(m_n, new_mean, mean))
    tl.store(p_m2 + o_arena, tl.where(m_n, tl.fma(delta, deviation, m2), m2))
    if HAS_DEVIATIONS:
        tl.store(p_deviations + (seen % rank) * size + o_arena, tl.where(m_n, deviation, 0.0))


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    with on_device_of(mean):
        _collect(params, mean, m2, deviations, count, layout)
    count += 1


def _collect(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    size = mean.numel()
    if size:
        contiguous = [p if p.is_contiguous() else p.contiguous() for p in params]
        addresses, dtype, aligned = _address_table(contiguous, layout, size, mean.device)
        collect_kernel[size // BLOCK,](
            addresses,
            block_table(layout, size, mean.device),
            mean,
            m2,
            mean if deviations is None else deviations,
            count,
            size,
            1 if deviations is None else len(deviations),
            DTYPE=dtype,
            ALIGNED=aligned,
            HAS_DEVIATIONS=deviations is not None,
            B_N=BLOCK,
            **options(4, exact=True),
        )


def _address_table(
    params: list[Tensor], layout: Tensor, size: int, device: torch.device
) -> tuple[Tensor, int, bool]:
    """int64 ``[size / BLOCK, 2]``, address and dtype of each block's part of its tensor; the dtype of all tensors or
    MIXED; and whether every address is a multiple of 16.

    The table of a layout is kept, and made anew where an address or dtype in it is no longer that of the tensors given:
    what is compared is all that it was made from, so memory that is freed and used again cannot be mistaken.
    """
    content = tuple(map(Tensor.data_ptr, params)), tuple([p.dtype for p in params]), layout._version, size, device
    known = _addresses.get(layout)
    if known is not None and known[0] == content:
        return known[1]
    pointers, dtypes = content[:2]
    starts = torch.tensor([pointers, [DTYPES[d] for d in dtypes], [d.itemsize for d in dtypes]], dtype=torch.int64)
    tensor, _, _, within = block_table(layout, size, device).long().unbind(1)
    if params:
        start, code, itemsize = starts.to(device)[:, tensor]
    else:
        start, code, itemsize = torch.zeros(3, len(tensor), dtype=torch.int64, device=device)
    table = torch.stack((start + within * BLOCK * itemsize, code), dim=1)
    dtype = DTYPES[dtypes[0]] if len(set(dtypes)) == 1 else MIXED
    found = table, dtype, all(pointer % 16 == 0 for pointer in pointers)
    _addresses[layout] = (content, found)
    return found
