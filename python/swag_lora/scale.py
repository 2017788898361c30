"""The scale and the rank of a posterior, chosen by validation NLL through one set of draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import Method
from .evaluator import Encoded, Evaluator, Sampling, labels_of
from .layout import Layout, common_dtype
from .metrics import accuracy, brier, ece, nll
from .mixture import Member, Mixture
from .posterior import SwagPosterior
from .weights import SampledWeights

SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
SMALLEST_SCALE, LARGEST_SCALE = 1 / 64, 4096.0
RANKS = (2, 5, 10, 20, 50, 100)
SAMPLES = 8


class ReusedDraws:
    """A SWAG posterior whose noise is drawn once and serves every scale: ``w_s(c) = mean + √c (w_s(1) - mean)``.

    `draw` gives what the posterior's own gives, up to rounding. Each set of samples is drawn at its first request, at scale
    1 in float32, and ``w_s(1) - mean`` is kept, 4 bytes for each weight and sample; requests that differ in the scale
    alone are served from it. The posterior must not be collected into meanwhile.
    """

    def __init__(self, posterior: SwagPosterior) -> None:
        self.posterior = posterior
        self._noise: dict[tuple[int, int, int, str], Tensor] = {}

    @property
    def layout(self) -> Layout:
        return self.posterior.layout

    def draw(
        self,
        num_samples: int,
        seed: int = 0,
        first: int = 0,
        scale: float = 0.5,
        method: Method | str = "antithetic",
    ) -> SampledWeights:
        """See `SwagPosterior.draw`."""
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"scale must be finite and not negative, got {scale}")
        mean, wanted = self.posterior.mean, (num_samples, seed, first, str(method))
        if wanted not in self._noise:
            weights = self.posterior.draw(num_samples, seed, first, 1.0, method, dtype=mean.dtype)
            self._noise[wanted] = weights.buffer.sub_(mean)
        noise = self._noise[wanted]
        kind = common_dtype(p.dtype for p in self.layout.parameters(self.posterior.model))
        buffer = torch.empty_like(noise, dtype=kind)
        torch.add(mean, noise, alpha=math.sqrt(scale), out=buffer)
        return SampledWeights(self.layout, buffer, seed=seed, first=first, method=method)


def reused(posterior: Member) -> Member:
    """`ReusedDraws` of a SWAG posterior, or of each in a mixture.

    Raises:
        TypeError: a posterior of another kind, whose samples do not follow from those at scale 1.
    """
    if isinstance(posterior, Mixture):
        return posterior.map(reused)
    if isinstance(posterior, SwagPosterior):
        return ReusedDraws(posterior)
    raise TypeError(f"a scale is chosen for SWAG posteriors and mixtures of them, not for {type(posterior).__name__}")


@dataclass(frozen=True)
class ScaleChoice:
    """What the validation split says of each scale, averaged over the same ``samples`` samples of ``seed``."""

    scales: tuple[float, ...]
    nll: tuple[float, ...]
    accuracy: tuple[float, ...]
    ece: tuple[float, ...]
    brier: tuple[float, ...]
    samples: int
    seed: int

    @property
    def scale(self) -> float:
        """The chosen one: of the smallest NLL, the smallest of equals."""
        return min(zip(self.nll, self.scales, strict=True))[1]


@dataclass(frozen=True)
class RankChoice:
    """The scales for each number of most recent deviations."""

    ranks: tuple[int, ...]
    choices: tuple[ScaleChoice, ...]

    @property
    def rank(self) -> int:
        """The chosen one: of the smallest NLL at its own chosen scale, the smallest of equals."""
        return min((min(choice.nll), rank) for rank, choice in zip(self.ranks, self.choices, strict=True))[1]

    @property
    def choice(self) -> ScaleChoice:
        """Of the chosen rank."""
        return self.choices[self.ranks.index(self.rank)]


def choose_scale(
    evaluator: Evaluator,
    posterior: SwagPosterior | Mixture,
    encoded: Encoded,
    samples: int = SAMPLES,
    seed: int = 0,
    method: str | None = None,
    scales: Sequence[float] | None = None,
    title: str = "",
) -> ScaleChoice:
    """Evaluate each scale on the encoded validation split; noise is drawn once for all, see `ReusedDraws`.

    Args:
        samples, seed, method: the samples averaged, see `Sampling`.
        scales: by default those of `SCALES`, and as long as an end of them is the best they go on beyond it by twos, to
            `SMALLEST_SCALE` and `LARGEST_SCALE`.
        title: what the progress bar says before the scale.

    Raises:
        ValueError: an empty split, no scales, or one that is negative or not finite.
    """
    if not len(encoded):
        raise ValueError("a scale is chosen on validation examples, and there are none: give a number for the scale")
    labels, draws = labels_of(encoded), reused(posterior)
    wanted = list(SCALES if scales is None else scales)
    if not wanted or not all(math.isfinite(scale) and scale >= 0 for scale in wanted):
        raise ValueError(f"the scales to choose from must be finite and not negative, got {wanted}")
    found: dict[float, list[float]] = {}
    while wanted:
        for scale in wanted:
            what = f"{title}scale {scale:g} on validation data"
            log_probs = evaluator.sampled(draws, encoded, Sampling(samples, seed, scale, method), what).log_probs
            found[scale] = [metric(log_probs, labels) for metric in (nll, accuracy, ece, brier)]
        wanted = _beyond({scale: values[0] for scale, values in found.items()}) if scales is None else []
    tried = tuple(sorted(found))
    of_nll, of_accuracy, of_ece, of_brier = (tuple(found[scale][i] for scale in tried) for i in range(4))
    return ScaleChoice(tried, of_nll, of_accuracy, of_ece, of_brier, samples, seed)


def _beyond(of_nll: Mapping[float, float]) -> list[float]:
    """The scale to try next, where the best of those tried is the smallest or the largest."""
    smallest, largest = min(of_nll), max(of_nll)
    best = min(of_nll, key=lambda scale: (of_nll[scale], scale))
    if best == largest < LARGEST_SCALE:
        return [2 * largest]
    if best == smallest > SMALLEST_SCALE and of_nll[smallest] < of_nll[2 * smallest]:
        return [smallest / 2]
    return []


def choose_rank(
    evaluator: Evaluator,
    posterior: SwagPosterior,
    encoded: Encoded,
    samples: int = SAMPLES,
    seed: int = 0,
    method: str | None = None,
    scales: Sequence[float] | None = None,
) -> RankChoice:
    """`choose_scale` for each of `candidate_ranks`, with that many of the most recent deviations."""
    ranks = candidate_ranks(min(int(posterior.count), posterior.rank))
    choices = (
        choose_scale(evaluator, posterior.truncated(rank), encoded, samples, seed, method, scales, f"rank {rank}, ")
        for rank in ranks
    )
    return RankChoice(ranks, tuple(choices))


def candidate_ranks(held: int) -> tuple[int, ...]:
    """Those of `RANKS` below the number of deviations held, and that number; (0,), the diagonal, where fewer than two are."""
    return (*(rank for rank in RANKS if rank < held), held) if held >= 2 else (0,)
