"""Temperature scaling: one number, fitted on validation data, that makes probabilities sharper or flatter."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .metrics import nll
from .prediction import Prediction

LARGEST = 20.0
"""Temperatures lie in [1 / LARGEST, LARGEST]."""

_BISECTIONS = 60


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The T that minimises the NLL of ``softmax(log p / T)`` (Guo et al. 2017, arXiv 1706.04599, section 4.2).

    The mean over examples of ``log Σ_c exp(β log p_c) - β log p_y`` is convex in β = 1/T, so its derivative,
    ``E_{p_β}[log p] - log p_y`` (mean), changes sign once: bisected on log T in float64, without a starting point or a step size.

    Where the best T is infinite or zero it is the nearest end of the range, `LARGEST` or 1 / `LARGEST`: when no temperature
    beats the uniform distribution, and when every example is predicted right, so that sharper is always better. Where T
    changes nothing, as with uniform rows, it is 1.

    Args:
        log_probs: ``[n, C]``, of validation data; -inf is a probability of zero.
        labels: integers ``[n]`` in [0, C).

    Raises:
        ValueError: no examples, rows that are not log-probabilities, labels out of range, or a label of probability zero.
    """
    if not math.isfinite(nll(log_probs, labels)):
        raise ValueError("a label has probability zero, which no temperature changes: leave the example out")
    log_probs, labels = log_probs.detach().double(), labels.to(log_probs.device).long()
    beyond = (log_probs - log_probs.gather(1, labels[:, None])).clamp(min=torch.finfo(torch.float64).min)

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL by β: above 0 where T is too small."""
        probs = (log_probs * math.exp(-log_temperature)).softmax(1)
        return float((probs * beyond).sum(1).mean())

    low, high = -math.log(LARGEST), math.log(LARGEST)
    sharpest, flattest = slope(low), slope(high)
    if sharpest == flattest == 0:
        return 1.0
    if sharpest <= 0:
        return 1 / LARGEST
    if flattest >= 0:
        return LARGEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def apply_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """``log softmax(log p / T)``, ``[..., C]``, computed in float64 and returned in the dtype of `log_probs`.

    Raises:
        ValueError: a temperature that is not above 0 and finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature is above 0 and finite, got {temperature}")
    return (log_probs.double() / temperature).log_softmax(-1).to(log_probs.dtype)


def tempered(prediction: Prediction, temperature: float) -> Prediction:
    """The prediction at a temperature, as one distribution: entropies of it, and nothing that samples could disagree about.

    Of an average over samples too: its spread belongs to the distributions before.
    """
    log_probs = apply_temperature(prediction.log_probs, temperature)
    # -inf would make 0 log 0 of it.
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    none = torch.zeros_like(entropy)
    return replace(
        prediction,
        log_probs=log_probs,
        entropy=entropy,
        expected_entropy=entropy,
        mutual_information=none,
        disagreement=none,
        std_error=torch.full_like(log_probs, math.nan),
        num_samples=1,
    )
