"""When enough samples have been drawn: the standard error of an average, judged from few draws."""

from __future__ import annotations

import math

from torch import Tensor

from swag_kernels import AverageState

PRIOR_DEVIATION = 0.03
"""How far from the mean one more draw is taken to have been, as a probability.

A few draws that happen to agree have no spread, and sampling that stops whenever they do stops too early. With this value
three standard errors cover 99 % of probabilities on the posteriors that `benchmarks/bench_adaptive.py` measures; without
it, from 73 % to 93 %.
"""


def guarded_std_error(state: AverageState) -> Tensor:
    """``sqrt(m2 + PRIOR_DEVIATION^2) / n`` over n draws, [B, C]: the standard error with one pseudo draw.

    An antithetic pair is one draw. For many draws it is the ordinary ``sqrt(m2 / (n (n - 1)))``. It is at most t after
    ``PRIOR_DEVIATION / t`` draws at the earliest: 6 for a tolerance of 0.005.
    """
    draws = state.num_samples / state.group
    return (state.m2 + PRIOR_DEVIATION**2).sqrt() / draws


def draws_at_least(tolerance: float) -> int:
    """Draws before which no example stops."""
    return math.ceil(PRIOR_DEVIATION / tolerance)


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
