"""Samples of a SWAG posterior: the arguments of `SwagPosterior.draw` checked, its formula put into the op."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import partial
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
    num_samples, seed, first = named_samples(num_samples, seed, first)
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
    op = draw_orthogonal if method == "antithetic+orthogonal" else partial(draw, antithetic=method == "antithetic")
    buffer = op(
        posterior.mean,
        std,
        posterior.deviations[: columns if low_rank else 0],
        num_samples,
        seed=seed,
        first_sample=first,
        diag_scale=math.sqrt(scale),
        low_rank_scale=math.sqrt(scale / (columns - 1)) if low_rank else 0.0,
        layout=posterior.layout.table,
        dtype=kind,
    )
    return SampledWeights(posterior.layout, buffer, seed=seed, first=first, method=method)


def named_samples(num_samples: int, seed: int, first: int) -> tuple[int, int, int]:
    """The three as ints.

    Raises:
        TypeError: one that is not an integer.
        ValueError: S below 1, a negative first, a seed outside [0, 2**64) or samples beyond 2**32.
    """
    num_samples = integer("num_samples", num_samples, minimum=1)
    seed = integer("seed", seed, minimum=0)
    first = integer("first", first, minimum=0)
    if seed >= 1 << 64:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    if first + num_samples > 1 << 32:
        raise ValueError(f"samples {first} to {first + num_samples} lie outside [0, 2**32]")
    return num_samples, seed, first


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


def resolve_method(num_samples: int, first: int, scale: float, method: str | None) -> str:
    """The method that samples `first` and following are drawn with; None takes pairs where both numbers are even.

    Raises:
        ValueError: a number out of range, an unknown method, or pairs of odd numbers.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got {scale}")
    paired = num_samples % 2 == 0 and first % 2 == 0
    if method is None:
        return "antithetic" if paired else "iid"
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}")
    if method != "iid" and not paired:
        raise ValueError(
            "antithetic samples come in pairs: num_samples and first must be even, "
            f"got {num_samples} and {first}; use method='iid' for odd numbers"
        )
    return method


def check_samples_per_pass(samples_per_pass: int, method: str) -> int:
    """How many samples go through the model at a time, as given.

    Raises:
        ValueError: below 1, or odd for pairs.
    """
    if samples_per_pass < 1 or (method != "iid" and samples_per_pass % 2):
        raise ValueError(
            f"samples_per_pass must be at least 1, and even for antithetic samples, got {samples_per_pass}"
        )
    return samples_per_pass


def check_counts(counts: Sequence[int], num_samples: int, group: int) -> list[int]:
    """Numbers of samples to stop at, in ascending order, `group` at a time.

    Raises:
        ValueError: none, not ascending, above num_samples, or odd numbers for pairs.
    """
    counts = [integer("a count", count, minimum=1) for count in counts]
    if not counts or counts != sorted(set(counts)) or counts[-1] > num_samples:
        raise ValueError(f"counts must ascend, up to num_samples={num_samples} at most, got {counts}")
    if any(count % group for count in counts):
        raise ValueError(f"antithetic samples come in pairs: counts must be even, got {counts}; or use method='iid'")
    return counts
