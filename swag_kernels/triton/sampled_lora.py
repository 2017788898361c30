"""y_s = base_s + scaling (x_s A_s^T) B_s^T, from two kernels.

shrink  h = x A^T                 [M, in] x [r, in] -> [M, r], the long axis in chunks whose sums are added in order
expand  y = base + scaling h B^T  [M, r] x [out, r] -> [M, out]

Rounding of a row depends on neither the other rows nor on how many programs share its chunks. Nothing is added by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels import products
from swag_kernels.rows import rows_and_stride
from swag_kernels.triton.launch import kernel, on_device_of, options
from swag_kernels.triton.plan import CHUNK_STEP, CHUNKS, Plan, plan

_STEP = tl.constexpr(CHUNK_STEP)
_CHUNKS = tl.constexpr(CHUNKS)


@triton.jit
def in_eights(n, ALIGNED: tl.constexpr):
    return n // 8 * 8 if ALIGNED else n  # the same number, which the compiler then knows to be a multiple of 8


@triton.jit
def rank_of(rank, RANK: tl.constexpr):
    return RANK if RANK else rank  # known where rows of so many elements are to be loaded at once


@kernel
def shrink_kernel(
    p_x,
    p_a,
    p_h,
    rows: tl.int32,
    features: tl.int32,
    rank: tl.int32,
    chunk: tl.int32,
    stride_x: tl.int64,
    stride_a: tl.int64,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_K: tl.constexpr,
):
    """h [S, PARTS, M, WIDTH] float32, for one part of the chunks; a sample of A is [r, in], or [in, r] if TRANSPOSED."""
    i_m, i_part, i_sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = rank_of(rank, RANK)
    features = in_eights(features, ALIGNED)
    chunk = chunk // _STEP * _STEP
    o_m = i_m * B_M + tl.arange(0, B_M)
    o_r = tl.arange(0, B_R)
    m_m, m_r = o_m < rows, o_r < r
    p_x = p_x + i_sample * stride_x
    if ALIGNED:
        p_x = tl.multiple_of(p_x, 16)
    p_a = p_a + i_sample * stride_a
    if ALIGNED:
        p_a = tl.multiple_of(p_a, 16)
    h = tl.zeros([B_M, B_R], tl.float32)
    for i_chunk in tl.range(i_part * (_CHUNKS // PARTS), (i_part + 1) * (_CHUNKS // PARTS)):
        total = tl.zeros([B_M, B_R], tl.float32)
        for k in tl.range(i_chunk * chunk, tl.minimum((i_chunk + 1) * chunk, features), B_K):
            o_k = k + tl.arange(0, B_K)
            m_k = o_k < features
            p_rows = p_x + o_m.to(tl.int64)[:, None] * features + o_k[None, :]
            x = tl.load(p_rows, mask=m_m[:, None] & m_k[None, :], other=0.0)  # [B_M, B_K]
            o_a = o_k[:, None] * r + o_r[None, :] if TRANSPOSED else o_r[None, :] * features + o_k[:, None]
            a = tl.load(p_a + o_a, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [B_K, B_R]
            total = tl.dot(x, a, total, input_precision="ieee")
        h += total
    p_out = tl.multiple_of(p_h + (i_sample * PARTS + i_part) * rows * WIDTH, 16)
    tl.store(p_out + o_m[:, None] * WIDTH + o_r[None, :], h, mask=m_m[:, None] & (o_r < WIDTH)[None, :])


@triton.jit
def load_h(p_h, i_sample, o_m, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, B_R: tl.constexpr):
    """The sum of the parts [M, B_R], in order; zero for rows from `rows` on."""
    o_r = tl.arange(0, B_R)[None, :]
    m_h = (o_m < rows)[:, None] & (o_r < WIDTH)
    h = tl.zeros([o_m.shape[0], B_R], tl.float32)
    for i_part in tl.static_range(PARTS):
        p_part = tl.multiple_of(p_h + (i_sample * PARTS + i_part) * rows * WIDTH, 16)
        h += tl.load(p_part + o_m[:, None] * WIDTH + o_r, mask=m_h, other=0.0)
    return h


@kernel
def expand_kernel(
    p_h,
    p_b,
    p_base,
    p_y,
    rows: tl.int32,
    out: tl.int32,
    rank: tl.int32,
    stride_b: tl.int64,
    stride_base: tl.int64,
    scaling: tl.float32,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BASE: tl.constexpr,
    TILES: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_N: tl.constexpr,
):
    """TILES tiles of y side by side, which share the tile of h; a sample of B is [out, r], or [r, out] if TRANSPOSED."""
    i_n, i_m, i_sample = tl.program_id(0) * TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = rank_of(rank, RANK)
    out = in_eights(out, ALIGNED)
    o_m = i_m * B_M + tl.arange(0, B_M)
    o_r = tl.arange(0, B_R)
    o_row = o_m.to(tl.int64)[:, None] * out
    p_b += i_sample * stride_b
    p_base += i_sample * stride_base
    p_y += i_sample * rows * out
    if ALIGNED:
        p_b, p_base, p_y = tl.multiple_of(p_b, 16), tl.multiple_of(p_base, 16), tl.multiple_of(p_y, 16)
    h = load_h(p_h, i_sample, o_m, rows, PARTS, WIDTH, B_R).to(p_b.dtype.element_ty)
    for i in tl.range(0, TILES, num_stages=1):
        o_n = (i_n + i) * B_N + tl.arange(0, B_N)
        m_n = o_n < out
        m_y = (o_m < rows)[:, None] & m_n[None, :]
        o_b = o_r[:, None] * out + o_n[None, :] if TRANSPOSED else o_n[None, :] * r + o_r[:, None]
        b = tl.load(p_b + o_b, mask=(o_r < r)[:, None] & m_n[None, :], other=0.0)  # [B_R, B_N]
        y = tl.dot(h, b, input_precision="ieee") * scaling
        if HAS_BASE:
            y += tl.load(p_base + o_row + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
        tl.store(p_y + o_row + o_n[None, :], y.to(p_y.dtype.element_ty), mask=m_y)


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    y = torch.empty(len(A), *base.shape[1:], dtype=base.dtype, device=base.device)
    _forward(x, A, B, scaling, base, y)
    return y


def sampled_lora_(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    if base.is_contiguous():
        _forward(x, A, B, scaling, base, base)
    else:
        base.copy_(sampled_lora(x, A, B, scaling, base))


def _forward(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor, y: Tensor) -> None:
    """Into y, which may be the base."""
    if not y.numel():
        return
    (x, stride_x), (A, stride_a), (B, stride_b) = map(rows_and_stride, (x, A, B))
    start, stride_base = rows_and_stride(base)
    (samples, rank, _), rows = A.shape, x.shape[1]
    chosen = plan(samples, rows, rank, x.dtype, x, A, B.flatten(1), start, y)
    with on_device_of(x):
        if chosen is not None and x.dtype in (base.dtype, torch.float32):
            h = shrink(chosen, x, stride_x, A, stride_a, transposed=False)
            expand(chosen, h, B, stride_b, scaling, (start, stride_base), y, transposed=False)
            return
        products.update(x, A, B, scaling, base, y)


def shrink(p: Plan, x: Tensor, stride_x: int, A: Tensor, stride_a: int, *, transposed: bool) -> Tensor:
    """x Aᵀ in float32, [S, parts, M, r or more], to be added over the parts. A is [S, r, in], or [S, in, r] if transposed."""
    (_, rows, features), samples, rank = x.shape, len(A), A.shape[2 if transposed else 1]
    h = torch.empty(samples, p.parts, rows, p.known_rank or p.b_rank, device=x.device)
    if h.numel():
        shrink_kernel[triton.cdiv(rows, p.b_rows), p.parts, samples](
            x,
            A,
            h,
            rows,
            features,
            rank,
            triton.cdiv(features, CHUNKS * CHUNK_STEP) * CHUNK_STEP,
            stride_x,
            stride_a,
            RANK=p.known_rank if transposed else 0,
            ALIGNED=p.aligned,
            TRANSPOSED=transposed,
            PARTS=p.parts,
            WIDTH=h.shape[3],
            B_M=p.b_rows,
            B_R=p.b_rank,
            B_K=p.b_features,
            **options(p.num_warps, registers=255),
        )
    return h


def expand(
    p: Plan,
    h: Tensor,
    B: Tensor,
    stride_b: int,
    scaling: float,
    base: tuple[Tensor, int] | None,
    y: Tensor,
    *,
    transposed: bool,
) -> None:
    """y = base + scaling · h Bᵀ."""
    if not y.numel():
        return
    rows, rank, out = h.shape[2], B.shape[1 if transposed else 2], y.shape[2]
    start, stride_base = (y, 0) if base is None else base
    expand_kernel[triton.cdiv(out, p.tiles * p.b_columns), triton.cdiv(rows, p.b_rows), len(y)](
        h,
        B,
        start,
        y,
        rows,
        out,
        rank,
        stride_b,
        stride_base,
        scaling,
        RANK=0 if transposed else p.known_rank,
        ALIGNED=p.aligned,
        TRANSPOSED=transposed,
        PARTS=p.parts,
        WIDTH=h.shape[3],
        HAS_BASE=base is not None,
        TILES=p.tiles,
        B_M=p.b_rows,
        B_R=p.b_rank,
        B_N=p.b_columns,
        **options(p.num_warps, registers=255),
    )
