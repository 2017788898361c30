"""Which kernels a low-rank update takes, and in what tiles: by shape, dtype and alignment alone, so that the same call takes
the same ones in every process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RANK = 64  # beyond, a low-rank product is a matrix product like any other
KNOWN_RANKS = (8, 16, 32, 64)
CHUNKS = 4  # of the long axis, each summed on its own
CHUNK_STEP = 256  # of which a chunk is a multiple
SPREAD = 256  # programs below which every chunk gets one of its own

RULE = (
    f"kernels up to rank {MAX_RANK}, matrix products beyond and for more than 16 rows of float32; after a linear layer, one "
    "kernel for both where the first call of its size times that as faster"
)


@dataclass(frozen=True)
class Plan:
    """Tile of rows, ranks, long-axis elements and columns of the result, of which a program of expand makes ``tiles``;
    ``parts`` programs of shrink share the long axis. ``aligned``: 16 bytes can be loaded at once; ``known_rank``: the rank
    where it is a constant of the kernels, else 0."""

    b_rows: int
    b_rank: int
    b_features: int
    b_columns: int
    tiles: int
    parts: int
    num_warps: int
    aligned: bool
    known_rank: int


def plan(samples: int, rows: int, rank: int, dtype: torch.dtype, *tensors: Tensor) -> Plan | None:
    """None where matrix products win: at high ranks, and for many rows of float32, which has no tensor cores to feed.

    Few rows are bound by the reading of A and B: small tiles, and every chunk of the long axis in a program of its own.
    Many rows are bound by the reading of x and the base: A is read again for every tile of rows, so those are larger.
    """
    few = rows <= 16
    if rank > MAX_RANK or (dtype == torch.float32 and not few):
        return None
    aligned = all(map(is_aligned, tensors))
    known_rank = rank if aligned and rank in KNOWN_RANKS else 0
    b_rank = max(16, 1 << (rank - 1).bit_length()) if aligned else MAX_RANK
    narrow = dtype == torch.float32 or b_rank > max(16, known_rank)
    b_columns = 64 if narrow else 128
    if few:
        b_features = 32 if dtype == torch.float32 else 64 if narrow else 4096 // b_rank
        return Plan(16, b_rank, b_features, b_columns, 1, CHUNKS, 4, aligned, known_rank)
    parts = CHUNKS if samples * -(-rows // 64) < SPREAD else 1
    return Plan(64, b_rank, 64, b_columns, 4, parts, 8 if b_rank > 16 else 4, aligned, known_rank)


def is_aligned(t: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes and have whole multiples of them."""
    return t.data_ptr() % 16 == 0 and t.shape[-1] % 8 == 0 and (t.dim() == 1 or t.stride(0) % 8 == 0)
