"""When enough samples have been drawn: the standard error of an average, judged from few draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swag_kernels import AverageState

_LEAST_DRAWS = 2


def prior_deviation(scale: float) -> float:
    """How far from the mean one more draw is taken to have been, as a probability: ``0.04 sqrt(scale)``.

    A few draws that happen to agree have no spread, and sampling that stops whenever they do stops too early: on the
    posteriors of `benchmarks/bench_adaptive.py` three plain standard errors then cover three quarters of the
    probabilities, with this pseudo draw 99 %.
    """
    return 0.04 * math.sqrt(scale)


def guarded_std_error(state: AverageState, scale: float) -> Tensor:
    """``sqrt(m2 + prior_deviation^2) / n`` over n draws, [B, C]: the standard error with one pseudo draw.

    An antithetic pair is one draw. For many draws it is the ordinary ``sqrt(m2 / (n (n - 1)))``; infinite for fewer than
    two.
    """
    draws = state.num_samples / state.group
    if draws < _LEAST_DRAWS:
        return torch.full_like(state.m2, math.inf)
    return (state.m2 + prior_deviation(scale) ** 2).sqrt() / draws


def draws_at_least(tolerance: float, scale: float) -> int:
    """Draws before which no example stops."""
    return max(_LEAST_DRAWS, math.ceil(prior_deviation(scale) / tolerance))


def is_sure(std_error: Tensor, tolerance: float) -> Tensor:
    """Which examples have every reported probability to within `tolerance`: bool [B] from std_error [B, ..., C]."""
    return (std_error <= tolerance).flatten(1).all(1)


def check_tolerance(tolerance: float) -> float:
    if not 0 < tolerance < 1:
        raise ValueError(
            f"tolerance is a standard error of probabilities, above 0 and below 1, got {tolerance}: no number of samples "
            "has an error of zero; give num_samples without tolerance to fix their number"
        )
    return float(tolerance)
