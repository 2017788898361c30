"""How far the averaged probabilities of K samples lie from the average of very many."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bench_case import SCALE, Adapted, Case
from .patch import SampledModel

_FEWEST = 64  # samples, so that a small K's error is an average over several groups
_REFERENCE = 4  # times the samples of the largest K


@dataclass(frozen=True)
class ErrorPoint:
    """RMS error of K samples' averaged probabilities over the batch's examples and classes; None for half a pair.

    `groups` disjoint sets of K samples were averaged, and compared with `reference` samples of another seed, whose own
    error is in it: the part sqrt(1 + K / reference) for independent samples.
    """

    samples: int
    iid: float
    antithetic: float | None
    groups: int
    reference: int


@torch.no_grad()
def error_curve(
    adapted: Adapted, inputs: Mapping[str, Any], samples: Sequence[int], seed: int, seconds: float
) -> list[ErrorPoint]:
    """The error at each K of `samples`, for independent samples and antithetic pairs.

    The reference is the average of four times as many, by antithetic pairs. Where all that would take longer than
    `seconds`, the largest K are left out, or all of them.
    """
    chunk = Case(adapted, inputs, max(2, samples[-1]), seed).samples_per_pass
    chunk += chunk % 2
    sampled = SampledModel(adapted.model, adapted.posterior.draw(2)).eval()

    def probabilities(method: str, stream: int, count: int) -> Iterator[Tensor]:
        """Of `count` samples, ``[rows, C]`` in float64 one after the other."""
        for first in range(0, count, chunk):
            number = min(chunk, count - first)
            sampled.set_weights(adapted.posterior.draw(number, seed + stream, first, SCALE, method))
            for logits in sampled(**inputs).logits.flatten(1, -2):
                yield logits.double().softmax(-1)

    each = float("inf")
    for _ in range(2):  # the first pass is a warm-up, and either may be held up
        begin = time.perf_counter()
        sum(1 for _ in probabilities("antithetic", 1, chunk))
        each = min(each, (time.perf_counter() - begin) / chunk)
    affordable = [k for k in samples if (2 + _REFERENCE) * max(k, _FEWEST) * each <= seconds]
    if not affordable:
        return []
    count = max(affordable[-1], _FEWEST)
    count += count % 2
    reference = _REFERENCE * count
    truth = sum(probabilities("antithetic", 1, reference), start=torch.zeros((), dtype=torch.float64)) / reference
    iid = _errors(probabilities("iid", 2, count), affordable, truth)
    antithetic = _errors(probabilities("antithetic", 3, count), [k for k in affordable if k % 2 == 0], truth)
    return [ErrorPoint(k, iid[k], antithetic.get(k), count // k, reference) for k in affordable]


def _errors(stream: Iterator[Tensor], sizes: Sequence[int], truth: Tensor) -> dict[int, float]:
    """RMS error of the averages of each size, over as many disjoint groups as the stream fills."""
    sums = {k: torch.zeros_like(truth) for k in sizes}
    squares: dict[int, list[float]] = {k: [] for k in sizes}
    for index, probabilities in enumerate(stream, start=1):
        for k in sizes:
            sums[k] += probabilities
            if index % k == 0:
                squares[k].append((sums[k] / k - truth).square().mean().item())
                sums[k].zero_()
    return {k: (sum(values) / len(values)) ** 0.5 for k, values in squares.items()}
