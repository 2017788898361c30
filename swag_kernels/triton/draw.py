"""w_s = mean + diag_scale std eps_s + low_rank_scale deviations^T z_s for all samples s, reading the state once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels.layout import BLOCK
from swag_kernels.triton.launch import on_device_of, options
from swag_kernels.triton.normal import normals
from swag_kernels.triton.tables import block_table, keep_for_graph

_EPS, _Z = tl.constexpr(0), tl.constexpr(1)
Z_DRAWS = 32  # of one program of z


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first", "draws"])
def z_kernel(p_z, seed_low, seed_high, first, draws, scale, STRIDE: tl.constexpr, B_D: tl.constexpr):
    """z [draws, STRIDE]: row k holds low_rank_scale times the z of draw first + k; one program for each quad of ranks."""
    i_quad = tl.program_id(0)
    o_draw = tl.program_id(1) * B_D + tl.arange(0, B_D)
    word = (first + o_draw).to(tl.uint32)
    zero = tl.zeros_like(word)
    n0, n1, n2, n3 = normals(zero + i_quad.to(tl.uint32), word, zero, zero + _Z, seed_low, seed_high)
    z = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3)) * scale
    o_z = tl.arange(0, 4 * B_D)
    i_draw = tl.program_id(1) * B_D + o_z // 4
    tl.store(p_z + i_draw * STRIDE + i_quad * 4 + o_z % 4, z, mask=i_draw < draws)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first", "draws", "num_samples", "odd"])
def draw_kernel(
    p_mean,
    p_std,
    p_deviations,
    p_z,
    p_blocks,
    p_out,
    size,
    seed_low,
    seed_high,
    first,
    draws,
    num_samples,
    odd,
    diag_scale,
    RANK: tl.constexpr,
    HELD: tl.constexpr,
    STRIDE: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    B_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All samples of B_N elements of one tensor; where HELD, with their deviations in registers."""
    o_begin = tl.program_id(0).to(tl.int64) * B_N
    p_block = p_blocks + (o_begin // BLOCK) * 4
    tensor = tl.load(p_block).to(tl.uint32)
    within = (o_begin % BLOCK).to(tl.int32)
    held = tl.load(p_block + 1) - within
    quad = tl.load(p_block + 2).to(tl.uint32) + (within // 4).to(tl.uint32)

    o_n = tl.arange(0, B_N)
    m_n = o_n < held
    o_arena = o_begin + o_n
    mean = tl.load(p_mean + o_arena)  # [B_N]
    std = tl.load(p_std + o_arena) * diag_scale
    columns = ()
    if HELD:
        for r in tl.static_range(RANK):
            columns = columns + (tl.load(p_deviations + tl.cast(r, tl.int64) * size + o_arena),)
    quads = quad + tl.arange(0, B_N // 4).to(tl.uint32)
    zero = tl.zeros_like(quads)

    for i_draw in tl.range(0, draws):
        word = zero + (first + i_draw).to(tl.uint32)
        n0, n1, n2, n3 = normals(quads, word, zero + tensor, zero + _EPS, seed_low, seed_high)
        eps = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))  # [B_N]
        delta = eps * std
        p_row = p_z + i_draw * STRIDE
        if HELD:
            for r in tl.static_range(RANK):
                delta = tl.fma(tl.zeros_like(delta) + tl.load(p_row + r), columns[r], delta)
        else:
            for r in tl.range(0, RANK):
                column = tl.load(p_deviations + tl.cast(r, tl.int64) * size + o_arena)
                delta = tl.fma(tl.zeros_like(delta) + tl.load(p_row + r), column, delta)
        if ANTITHETIC:
            row = 2 * i_draw - odd
            _put(p_out, mean + delta, row, num_samples, size, o_arena, m_n)
            _put(p_out, mean - delta, row + 1, num_samples, size, o_arena, m_n)
        else:
            _put(p_out, mean + delta, i_draw, num_samples, size, o_arena, m_n)


@triton.jit
def _put(p_out, w, row, num_samples, size, o_arena, m_n):
    if (row >= 0) & (row < num_samples):
        p_row = p_out + tl.cast(row, tl.int64) * size + o_arena
        tl.store(p_row, tl.where(m_n, w, 0.0).to(p_out.dtype.element_ty))


def draw(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    antithetic: bool,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    size = mean.numel()
    out = torch.empty(num_samples, size, dtype=dtype, device=mean.device)
    if not size:
        return out
    first = first_sample // 2 if antithetic else first_sample
    draws = (first_sample + num_samples + 1) // 2 - first if antithetic else num_samples
    rank = 0 if deviations is None else len(deviations)
    tile = tile_of(rank, dtype.itemsize)
    stride = triton.cdiv(rank, 4) * 4
    z = torch.empty(draws, stride, device=mean.device)
    key = _signed(seed), _signed(seed >> 32)
    compiled = options(tile["num_warps"], exact=True, registers=255)
    blocks = block_table(layout, size, mean.device)
    with on_device_of(mean):
        keep_for_graph(blocks)
        if rank:
            z_kernel[stride // 4, triton.cdiv(draws, Z_DRAWS)](
                z, *key, _signed(first), draws, low_rank_scale, STRIDE=stride, B_D=Z_DRAWS, **compiled
            )
        draw_kernel[size // tile["B_N"],](
            mean,
            std,
            mean if deviations is None else deviations,
            z,
            blocks,
            out,
            size,
            *key,
            _signed(first),
            draws,
            num_samples,
            first_sample % 2,
            diag_scale,
            RANK=rank,
            HELD=tile["HELD"],
            STRIDE=stride,
            ANTITHETIC=antithetic,
            B_N=tile["B_N"],
            BLOCK=BLOCK,
            **compiled,
        )
    return out


def tile_of(rank: int, itemsize: int) -> dict[str, int]:
    """Elements of a program, for stores of 16 bytes; where a thread's registers cannot hold all its deviations, fewer, and
    beyond 32 ranks they are read again for every draw."""
    each = 16 // itemsize if rank <= 20 else 4
    return {"B_N": 128 * each, "HELD": rank <= 32, "num_warps": 4}


def _signed(word: int) -> int:
    """The low 32 bits as an int32, so that Triton takes every value as the same type."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word
