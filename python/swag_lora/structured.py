"""Antithetic samples whose low-rank parts cover their space more evenly than independent ones do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swag_kernels import draw
from swag_kernels.reference import normal, philox

PAIRS = 4
"""Antithetic pairs whose low-rank parts are one matrix product: always as many, so that no bit depends on what is drawn."""

_STREAM = 2  # of the random counter; 0 and 1 are those of `draw`
_BISECTIONS = 48


def draw_orthogonal(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`swag_kernels.draw` with ``antithetic=True``, but with the z of `orthogonal_normals`: ``[S, N]``.

    Samples 2j and 2j + 1 are ``mean ± (diag_scale · std ⊙ ε_j + low_rank_scale · deviationsᵀ z_j)`` with the ε_j of `draw`.
    Each sample alone has the distribution it has there. A sample has the same bits whatever else is drawn. Beside the
    result, `PAIRS` + 1 rows of N float32 are held.

    Args:
        deviations: float32 ``[R, N]``, R at least 2; the other arguments are those of `draw`.

    Raises:
        ValueError: fewer than two deviations, or an argument that `draw` refuses.
    """
    rank = len(deviations)
    if rank < 2:
        raise ValueError(f'orthogonal samples need at least two deviations, got {rank}: use method="antithetic"')
    groups = range(first_sample // (2 * PAIRS), -(-(first_sample + num_samples) // (2 * PAIRS)))
    z = orthogonal_normals(len(groups) * PAIRS, rank, seed, groups.start * PAIRS)
    z = (low_rank_scale * z).to(deviations)
    zero = torch.zeros_like(mean)
    out = torch.empty(num_samples, len(mean), dtype=dtype, device=mean.device)
    for group, rows in zip(groups, z.split(PAIRS), strict=True):
        noise = draw(
            zero,
            std,
            None,
            PAIRS,
            seed=seed,
            first_sample=group * PAIRS,
            diag_scale=diag_scale,
            low_rank_scale=0.0,
            antithetic=False,
            layout=layout,
            dtype=mean.dtype,
        ).addmm_(rows, deviations)
        first = 2 * PAIRS * group
        for sample in range(max(first, first_sample), min(first + 2 * PAIRS, first_sample + num_samples)):
            sign = -1 if sample % 2 else 1
            torch.add(mean, noise[(sample - first) // 2], alpha=sign, out=out[sample - first_sample])
        del noise  # before the next group's is made
    return out


def orthogonal_normals(num_pairs: int, rank: int, seed: int, first_pair: int = 0) -> Tensor:
    """z ``[num_pairs, R]`` of the pairs from ``first_pair`` on: each alone N(0, I_R), together evenly spread.

    Pairs ``b·R … b·R + R − 1`` are block b, whose directions are orthogonal to each other: the Q of the QR decomposition
    of a normal matrix, its signs such that the diagonal of R is positive, is uniformly distributed (Stewart 1980; for
    averages: Yu et al. 2016, arXiv 1610.09072). The length of z has the chi distribution with R degrees of freedom, at
    a quantile u_j that is uniform and independent of the directions: u_2i = v_i/2 and u_2i+1 = 1 − v_i/2, or the other
    way round, where v_i is the van der Corput sequence in base 2 with a random digital shift (Owen 1995). Of any 2ᵐ
    pairs from a multiple of 2ᵐ on there is then one in each of 2ᵐ equally probable intervals, and long and short
    alternate.

    The z of pair j depends on (seed, j, R) alone. Counter words are ``(quad, pair, 0, 2)`` for the normal matrix, a pair to a
    column, and ``(0, 0, 1, 2)`` for the shift and, in its second word's last bit, the order. Computed on the CPU in
    float64.
    """
    blocks = range(first_pair // rank, -(-(first_pair + num_pairs) // rank))
    shift, flip, *_ = philox(torch.tensor([[0], [0], [1], [_STREAM]]), seed).flatten().tolist()
    z = [_directions(block, rank, seed) * _lengths(block, rank, shift, flip) for block in blocks]
    start = first_pair - blocks.start * rank
    return torch.cat(z)[start : start + num_pairs]


def _directions(block: int, rank: int, seed: int) -> Tensor:
    """Orthogonal rows ``[R, R]``."""
    quads = -(-rank // 4)
    pair, quad = torch.meshgrid(torch.arange(block * rank, (block + 1) * rank), torch.arange(quads), indexing="ij")
    counter = torch.stack((quad, pair, torch.zeros_like(quad), torch.full_like(quad, _STREAM))).flatten(1)
    gaussian = normal(philox(counter, seed)).reshape(rank, 4 * quads)[:, :rank]
    q, r = torch.linalg.qr(gaussian.T)
    return (q * r.diagonal().sign()).T


def _lengths(block: int, rank: int, shift: int, flip: int) -> Tensor:
    """Lengths of the block's z ``[R, 1]``."""
    pairs = range(block * rank, (block + 1) * rank)
    points = [((_reversed(pair // 2) ^ shift) + 0.5) * 2.0**-33 for pair in pairs]
    quantiles = [1 - u if (pair ^ flip) % 2 else u for pair, u in zip(pairs, points, strict=True)]
    return _chi_quantile(torch.tensor(quantiles, dtype=torch.float64), rank)[:, None]


def _reversed(number: int) -> int:
    """The 32 bits in reverse order."""
    return int(f"{number:032b}"[::-1], 2)


def _chi_quantile(u: Tensor, degrees: int) -> Tensor:
    """x with P(χ ≤ x) = u, by bisection: P is the regularised incomplete gamma function of degrees/2 at x²/2."""
    shape = torch.full_like(u, degrees / 2)
    low, high = torch.zeros_like(u), torch.full_like(u, degrees / 2 + 8 * math.sqrt(degrees) + 40)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = torch.special.gammainc(shape, middle) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high).sqrt()
