"""The running average of class probabilities over posterior samples, in O(B·C) memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AverageState:
    """What :func:`swag_kernels.bayes_average_` accumulates for ``batch`` rows of ``num_classes`` classes.

    ========== ========== ============================================================================
    ``log_sum`` ``[B, C]`` log Σ_s p_s, in nats; −inf before the first sample
    ``m2``      ``[B, C]`` sum of squared deviations of the draws' probabilities from their mean
    ``votes``   ``[B, C]`` how many samples had this class as their argmax
    ``mean_entropy`` ``[B]`` mean of the samples' own entropies, in nats
    ``count``   scalar     samples seen, int64
    ========== ========== ============================================================================

    A *draw* is one independent sample, or with ``antithetic=True`` the average of the pair 2j, 2j+1: the standard error
    counts draws, because the two members of a pair are not independent.
    """

    batch: int
    num_classes: int
    device: torch.device | str = "cpu"
    antithetic: bool = False
    dtype: torch.dtype = torch.float32
    log_sum: Tensor = field(init=False, repr=False)
    m2: Tensor = field(init=False, repr=False)
    votes: Tensor = field(init=False, repr=False)
    mean_entropy: Tensor = field(init=False, repr=False)
    count: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = (self.batch, self.num_classes)
        self.log_sum = torch.full(shape, -torch.inf, dtype=self.dtype, device=self.device)
        self.m2 = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.votes = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.mean_entropy = torch.zeros(self.batch, dtype=self.dtype, device=self.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def group(self) -> int:
        """Samples in one draw."""
        return 2 if self.antithetic else 1

    @property
    def num_samples(self) -> int:
        return int(self.count)

    def merge_(self, other: AverageState) -> None:
        """Take in the samples of another state, which come after this one's (Chan et al. 1979, eq. 2.1, for m2).

        In this state's dtype and in this order of operations: states merged in one order have one set of bits, whoever
        computed them.

        Raises:
            ValueError: other rows, classes or grouping of samples.
        """
        mine, theirs = ((s.batch, s.num_classes, s.antithetic) for s in (self, other))
        if mine != theirs:
            raise ValueError(f"states of (batch, num_classes, antithetic) {mine} and {theirs} have nothing in common")
        seen, more = self.num_samples, other.num_samples
        if not more:
            return
        if seen:
            shift = other.log_sum.to(self.dtype).exp() / more - self.log_sum.exp() / seen
            self.m2 += shift.square_().mul_(seen * more / ((seen + more) * self.group))
        self.m2 += other.m2
        self.log_sum.copy_(torch.logaddexp(self.log_sum, other.log_sum.to(self.dtype)))
        self.votes += other.votes
        self.mean_entropy += (other.mean_entropy - self.mean_entropy) * (more / (seen + more))
        self.count += other.count

    def select(self, rows: Tensor) -> AverageState:
        """A new state of some rows (their indices, ``[n]``), with all samples seen so far."""
        chosen = AverageState(len(rows), self.num_classes, self.device, self.antithetic, self.dtype)
        for name in ("log_sum", "m2", "votes", "mean_entropy"):
            setattr(chosen, name, getattr(self, name)[rows])
        chosen.count = self.count.clone()
        return chosen

    def log_probs(self) -> Tensor:
        """``log (1/S Σ_s p_s)``, ``[B, C]``: the log of the mean of softmax, never the softmax of a mean."""
        return self.log_sum - math.log(self._samples())

    def probs(self) -> Tensor:
        """``1/S Σ_s p_s``, ``[B, C]``."""
        return self.log_probs().exp()

    def entropy(self) -> Tensor:
        """Predictive entropy ``H[p̄]``, ``[B]``, in nats."""
        log_probs = self.log_probs()
        bounded = log_probs.clamp(min=torch.finfo(self.dtype).min)  # 0 log 0 is 0
        return -(log_probs.exp() * bounded).sum(-1)

    def expected_entropy(self) -> Tensor:
        """``1/S Σ_s H[p_s]``, ``[B]``, in nats: the part of the entropy that more data about the weights cannot remove."""
        self._samples()
        return self.mean_entropy.clone()

    def mutual_information(self) -> Tensor:
        """``H[p̄] − 1/S Σ_s H[p_s]``, ``[B]``, in nats, at least 0 (Houlsby et al. 2011, eq. 1)."""
        return (self.entropy() - self.expected_entropy()).clamp(min=0)

    def disagreement(self) -> Tensor:
        """Fraction of samples whose argmax is not the argmax of the averaged probabilities, ``[B]``."""
        chosen = self.log_sum.argmax(-1, keepdim=True)
        return 1 - self.votes.gather(-1, chosen).squeeze(-1) / self._samples()

    def std_error(self) -> Tensor:
        """Monte-Carlo standard error of each averaged probability, ``√(m2 / (n(n−1)))`` over n draws, ``[B, C]``; NaN for one draw."""
        draws = self._samples() / self.group
        return (self.m2 / (draws * (draws - 1))).sqrt()

    def _samples(self) -> int:
        if not (samples := self.num_samples):
            raise RuntimeError("no samples averaged yet: pass logits [S, B, C] to swag_kernels.bayes_average_ first")
        return samples
