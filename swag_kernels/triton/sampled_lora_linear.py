"""y_s = x_s W^T + bias + scaling (x_s A_s^T) B_s^T in one kernel: x is read once for W and A, and y is written once.

It gives up the vendor's matrix product for that, so it serves where it was timed to be faster, see `fastest`.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from swag_kernels.backend import select
from swag_kernels.rows import rows_and_stride
from swag_kernels.triton.launch import ON_AMD, kernel, on_device_of, options
from swag_kernels.triton.plan import is_aligned

MAX_RANK = 32  # beyond, the product with A takes too much of each tile
LEAST_ROWS = 32  # of a sample: rows of a tile have one A
TILES = ((64, 128), (128, 128))  # rows and columns of y
WIDE_TILES = ((64, 128), (128, 256))  # where accumulators are not held by the threads that load
STEP = 64  # of the long axis
BAND = 8  # tiles of rows, of whatever samples, that run together and share what they read of W
MOST_TIMED = 16384  # rows of all samples
MARGIN = 0.97  # of the time of the two steps that the fused kernel may take at most


@kernel
def sampled_lora_linear_kernel(
    p_x,
    p_w,
    p_bias,
    p_a,
    p_b,
    p_y,
    samples: tl.int32,
    rows: tl.int32,
    features: tl.int32,
    out: tl.int32,
    rank: tl.int32,
    stride_x: tl.int64,
    stride_a: tl.int64,
    stride_b: tl.int64,
    scaling: tl.float32,
    HAS_BIAS: tl.constexpr,
    BAND: tl.constexpr,
    B_M: tl.constexpr,
    B_N: tl.constexpr,
    B_K: tl.constexpr,
    B_R: tl.constexpr,
):
    """One tile of one sample's y. The long axis has a multiple of B_K elements, and y a multiple of 8 columns."""
    # The same numbers, of which the compiler then knows that they are multiples.
    features, out = features // B_K * B_K, out // 8 * 8
    each = tl.cdiv(rows, B_M)
    width = BAND * tl.cdiv(out, B_N)
    i_band, within = tl.program_id(0) // width, tl.program_id(0) % width
    height = tl.minimum(samples * each - i_band * BAND, BAND)
    i_tile = i_band * BAND + within % height
    i_sample = (i_tile // each).to(tl.int64)
    o_m = (i_tile % each) * B_M + tl.arange(0, B_M)
    o_n = (within // height) * B_N + tl.arange(0, B_N)
    o_r, o_k = tl.arange(0, B_R), tl.arange(0, B_K)

    # What lies beyond the tensors is read from their last row, and not stored.
    p_x = tl.multiple_of(p_x + i_sample * stride_x, 16)
    p_x += tl.minimum(o_m, rows - 1).to(tl.int64)[:, None] * features + o_k[None, :]
    p_w = tl.multiple_of(p_w + tl.minimum(o_n, out - 1).to(tl.int64)[None, :] * features + o_k[:, None], (16, 16))
    p_a = tl.multiple_of(p_a + i_sample * stride_a, 16)
    p_a += tl.minimum(o_r, rank - 1)[None, :] * features + o_k[:, None]
    y = tl.zeros([B_M, B_N], tl.float32)
    h = tl.zeros([B_M, B_R], tl.float32)
    for _ in tl.range(0, features, B_K):
        x = tl.load(p_x)  # [B_M, B_K]
        y = tl.dot(x, tl.load(p_w), y)
        h = tl.dot(x, tl.load(p_a), h)
        p_x += B_K
        p_w += B_K
        p_a += B_K

    m_n = o_n < out
    p_b += i_sample * stride_b + o_n[None, :] * rank + o_r[:, None]
    b = tl.load(p_b, mask=(o_r < rank)[:, None] & m_n[None, :], other=0.0)  # [B_R, B_N]
    b = (b.to(tl.float32) * scaling).to(b.dtype)  # not h, which float16 may be only just wide enough for
    h = tl.where((o_r < rank)[None, :], h, 0.0)
    y = tl.dot(h.to(b.dtype), b, y)
    if HAS_BIAS:
        y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = tl.multiple_of(p_y + i_sample * rows * out, 16)
    p_y += o_m.to(tl.int64)[:, None] * out + o_n[None, :]
    tl.store(p_y, y.to(p_y.dtype.element_ty), mask=(o_m < rows)[:, None] & m_n[None, :])


def sampled_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor | None:
    """None where the layer and then `sampled_lora` are the way."""
    if not _fits(x, weight, bias, A, B):
        return None
    out, features = weight.shape
    rows = min(1 << (x.shape[1] - 1).bit_length(), 1024)  # of the class
    tile = fastest(x.device, x.dtype, len(A), rows, out, features, A.shape[1], bias is not None)
    return None if tile is None else fused(x, weight, bias, A, B, scaling, tile)


def fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, tile: tuple[int, int]
) -> Tensor:
    (x, stride_x), (A, stride_a), (B, stride_b) = map(rows_and_stride, (x, A, B))
    (samples, rank, features), rows, out = A.shape, x.shape[1], len(weight)
    y = torch.empty(samples, rows, out, dtype=x.dtype, device=x.device)
    b_rows, b_columns = tile
    with on_device_of(x):
        sampled_lora_linear_kernel[samples * triton.cdiv(rows, b_rows) * triton.cdiv(out, b_columns),](
            x,
            weight,
            weight if bias is None else bias,
            A,
            B,
            y,
            samples,
            rows,
            features,
            out,
            rank,
            stride_x,
            stride_a,
            stride_b,
            scaling,
            HAS_BIAS=bias is not None,
            BAND=BAND,
            B_M=b_rows,
            B_N=b_columns,
            B_K=STEP,
            B_R=max(16, triton.next_power_of_2(rank)),
            **options(8 if b_rows == 128 else 4, registers=255, stages=3),
        )
    return y


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> bool:
    """Whether the kernel can serve a call at all."""
    samples, rank, features = A.shape
    tensors = (x, weight, A, B.flatten(1)) if bias is None else (x, weight, bias, A, B.flatten(1))
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and all(t.dtype == x.dtype for t in tensors)
        and len(x) == samples
        and x.shape[1] >= LEAST_ROWS
        and rank <= MAX_RANK
        and features % STEP == 0
        and len(weight) % 8 == 0
        and weight.is_contiguous()
        and (bias is None or bias.is_contiguous())
        and all(map(is_aligned, tensors))
    )


def fastest(
    device: torch.device, dtype: torch.dtype, samples: int, rows: int, out: int, features: int, rank: int, bias: bool
) -> tuple[int, int] | None:
    """The tile for a class of calls, or None for the two steps: those too while a graph is captured, in which nothing can
    be timed, and where torch.use_deterministic_algorithms asks that bits depend on no timing."""
    if device.type != "cuda":  # the interpreter
        return tiles(device)[0]
    if torch.cuda.is_current_stream_capturing() or torch.are_deterministic_algorithms_enabled():
        return None
    try:
        return _timed(select(device), device, dtype, samples, rows, out, features, rank, bias)
    except torch.OutOfMemoryError:  # of the tensors that are timed, which the two steps do not need
        return None


def tiles(device: torch.device) -> tuple[tuple[int, int], ...]:
    wide = device.type == "cuda" and not ON_AMD and torch.cuda.get_device_capability(device) >= (9, 0)
    return WIDE_TILES if wide else TILES


@cache
def _timed(
    kernels: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    samples: int,
    rows: int,
    out: int,
    features: int,
    rank: int,
    bias: bool,
) -> tuple[int, int] | None:
    """By the medians of some alternating rounds, in which the fused kernel has to win by a margin over the layer and then
    the update by the kernels of a back end."""
    rows = min(rows, max(LEAST_ROWS, MOST_TIMED // samples))
    shapes = (samples, rows, features), (out, features), (samples, rank, features), (samples, out, rank), (out,)
    own = torch.Generator(device)  # timing must not move anybody's random numbers
    x, weight, A, B, b = (torch.randn(shape, generator=own, device=device, dtype=dtype) for shape in shapes)
    b = b if bias else None
    events: dict[Any, list[Any]] = {tile: [] for tile in (None, *tiles(device))}
    for turn, tile in product(range(8), events):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if tile is None:
            kernels.sampled_lora_(x, A, B, 1.0, linear(x, weight, b))
        else:
            fused(x, weight, b, A, B, 1.0, tile)
        end.record()
        if turn > 2:
            events[tile].append((start, end))
    torch.cuda.synchronize(device)
    medians = {tile: sorted(a.elapsed_time(z) for a, z in pairs)[2] for tile, pairs in events.items()}
    best = min(tiles(device), key=medians.__getitem__)
    return best if medians[best] < MARGIN * medians[None] else None
