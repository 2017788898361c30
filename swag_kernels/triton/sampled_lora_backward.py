"""Gradients of sampled_lora: two shrinks and an expand, and for those of A and B a third kernel.

outer   g = scaling h^T x         [M, r] x [M, in] -> [r, in]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels import reference
from swag_kernels.rows import rows_and_stride
from swag_kernels.triton.launch import kernel, on_device_of, options
from swag_kernels.triton.plan import Plan, plan
from swag_kernels.triton.sampled_lora import expand, in_eights, load_h, rank_of, shrink

OUTER_ROWS = 32  # at most, of a step of the sum over the rows


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
    r = rank_of(rank, RANK)
    features = in_eights(features, ALIGNED)
    o_n = i_n * B_N + tl.arange(0, B_N)
    o_r = tl.arange(0, B_R)
    m_n = o_n < features
    p_x = p_x + i_sample * stride_x
    if ALIGNED:
        p_x = tl.multiple_of(p_x, 16)
    total = tl.zeros([B_R, B_N], tl.float32)
    for m in tl.range(0, rows, B_M, num_stages=2):
        o_m = m + tl.arange(0, B_M)
        h = load_h(p_h, i_sample, o_m, rows, PARTS, WIDTH, B_R).to(p_x.dtype.element_ty)
        p_rows = p_x + o_m.to(tl.int64)[:, None] * features + o_n[None, :]
        x = tl.load(p_rows, mask=(o_m < rows)[:, None] & m_n[None, :], other=0.0)
        total = tl.dot(tl.trans(h), x, total, input_precision="ieee")
    o_g = o_n[None, :] * r + o_r[:, None] if TRANSPOSED else o_r[:, None] * features + o_n[None, :]
    p_out = p_g + i_sample * r * features
    if ALIGNED:
        p_out = tl.multiple_of(p_out, 16)
    tl.store(p_out + o_g, (total * scaling).to(p_g.dtype.element_ty), mask=(o_r < r)[:, None] & m_n[None, :])


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
        hidden = shrink(chosen, x, stride_x, A, stride_a, transposed=False)
        d_hidden = shrink(chosen, grad, stride_grad, B, stride_b, transposed=True)
        every = dx if len(x) == samples else x.new_empty(samples, *x.shape[1:])
        expand(chosen, d_hidden, A, stride_a, scaling, None, every, transposed=True)
        if every is not dx:
            torch.sum(every, dim=0, keepdim=True, out=dx)
        _outer(chosen, d_hidden, x, stride_x, scaling, dA, transposed=False)
        _outer(chosen, hidden, grad, stride_grad, scaling, dB, transposed=True)
    return dx, dA, dB


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
