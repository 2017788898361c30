"""The averaged likelihood of token sequences, and what the samples disagree about, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .drawing import check_samples_per_pass, resolve_method
from .language_model import IGNORED, answers_of_rows, check_tokens, labels_to_predict, language_model
from .output_head import SplitModel, vocabulary_size
from .patch import SampledModel
from .prediction import Prediction
from .predictor import Posterior
from .token_average import TokenAverage


@dataclass(frozen=True, eq=False)
class TokenLogProbs:
    """The average of S samples' next-token distributions p_s(. | prefix), at the tokens of given sequences.

    Position t is about the label at t given the tokens before it, so position 0 has nothing. In float32 (float64 for a
    float64 model) and nats, with p = 1/S sum_s p_s:

    log_probs           [B, T]  log p(label_t | prefix)
    entropy             [B, T]  H[p(. | prefix)] = expected_entropy + mutual_information
    expected_entropy    [B, T]  1/S sum_s H[p_s(. | prefix)]
    mutual_information  [B, T]  what the samples disagree about
    mask                [B, T]  True where there is a label, and a prefix to predict it from
    num_samples                 S

    Where the mask is False the other values are 0, so that sums over T count labels.
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    mask: Tensor
    num_samples: int

    @property
    def sequence_log_probs(self) -> Tensor:
        """``sum_t log p(label_t | prefix)``, [B]: the samples are averaged at each token, as `generate` does."""
        return self.log_probs.sum(-1)


@overload
def log_probs(
    model: nn.Module,
    posterior: Posterior,
    input_ids: Tensor,
    labels: Tensor | None = ...,
    *,
    attention_mask: Tensor | None = ...,
    answers: None = ...,
    num_samples: int = ...,
    seed: int = ...,
    first: int = ...,
    scale: float = ...,
    method: str | None = ...,
    samples_per_pass: int | None = ...,
    max_logits: int = ...,
) -> TokenLogProbs: ...


@overload
def log_probs(
    model: nn.Module,
    posterior: Posterior,
    input_ids: Tensor,
    labels: None = ...,
    *,
    attention_mask: Tensor | None = ...,
    answers: Tensor,
    num_samples: int = ...,
    seed: int = ...,
    first: int = ...,
    scale: float = ...,
    method: str | None = ...,
    samples_per_pass: int | None = ...,
    max_logits: int = ...,
) -> Prediction: ...


@torch.no_grad()
def log_probs(
    model: nn.Module,
    posterior: Posterior,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    answers: Tensor | None = None,
    num_samples: int = 32,
    seed: int = 0,
    first: int = 0,
    scale: float = 0.5,
    method: str | None = None,
    samples_per_pass: int | None = None,
    max_logits: int = 1 << 24,
) -> TokenLogProbs | Prediction:
    """The mean over posterior samples of a language model's token probabilities.

    For each label: ``log 1/S sum_s p_s(label_t | tokens before t)``, with the entropies and the mutual information of
    that position. With `answers`: the distribution over these tokens alone, ``1/S sum_s softmax`` of their logits
    after the last token of each row, for multiple choice by answer letters.

    Samples run in passes, and the head runs only where there is a label, by blocks of tokens and of the vocabulary (for
    `answers` only their rows). Held at once, beside a pass's activations: two tensors of `max_logits` values and, with
    several passes, the running average, one value for each label and vocabulary entry of as many sequences as stay
    within `max_logits`, at least one. None of it grows with S. Where a block is less than the vocabulary its logits are
    computed twice. The model runs in evaluation mode; nothing of it changes.

    Args:
        model: a PEFT causal language model.
        posterior: anything with `draw(num_samples, seed=, first=, scale=, method=)`, as `SwagPosterior`.
        input_ids: token ids ``[B, T]``, padded on either side.
        labels: ``[B, T]``, aligned with `input_ids` (the shift happens here); -100 is ignored, and so is a label whose
            preceding token is padding. None takes the tokens themselves.
        attention_mask: ``[B, T]``, 0 for padding; None means there is none.
        answers: token ids ``[A]``, or ``[B, A]`` with each row's own.
        num_samples, seed, first, scale, method: which samples, as in `predict`.
        samples_per_pass: samples in one pass, all by default; even for antithetic ones. The result is the same up to
            rounding.
        max_logits: logits made at once, at least `samples_per_pass`.

    Returns:
        `TokenLogProbs`, or with `answers` a `Prediction` over them, ``log_probs [B, A]``.

    Raises:
        TypeError: no causal language model, or its head is not linear.
        ValueError: a shape or number that does not fit, no label, ids outside the vocabulary; before anything is drawn.
    """
    core = language_model(model)
    check_tokens(core, input_ids, attention_mask)
    vocabulary = vocabulary_size(core)
    method = resolve_method(num_samples, first, scale, method)
    step = num_samples
    if samples_per_pass is not None:
        step = min(step, check_samples_per_pass(samples_per_pass, method))
    if max_logits < step:
        raise ValueError(f"max_logits must be at least the {step} samples of one pass, got {max_logits}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if answers is None:
        targets = labels_to_predict(input_ids, labels, mask, vocabulary)
    else:
        answers = answers_of_rows(answers, labels, len(input_ids), vocabulary)

    passes = _Passes(
        model, posterior, num_samples, step, {"seed": seed, "first": first, "scale": scale, "method": method}
    )
    if answers is not None:
        inputs = _inputs(core, input_ids, mask)
        return _over_answers(passes, inputs, _last(mask), answers, method != "iid")
    rows = len(input_ids) if step == num_samples else max(1, max_logits // (input_ids.shape[1] * vocabulary))
    parts = [
        _over_labels(passes, _inputs(core, ids, seen), target, vocabulary, max_logits)
        for ids, seen, target in zip(input_ids.split(rows), mask.split(rows), targets.split(rows), strict=True)
    ]
    chosen, entropy, expected, mutual = (torch.cat(values) for values in zip(*parts, strict=True))
    return TokenLogProbs(chosen, entropy, expected, mutual, targets != IGNORED, num_samples)


class _Passes:
    """The samples of one call, some in each pass, drawn for it and dropped after it; a single pass is kept."""

    def __init__(
        self, model: nn.Module, posterior: Posterior, num_samples: int, step: int, options: dict[str, Any]
    ) -> None:
        self._model, self._posterior, self._options = model, posterior, options
        self._starts = range(0, num_samples, step)
        self.num_samples, self.step = num_samples, step
        self._made: tuple[SampledModel, SplitModel] | None = None

    def __iter__(self) -> Iterator[SplitModel]:
        for start in self._starts:
            if self._made is None or len(self._starts) > 1:
                count = min(self.step, self.num_samples - start)
                first = self._options["first"] + start
                weights = self._posterior.draw(count, **self._options | {"first": first})
                if self._made is None:
                    sampled = SampledModel(self._model, weights).eval()
                    self._made = sampled, SplitModel(self._model, sampled)
                else:
                    self._made[0].set_weights(weights)
            yield self._made[1]


def _over_labels(
    passes: _Passes, inputs: dict[str, Tensor], targets: Tensor, vocabulary: int, max_logits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_probs, entropy, expected_entropy and mutual_information ``[b, T]`` of some sequences."""
    row, position = (targets != IGNORED).nonzero(as_tuple=True)
    average: TokenAverage | None = None
    for split in passes:
        hidden = split.hidden(**inputs)[:, row, position - 1]  # [S, n, H]
        if average is None:
            dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            average = TokenAverage(
                targets[row, position], vocabulary, passes.num_samples, passes.step, max_logits, dtype
            )
        average.add(split, hidden)
    assert average is not None

    def laid_out(values: Tensor) -> Tensor:
        return values.new_zeros(targets.shape).index_put((row, position), values)

    entropy, expected = average.entropy, average.mean_entropy
    return (
        laid_out(average.log_sum - math.log(passes.num_samples)),
        laid_out(entropy),
        laid_out(expected),
        laid_out((entropy - expected).clamp(min=0)),
    )


def _over_answers(
    passes: _Passes, inputs: dict[str, Tensor], last: Tensor, answers: Tensor, antithetic: bool
) -> Prediction:
    rows = torch.arange(len(last), device=last.device)
    tokens, which = answers.unique(return_inverse=True)
    logits = []
    for split in passes:
        every = split.logits(split.hidden(**inputs)[:, rows, last], tokens)  # [S, B, tokens]
        logits.append(every.gather(-1, which.expand(len(every), -1, -1)))
    return Prediction.from_logits(torch.cat(logits), antithetic)


def _inputs(core: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The decoder's inputs; with padding each row counts its positions from its own first token, as `generate` does."""
    inputs = {"input_ids": input_ids}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
        if "position_ids" in signature(core.forward).parameters:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def _last(mask: Tensor) -> Tensor:
    """The position of each row's last token, ``[B]``."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
