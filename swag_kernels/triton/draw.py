"""w_s = mean + diag_scale std eps_s + low_rank_scale deviations^T z_s for all samples s, reading the state once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swag_kernels.layout import BLOCK
from swag_kernels.triton.launch import kernel, on_device_of, options
from swag_kernels.triton.normal import normals
from swag_kernels.triton.tables import block_table, keep_for_graph

_EPS, _Z = tl.constexpr(0), tl.constexpr(1)
Z_DRAWS = 32  # of one program of z
HELD_RANKS = (0, 8, 16, 20, 24, 32)


@kernel
def z_kernel(
    p_z,
    seed_low: tl.int32,
    seed_high: tl.int32,
    first: tl.int32,
    draws: tl.int32,
    rank: tl.int32,
    stride: tl.int32,
    scale: tl.float32,
    B_D: tl.constexpr,
):
    """z [draws, stride]: row k holds low_rank_scale times the z of draw first + k, then zeros; a program for each quad."""
    i_quad = tl.program_id(0)
    o_draw = tl.program_id(1) * B_D + tl.arange(0, B_D)
    word = (first + o_draw).to(tl.uint32)
    zero = tl.zeros_like(word)
    n0, n1, n2, n3 = normals(zero + i_quad.to(tl.uint32), word, zero, zero + _Z, seed_low, seed_high)
    z = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3)) * scale
    o_z = tl.arange(0, 4 * B_D)
    i_draw, o_r = tl.program_id(1) * B_D + o_z // 4, i_quad * 4 + o_z % 4
    tl.store(p_z + i_draw * stride + o_r, tl.where(o_r < rank, z, 0.0), mask=i_draw < draws)


@kernel
def draw_kernel(
    p_mean,
    p_std,
    p_deviations,
    p_z,
    p_blocks,
    p_out,
    size: tl.int64,
    seed_low: tl.int32,
    seed_high: tl.int32,
    first: tl.int32,
    draws: tl.int32,
    num_samples: tl.int32,
    odd: tl.int32,
    signs: tl.int32,
    rank: tl.int32,
    stride: tl.int32,
    diag_scale: tl.float32,
    HELD: tl.constexpr,
    GROUP: tl.constexpr,
    B_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All samples of B_N elements of one tensor, GROUP quads of which a thread makes next to each other; HELD of its
    deviations stay in registers, later ones are read for every draw. A draw is a sample, or with two signs a pair."""
    size = size // BLOCK * BLOCK
    o_begin = tl.program_id(0).to(tl.int64) * B_N
    p_block = p_blocks + (o_begin // BLOCK) * 4
    tensor = tl.load(p_block).to(tl.uint32)
    within = (o_begin % BLOCK).to(tl.int32)
    held = tl.load(p_block + 1) - within
    quad = tl.load(p_block + 2).to(tl.uint32) + (within // 4).to(tl.uint32)

    o_n = tl.arange(0, B_N)
    m_n = o_n < held
    mean = tl.load(tl.multiple_of(p_mean + o_begin, 16) + o_n)  # [B_N]
    std = tl.load(tl.multiple_of(p_std + o_begin, 16) + o_n) * diag_scale
    columns = ()
    for r in tl.static_range(HELD):
        p_column = tl.multiple_of(p_deviations + tl.cast(r, tl.int64) * size + o_begin, 16)
        columns = columns + (tl.load(p_column + o_n, mask=tl.zeros_like(o_n) + r < rank, other=0.0),)
    quads = quad + GROUP * tl.arange(0, B_N // 4 // GROUP).to(tl.uint32)
    zero = tl.zeros_like(quads)

    for i_draw in tl.range(0, draws):
        word = zero + (first + i_draw).to(tl.uint32)
        n0, n1, n2, n3 = normals(quads, word, zero + tensor, zero + _EPS, seed_low, seed_high)
        if GROUP == 2:  # in the thread that stores them at once, so that none waits for another
            n4, n5, n6, n7 = normals(quads + 1, word, zero + tensor, zero + _EPS, seed_low, seed_high)
            n0, n1 = tl.interleave(n0, n4), tl.interleave(n1, n5)
            n2, n3 = tl.interleave(n2, n6), tl.interleave(n3, n7)
        eps = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))  # [B_N]
        delta = eps * std
        p_row = p_z + i_draw * stride
        for r in tl.static_range(HELD):
            delta = tl.fma(tl.zeros_like(delta) + tl.load(p_row + r), columns[r], delta)
        for more in tl.range(HELD, rank):
            p_again = tl.multiple_of(p_deviations + tl.cast(more, tl.int64) * size + o_begin, 16)
            delta = tl.fma(tl.zeros_like(delta) + tl.load(p_row + more), tl.load(p_again + o_n), delta)
        row = i_draw * signs - odd
        _put(p_out, mean + delta, row, num_samples, size, o_begin, m_n)
        if signs == 2:
            _put(p_out, mean - delta, row + 1, num_samples, size, o_begin, m_n)


@triton.jit
def _put(p_out, w, row, num_samples, size, o_begin, m_n):
    if (row >= 0) & (row < num_samples):
        p_row = tl.multiple_of(p_out + tl.cast(row, tl.int64) * size + o_begin, 16) + tl.arange(0, w.shape[0])
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
    stride = triton.cdiv(max(rank, tile["HELD"]), 4) * 4
    z = torch.empty(draws, stride, device=mean.device)
    key = _signed(seed), _signed(seed >> 32)
    compiled = options(4, exact=True, registers=255)
    blocks = block_table(layout, size, mean.device)
    with on_device_of(mean):
        keep_for_graph(blocks)
        if rank:
            z_kernel[stride // 4, triton.cdiv(draws, Z_DRAWS)](
                z, *key, _signed(first), draws, rank, stride, low_rank_scale, B_D=Z_DRAWS, **compiled
            )
        draw_kernel[size // tile["B_N"],](
            _aligned(mean),
            _aligned(std),
            _aligned(mean if deviations is None else deviations),
            z,
            blocks,
            out,
            size,
            *key,
            _signed(first),
            draws,
            num_samples,
            first_sample % 2 if antithetic else 0,
            2 if antithetic else 1,
            rank,
            stride,
            diag_scale,
            **tile,
            BLOCK=BLOCK,
            **compiled,
        )
    return out


def tile_of(rank: int, itemsize: int) -> dict[str, int]:
    """Deviations that a program holds in registers, quads of a thread, and elements: such that a thread stores 16 bytes at
    once, but for narrow types with more deviations than a thread can hold for so many elements."""
    held = next((held for held in HELD_RANKS if held >= rank), HELD_RANKS[-1])
    each = 16 // itemsize if held <= 20 else 4
    return {"HELD": held, "GROUP": each // 4, "B_N": 128 * each}


def _aligned(arena: Tensor) -> Tensor:
    return arena if arena.data_ptr() % 16 == 0 else arena.clone()


def _signed(word: int) -> int:
    """The low 32 bits as an int32, so that Triton takes every value as the same type."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word
