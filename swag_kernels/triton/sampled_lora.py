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
from swag_kernels.triton.launch import kernel, on_device_of, options
from swag_kernels.triton.plan import CHUNK_STEP, CHUNKS, Plan, plan

OUTER_ROWS = 32  # at most, of a step of the sum over the rows
_STEP = tl.constexpr(CHUNK_STEP)
_CHUNKS = tl.constexpr(CHUNKS)


@triton.jit
def _width(n, ALIGNED: tl.constexpr):
    return n // 8 * 8 if ALIGNED else n  # the same number, which the compiler then knows to be a multiple of 8


@triton.jit
def _rank(rank, RANK: tl.constexpr):
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
    r = _rank(rank, RANK)
    features = _width(features, ALIGNED)
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
def _load_h(p_h, i_sample, o_m, rows, PARTS: tl.constexpr, WIDTH: tl.constexpr, B_R: tl.constexpr):
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
    r = _rank(rank, RANK)
    out = _width(out, ALIGNED)
    o_m = i_m * B_M + tl.arange(0, B_M)
    o_r = tl.arange(0, B_R)
    o_row = o_m.to(tl.int64)[:, None] * out
    p_b += i_sample * stride_b
    p_base += i_sample * stride_base
    p_y += i_sample * rows * out
    if ALIGNED:
        p_b, p_base, p_y = tl.multiple_of(p_b, 16), tl.multiple_of(p_base, 16), tl.multiple_of(p_y, 16)
    h = _load_h(p_h, i_sample, o_m, rows, PARTS, WIDTH, B_R).to(p_b.dtype.element_ty)
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


@kernel
def outer_kernel(
    p_h,
    p_x,
    p_g,
    rows: tl.int32,
    features: tl.int32,
    rank: tl.int32,
    stride_x: tl.int64,
    scaling: tl.float32,
    RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    B_M: tl.constexpr,
    B_R: tl.constexpr,
    B_N: tl.constexpr,
):
    """g [S, r, in], or [S, in, r] if TRANSPOSED."""
    i_n, i_sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r = _rank(rank, RANK)
    features = _width(features, ALIGNED)
    o_n = i_n * B_N + tl.arange(0, B_N)
    o_r = tl.arange(0, B_R)
    m_n = o_n < features
    p_x = p_x + i_sample * stride_x
    if ALIGNED:
        p_x = tl.multiple_of(p_x, 16)
    total = tl.zeros([B_R, B_N], tl.float32)
    for m in tl.range(0, rows, B_M, num_stages=2):
        o_m = m + tl.arange(0, B_M)
        h = _load_h(p_h, i_sample, o_m, rows, PARTS, WIDTH, B_R).to(p_x.dtype.element_ty)
        p_rows = p_x + o_m.to(tl.int64)[:, None] * features + o_n[None, :]
        x = tl.load(p_rows, mask=(o_m < rows)[:, None] & m_n[None, :], other=0.0)
        total = tl.dot(tl.trans(h), x, total, input_precision="ieee")
    o_g = o_n[None, :] * r + o_r[:, None] if TRANSPOSED else o_r[:, None] * features + o_n[None, :]
    p_out = p_g + i_sample * r * features
    if ALIGNED:
        p_out = tl.multiple_of(p_out, 16)
    tl.store(p_out + o_g, (total * scaling).to(p_g.dtype.element_ty), mask=(o_r < r)[:, None] & m_n[None, :])


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
            h = _shrink(chosen, x, stride_x, A, stride_a, transposed=False)
            _expand(chosen, h, B, stride_b, scaling, (start, stride_base), y, transposed=False)
            return
        hidden = torch.bmm(x.expand(samples, *x.shape[1:]), A.mT)
        if base.dtype == x.dtype:
            torch.baddbmm(base.expand_as(y), hidden, B.mT, alpha=scaling, out=y)
        else:
            y.copy_(torch.add(base, torch.bmm(hidden, B.mT), alpha=scaling))


def sampled_lora_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.to(x.dtype)
    (grad, stride_grad), (x, stride_x), (A, stride_a), (B, stride_b) = map(rows_and_stride, (grad, x, A, B))
    (samples, rank, _), rows = A.shape, x.shape[1]
    chosen = plan(samples, rows, rank, x.dtype, grad, x, A, B.flatten(1))
    if chosen is None:
        return reference.sampled_lora_backward(grad, x, A, B, scaling)
    dx, dA, dB = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, A, B))
    with on_device_of(x):
        hidden = _shrink(chosen, x, stride_x, A, stride_a, transposed=False)
        d_hidden = _shrink(chosen, grad, stride_grad, B, stride_b, transposed=True)
        every = dx if len(x) == samples else x.new_empty(samples, *x.shape[1:])
        _expand(chosen, d_hidden, A, stride_a, scaling, None, every, transposed=True)
        if every is not dx:
            torch.sum(every, dim=0, keepdim=True, out=dx)
        _outer(chosen, d_hidden, x, stride_x, scaling, dA, transposed=False)
        _outer(chosen, hidden, grad, stride_grad, scaling, dB, transposed=True)
    return dx, dA, dB


def _shrink(p: Plan, x: Tensor, stride_x: int, A: Tensor, stride_a: int, *, transposed: bool) -> Tensor:
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


def _expand(
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


def _outer(p: Plan, h: Tensor, x: Tensor, stride_x: int, scaling: float, g: Tensor, *, transposed: bool) -> None:
    """g = scaling · hᵀ x, [S, r, in], or [S, in, r] if transposed."""
    if not g.numel():
        return
    (samples, _, rows, _), rank, features = h.shape, g.shape[2 if transposed else 1], x.shape[2]
    outer_kernel[triton.cdiv(features, p.b_columns), samples](
        h,
        x,
        g,
        rows,
        features,
        rank,
        stride_x,
        scaling,
        RANK=p.known_rank if transposed else 0,
        ALIGNED=p.aligned,
        TRANSPOSED=transposed,
        PARTS=p.parts,
        WIDTH=h.shape[3],
        B_M=min(p.b_rows, OUTER_ROWS),
        B_R=p.b_rank,
        B_N=p.b_columns,
        **options(8 if g.dtype == torch.float32 and p.b_rank > 32 else p.num_warps, registers=255),
    )
