"""Samples of a SWAG posterior: the arguments of `SwagPosterior.draw` checked, its formula put into the op."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Literal, get_args

import torch

from swag_kernels import draw

from .layout import common_dtype
from .structured import draw_orthogonal
from .weights import SampledWeights

if TYPE_CHECKING:
    from .posterior import SwagPosterior

Method = Literal["iid", "antithetic", "antithetic+orthogonal"]


def draw_samples(
    posterior: SwagPosterior,
    num_samples: int,
    seed: int,
    first: int,
    scale: float,
    method: Method | str,
    dtype: torch.dtype | None,
    covariance: bool | None,
) -> SampledWeights:
    """See `SwagPosterior.draw`."""
    num_samples = integer("num_samples", num_samples, minimum=1)
    seed = integer("seed", seed)
    first = integer("first", first, minimum=0)
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    std = posterior.std()
    count = int(posterior.count)
    columns = min(count, posterior.rank)
    if covariance and columns < 2:
        way_out = (
            f"this posterior has rank={posterior.rank}: make it with rank=2 or more"
            if posterior.rank < 2
            else f"{count} collected so far: collect once more"
        )
        raise ValueError(f"a covariance needs at least two deviations; {way_out}, or draw with covariance=False")
    low_rank = columns >= 2 and covariance is not False
    kind = dtype or common_dtype(p.dtype for p in posterior.layout.parameters(posterior.model))
    diag_scale = math.sqrt(scale)
    low_rank_scale = math.sqrt(scale / (columns - 1)) if low_rank else 0.0
    if method == "antithetic+orthogonal":
        buffer = draw_orthogonal(
            posterior.mean,
            std,
            posterior.deviations[: columns if low_rank else 0],
            num_samples,
            seed=seed,
            first_sample=first,
            diag_scale=diag_scale,
            low_rank_scale=low_rank_scale,
            layout=posterior.layout.table,
            dtype=kind,
        )
    else:
        buffer = draw(
            posterior.mean,
            std,
            posterior.deviations[:columns] if low_rank else None,
            num_samples,
            seed=seed,
            first_sample=first,
            diag_scale=diag_scale,
            low_rank_scale=low_rank_scale,
            antithetic=method == "antithetic",
            layout=posterior.layout.table,
            dtype=kind,
        )
    return SampledWeights(posterior.layout, buffer, seed=seed, first=first, method=method)


def integer(name: str, value: int, minimum: int | None = None) -> int:
    """``value`` as an int; a TypeError or a ValueError that names it if it is none or below ``minimum``."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number
