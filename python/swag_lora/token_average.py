"""The running average of next-token distributions over samples, by blocks of tokens and of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .output_head import SplitModel


class TokenAverage:
    """Likelihood and entropies of n tokens, averaged over S samples that come in passes.

    With p_s the softmax of sample s's logits and l_s its log-sum-exp, a pass adds, block by block,

    - l_s, sum_c p_s(c) logit_s(c) and the label's logit, by one sweep over the vocabulary, and from these
      ``log_sum [n]`` = log sum_s p_s(label) and ``mean_entropy [n]`` = 1/S sum_s H[p_s];
    - exp(logit_s(c) - l_s), by a second sweep, and in the last pass ``entropy [n]`` = H[1/S sum_s p_s].

    A block of m tokens and v vocabulary entries has P * m * v logits, P the samples of a pass, at most `max_logits`. The
    whole vocabulary is one block where it fits; its logits then serve both sweeps. The sum of probabilities ``[n, C]``
    is kept only between passes. It is in the linear domain: what is lost below the smallest float adds nothing to an
    entropy, and the label's probability is summed in the log domain.

    Args:
        labels: ``[n]``.
    """

    def __init__(
        self,
        labels: Tensor,
        vocabulary: int,
        num_samples: int,
        samples_per_pass: int,
        max_logits: int,
        dtype: torch.dtype,
    ) -> None:
        self._labels, self._num_samples, self._dtype = labels, num_samples, dtype
        self._width = min(vocabulary, max_logits // samples_per_pass)
        self._tokens = max(1, max_logits // (samples_per_pass * self._width))
        self._columns = [slice(c, min(c + self._width, vocabulary)) for c in range(0, vocabulary, self._width)]
        self._seen = 0
        one = torch.zeros(len(labels), dtype=dtype, device=labels.device)
        self._sum = one.new_zeros(len(labels), vocabulary) if samples_per_pass < num_samples else None
        self.log_sum = torch.full_like(one, -torch.inf)
        self.mean_entropy, self.entropy = one, one.clone()

    def add(self, split: SplitModel, hidden: Tensor) -> None:
        """Add the samples of one pass, whose hidden states at the n tokens are ``[P, n, H]``."""
        self._seen += len(hidden)
        for start in range(0, len(self._labels), self._tokens):
            tokens = slice(start, start + self._tokens)
            self._add_block(split, hidden[:, tokens], tokens)

    def _add_block(self, split: SplitModel, hidden: Tensor, tokens: slice) -> None:
        lowest = torch.finfo(self._dtype).min
        shape = hidden.shape[:2]
        peak = hidden.new_full(shape, lowest, dtype=self._dtype)
        total, moment, chosen = (hidden.new_zeros(shape, dtype=self._dtype) for _ in range(3))
        labels = self._labels[tokens].expand(len(hidden), -1)
        block = torch.empty(0)
        for columns in self._columns:
            block = split.logits(hidden, columns).to(self._dtype)
            inside = (labels >= columns.start) & (labels < columns.stop)
            picked = (labels - columns.start).clamp(0, columns.stop - columns.start - 1)
            chosen = block.gather(-1, picked.unsqueeze(-1)).squeeze(-1).where(inside, chosen)
            higher = torch.maximum(peak, block.amax(-1))
            block = block.sub_(higher.unsqueeze(-1)).clamp_(min=lowest)  # so that 0 times it is 0
            faded = (peak - higher).exp()
            weights = block.exp()
            moment = faded * (moment + (peak - higher).clamp(min=lowest) * total) + (weights * block).sum(-1)
            total = faded * total + weights.sum(-1)
            peak = higher
        spread = total.log()
        log_sum = (chosen - peak - spread).logsumexp(0)
        self.log_sum[tokens] = torch.logaddexp(self.log_sum[tokens], log_sum)
        self.mean_entropy[tokens] += (spread - moment / total).sum(0) / self._num_samples
        for columns in self._columns:
            if len(self._columns) > 1:
                block = split.logits(hidden, columns).to(self._dtype).sub_(peak.unsqueeze(-1))
            self._add_probs(block.sub_(spread.unsqueeze(-1)).exp_().sum(0), tokens, columns)

    def _add_probs(self, probs: Tensor, tokens: slice, columns: slice) -> None:
        if self._sum is not None:
            probs = self._sum[tokens, columns].add_(probs)
        if self._seen == self._num_samples:
            mean = probs / self._num_samples
            self.entropy[tokens] -= torch.xlogy(mean, mean).sum(-1)
