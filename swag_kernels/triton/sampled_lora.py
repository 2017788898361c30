"""y_s = base_s + scaling (x_s A_s^T) B_s^T and its backward, from three kernels.

shrink  h = x A^T                 [M, in] x [r, in] -> [M, r], the long axis in chunks whose sums are added in order
expand  y = base + scaling h B^T  [M, r] x [out, r] -> [M, out]
outer   g = scaling h^T x         [M, r] x [M, in] -> [r, in]

Rounding of a row depends on neither the other rows nor on how many programs share its chunks. Nothing is added by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels import reference
from swag_kernels.rows import rows_and_stride
from swag_kernels.triton.launch import on_device_of, options

CHUNK = 1024  # of the long axis, summed on its own
_SPREAD = 512  # programs below which every chunk gets one of its own
COLUMNS = 128  # of a tile of y or of a gradient
OUTER_ROWS = 32  # at most, of a step of the sum over the rows
MAX_RANK = 64  # beyond, a low-rank product is a matrix product like any other
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def shrink_kernel(
    p_x,
    p_a,
    p_h,
    rows,
    features,
    stride_x,
    stride_a,
    stride_a_rank,
    stride_a_feature,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_K: tl.constexpr,
):
    """h [S, PARTS, M, B_R] float32: one part, or one for every chunk."""
    i_m, i_part, i_sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * B_M + tl.arange(0, B_M)
    o_r = tl.arange(0, B_R)
    m_m, m_r = o_m < rows, o_r < RANK
    p_x += i_sample * stride_x
    p_a += i_sample * stride_a
    first = i_part * CHUNK
    last = tl.minimum(first + CHUNK, features) if PARTS > 1 else features
    h = tl.zeros([B_M, B_R], tl.float32)
    for chunk in tl.range(first, last, CHUNK):
        total = tl.zeros([B_M, B_R], tl.float32)
        for k in tl.range(chunk, tl.minimum(chunk + CHUNK, last), B_K):
            o_k = k + tl.arange(0, B_K)
            m_k = o_k < last
            p_rows = p_x + o_m.to(tl.int64)[:, None] * features + o_k[None, :]
            x = tl.load(p_rows, mask=m_m[:, None] & m_k[None, :], other=0.0).to(TYPE)  # [B_M, B_K]
            p_columns = p_a + o_r[None, :] * stride_a_rank + o_k[:, None] * stride_a_feature
            a = tl.load(p_columns, mask=m_k[:, None] & m_r[None, :], other=0.0).to(TYPE)  # [B_K, B_R]
            total = tl.dot(x, a, total, input_precision="ieee")
        h += total
    p_out = p_h + ((i_sample * PARTS + i_part) * rows + o_m)[:, None] * B_R + o_r[None, :]
    tl.store(p_out, h, mask=m_m[:, None])


@triton.jit
def _load_h(p_h, o_m, rows, PARTS: tl.constexpr, B_R: tl.constexpr):
    """The sum of the parts [M, B_R], in order; zero for rows from `rows` on."""
    p_part = p_h + o_m.to(tl.int64)[:, None] * B_R + tl.arange(0, B_R)[None, :]
    h = tl.load(p_part, mask=(o_m < rows)[:, None], other=0.0)
    for i_part in tl.static_range(1, PARTS):
        h += tl.load(p_part + i_part * rows * B_R, mask=(o_m < rows)[:, None], other=0.0)
    return h


@triton.jit
def expand_kernel(
    p_h,
    p_b,
    p_base,
    p_y,
    rows,
    out,
    samples,
    stride_b,
    stride_b_out,
    stride_b_rank,
    stride_base,
    scaling,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BASE: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_N: tl.constexpr,
):
    """One tile of y for each sample, or with `samples` > 1 one tile of the sum over so many samples."""
    i_n, i_m, i_sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * B_M + tl.arange(0, B_M)
    o_n = i_n * B_N + tl.arange(0, B_N)
    o_r = tl.arange(0, B_R)
    m_r, m_n = o_r < RANK, o_n < out
    m_y = (o_m < rows)[:, None] & m_n[None, :]
    o_y = o_m.to(tl.int64)[:, None] * out + o_n[None, :]
    total = tl.zeros([B_M, B_N], tl.float32)
    for i in tl.range(0, samples):
        p_part = p_h + (i_sample + i) * PARTS * rows * B_R
        h = _load_h(p_part, o_m, rows, PARTS, B_R)
        if PACKED:  # rows of a known length are aligned, and loaded wide
            o_b = o_n[None, :] * RANK + o_r[:, None]
        else:
            o_b = o_n[None, :] * stride_b_out + o_r[:, None] * stride_b_rank
        p_columns = p_b + (i_sample + i) * stride_b + o_b
        b = tl.load(p_columns, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [B_R, B_N]
        total = tl.dot(h.to(b.dtype), b, total, input_precision="ieee")
    total = total * scaling
    if HAS_BASE:
        total += tl.load(p_base + i_sample * stride_base + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + i_sample * rows * out + o_y, total.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def outer_kernel(
    p_h,
    p_x,
    p_g,
    rows,
    features,
    stride_x,
    stride_g_rank,
    stride_g_feature,
    scaling,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_N: tl.constexpr,
):
    """g [S, r, in] or [S, in, r], by its strides."""
    i_n, i_sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * B_N + tl.arange(0, B_N)
    o_r = tl.arange(0, B_R)
    m_n = o_n < features
    p_h += i_sample * PARTS * rows * B_R
    p_x += i_sample * stride_x
    total = tl.zeros([B_R, B_N], tl.float32)
    for m in tl.range(0, rows, B_M, num_stages=2):
        o_m = m + tl.arange(0, B_M)
        h = _load_h(p_h, o_m, rows, PARTS, B_R).to(TYPE)
        p_rows = p_x + o_m.to(tl.int64)[:, None] * features + o_n[None, :]
        x = tl.load(p_rows, mask=(o_m < rows)[:, None] & m_n[None, :], other=0.0).to(TYPE)
        total = tl.dot(tl.trans(h), x, total, input_precision="ieee")
    p_out = p_g + i_sample * RANK * features + o_r[:, None] * stride_g_rank + o_n[None, :] * stride_g_feature
    tl.store(p_out, (total * scaling).to(p_g.dtype.element_ty), mask=(o_r < RANK)[:, None] & m_n[None, :])


def tile_of(rows: int, rank: int, itemsize: int) -> dict[str, int]:
    """Rows, ranks and long-axis elements of a program. A dot wants 16 of each; float32 has no tensor cores to feed."""
    b_rank = max(16, triton.next_power_of_2(rank))
    b_rows = 16 if rows <= 16 or itemsize == 4 else 64
    b_features = max(16, min(64, 4096 // b_rank) * 2 // itemsize)
    return {"B_M": b_rows, "B_R": b_rank, "B_K": b_features, "num_warps": 8 if b_rows * b_rank >= 2048 else 4}


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    if A.shape[1] > MAX_RANK:
        return _by_matrix_products(x, A, B, scaling, base)
    y = torch.empty(len(A), *base.shape[1:], dtype=base.dtype, device=base.device)
    _forward(x, A, B, scaling, base, y)
    return y


def sampled_lora_(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    if base.is_contiguous() and A.shape[1] <= MAX_RANK:
        _forward(x, A, B, scaling, base, base)
    else:
        base.copy_(sampled_lora(x, A, B, scaling, base))


def sampled_lora_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    if A.shape[1] > MAX_RANK:
        return reference.sampled_lora_backward(grad, x, A, B, scaling)
    dx, dA, dB = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, A, B))
    with on_device_of(x):
        hidden, d_hidden = _shrink(x, A, x.dtype), _shrink(grad, B.mT, x.dtype)
        _expand(d_hidden, A.mT, scaling, None, dx)
        _outer(d_hidden, x, scaling, dA)
        _outer(hidden, grad, scaling, dB.mT)
    return dx, dA, dB


def _by_matrix_products(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    if base.dtype != x.dtype:
        return reference.sampled_lora(x, A, B, scaling, base)
    samples = len(A)
    hidden = torch.bmm(x.expand(samples, *x.shape[1:]), A.mT)
    return torch.baddbmm(base.expand(samples, *base.shape[1:]), hidden, B.mT, alpha=scaling)


def _forward(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor, y: Tensor) -> None:
    with on_device_of(x):
        _expand(_shrink(x, A, x.dtype), B, scaling, base, y)


def _shrink(x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """x Aᵀ in float32 from products of ``dtype``: [S, parts, M, ranks of a tile], to be added over the parts."""
    x, stride_x = rows_and_stride(x)
    samples, rank, features = A.shape
    rows = x.shape[1]
    tile = tile_of(rows, rank, dtype.itemsize)
    blocks = triton.cdiv(rows, tile["B_M"])
    chunks = max(1, triton.cdiv(features, CHUNK))
    parts = chunks if blocks * samples < _SPREAD else 1
    h = torch.empty(samples, parts, rows, tile["B_R"], device=x.device)
    if h.numel():
        shrink_kernel[blocks, parts, samples](
            x,
            A,
            h,
            rows,
            features,
            stride_x,
            *A.stride(),
            RANK=rank,
            CHUNK=CHUNK,
            PARTS=parts,
            TYPE=TYPES[dtype],
            B_M=tile["B_M"],
            B_R=tile["B_R"],
            B_K=tile["B_K"],
            **options(tile["num_warps"], registers=255),
        )
    return h


def _expand(h: Tensor, B: Tensor, scaling: float, base: Tensor | None, y: Tensor) -> None:
    """y = base + scaling · h Bᵀ; summed over the samples where y has one and h has several."""
    if not y.numel():
        return
    (samples, parts, rows, b_rank), (_, out, rank) = h.shape, B.shape
    start, stride_base = (y, 0) if base is None else rows_and_stride(base)
    summed = samples if y.shape[0] != samples else 1
    tile = tile_of(rows, rank, B.element_size())
    expand_kernel[triton.cdiv(out, COLUMNS), triton.cdiv(rows, tile["B_M"]), y.shape[0]](
        h,
        B,
        start,
        y,
        rows,
        out,
        summed,
        *B.stride(),
        stride_base,
        scaling,
        RANK=rank,
        PARTS=parts,
        PACKED=B.stride()[1:] == (rank, 1),
        HAS_BASE=base is not None,
        B_M=tile["B_M"],
        B_R=b_rank,
        B_N=COLUMNS,
        **options(tile["num_warps"], registers=255),
    )


def _outer(h: Tensor, x: Tensor, scaling: float, g: Tensor) -> None:
    """g = scaling · hᵀ x, [S, r, in]."""
    if not g.numel():
        return
    x, stride_x = rows_and_stride(x)
    (samples, parts, rows, b_rank), (_, rank, features) = h.shape, g.shape
    tile = tile_of(rows, rank, g.element_size())
    outer_kernel[triton.cdiv(features, COLUMNS), samples](
        h,
        x,
        g,
        rows,
        features,
        stride_x,
        *g.stride()[1:],
        scaling,
        RANK=rank,
        PARTS=parts,
        TYPE=TYPES[g.dtype],
        B_M=min(tile["B_M"], OUTER_ROWS),
        B_R=b_rank,
        B_N=COLUMNS,
        **options(tile["num_warps"], registers=255),
    )
