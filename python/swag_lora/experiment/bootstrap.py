"""Paired bootstrap: how sure a difference between two sets of predictions for the same examples is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import metrics

METRICS = ("accuracy", "nll", "ece", "brier")
_BINS = 15
_ENTRIES = 2_000_000  # of the resamples that are worked on at once

Values = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Scores:
    """What the metrics of one set of predictions are sums of: for each example the terms of `METRICS`, and its bin.

    correct, nll, brier, gap  [n]  float64; gap is 1[right] - confidence
    bins                      [n]  int64, of the 15 of `metrics.ece`
    """

    correct: NDArray[np.float64]
    nll: NDArray[np.float64]
    brier: NDArray[np.float64]
    gap: NDArray[np.float64]
    bins: NDArray[np.int64]

    @staticmethod
    def of(log_probs: Tensor, labels: Tensor) -> Scores:
        """The scores of predictions [n, C] for labels [n], which are checked as by `metrics`."""
        bins, correct, confidence = metrics.confidence_bins(log_probs, labels, _BINS)
        log_probs = log_probs.double()
        probs, nll = log_probs.exp(), -log_probs.gather(1, labels[:, None]).squeeze(1)
        brier = probs.square().sum(1) - 2 * (-nll).exp() + 1
        return Scores(correct.numpy(), nll.numpy(), brier.numpy(), (correct - confidence).numpy(), bins.numpy())

    def columns(self) -> NDArray[np.float64]:
        """[n, 3 + 15]: the terms of accuracy, NLL and Brier, and the gap in the column of its bin."""
        spread = np.zeros((len(self.bins), _BINS))
        spread[np.arange(len(self.bins)), self.bins] = self.gap
        return np.concatenate([np.stack([self.correct, self.nll, self.brier], 1), spread], 1)


def resampled(scores: Sequence[Scores], resamples: int, seed: int) -> list[Values]:
    """The metrics of each set of predictions on resampled examples, [resamples] each.

    A resample is n of the n examples with replacement, the same for all sets and for all metrics, from numpy's PCG64
    with `seed`. The metrics of a resample are weighted sums, so all of them are one matrix product.
    """
    n = len(scores[0].correct)
    table = np.concatenate([one.columns() for one in scores], 1)
    # An infinite NLL times a weight of zero would be NaN, with a warning.
    finite = np.isfinite(table).all(0)
    table[:, ~finite] = 0
    generator = np.random.Generator(np.random.PCG64(seed))
    step = max(1, _ENTRIES // n)
    means = np.empty((resamples, table.shape[1]))
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        drawn = generator.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        means[first : first + count] = weights @ table / n
    means[:, ~finite] = np.nan
    each = np.split(means, len(scores), 1)
    return [{"accuracy": of[:, 0], "nll": of[:, 1], "brier": of[:, 2], "ece": np.abs(of[:, 3:]).sum(1)} for of in each]


def resampled_seeds(seeds: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Which seeds each resample has, [resamples, seeds], with replacement and apart from its examples."""
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    return generator.integers(seeds, size=(resamples, seeds))


def values(log_probs: Tensor, labels: Tensor) -> Mapping[str, float]:
    """`METRICS` of the examples as they are."""
    return {name: getattr(metrics, name)(log_probs, labels) for name in METRICS}


def difference(
    one: Mapping[str, Values], other: Mapping[str, Values], metric: str, chosen: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """The metric of `one` minus that of `other` in each resample, each the mean over its seeds.

    `one` and `other` hold `resampled` by seed. With `chosen [resamples, seeds]` both have the same seeds, and the mean
    is over those that the resample has.
    """
    stacked = [np.stack([side[seed][metric] for seed in sorted(side)], 1) for side in (one, other)]
    if chosen is None:
        return stacked[0].mean(1) - stacked[1].mean(1)
    return np.take_along_axis(stacked[0] - stacked[1], chosen, 1).mean(1)


def interval(differences: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval; None where a difference is not finite."""
    if not np.isfinite(differences).all():
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    # Rounded beyond what 10 000 resamples can tell, so that the order of a sum in a product does not show.
    return round(float(low), 10), round(float(high), 10)
