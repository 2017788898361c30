"""What is known about an example from S samples of the weights: the averaged probabilities and their uncertainties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from swag_kernels import AverageState, bayes_average_

from .stopping import guarded_std_error


@dataclass(frozen=True, eq=False)
class Prediction:
    """The average of S class distributions p_s for each example.

    Shapes are for classification and multiple choice; a language model's have a position axis, [B, T] and [B, T, C].
    Probabilities are float32 (float64 for a float64 model), entropies in nats.

    log_probs           [B, C]  log of the mean of softmax, log 1/S sum_s p_s
    entropy             [B]     predictive entropy H[1/S sum_s p_s] = expected_entropy + mutual_information
    expected_entropy    [B]     1/S sum_s H[p_s], what more data about the weights would leave
    mutual_information  [B]     between class and weights: what the samples disagree about (Houlsby et al. 2011)
    disagreement        [B]     fraction of samples whose own argmax is not the predicted class
    std_error           [B, C]  Monte-Carlo standard error of each probability; an antithetic pair is one draw, and of
                                a single draw it is NaN. Where sampling stopped by it (`predict(tolerance=)`) it is
                                `stopping.guarded_std_error`
    num_samples                 S; where each example stopped by itself, S of each example [B]
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor
    std_error: Tensor
    num_samples: int | Tensor

    @property
    def probs(self) -> Tensor:
        """Mean of softmax, [B, C]."""
        return self.log_probs.exp()

    @property
    def predicted(self) -> Tensor:
        """The class with the largest averaged probability, [B]."""
        return self.log_probs.argmax(-1)

    def __len__(self) -> int:
        return len(self.log_probs)

    def to(self, device: torch.device | str) -> Prediction:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    @staticmethod
    def cat(predictions: Sequence[Prediction]) -> Prediction:
        """One prediction for the examples of several, in order.

        Raises:
            ValueError: none given, or averages of different fixed numbers of samples.
        """
        if not predictions:
            raise ValueError("no predictions to join")
        counts = {p.num_samples for p in predictions if isinstance(p.num_samples, int)}
        each = any(isinstance(p.num_samples, Tensor) for p in predictions)
        if len(counts) > 1 or (counts and each):
            raise ValueError(f"predictions of different sample counts cannot be joined: {sorted(counts)}")
        parts = [prediction.tensors() for prediction in predictions]
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return replace(predictions[0], **joined)

    def select(self, rows: Tensor) -> Prediction:
        """The prediction for some examples, by their indices."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors().items()})

    @staticmethod
    def from_logits(logits: Tensor, antithetic: bool = False) -> Prediction:
        """Average logits [S, ..., C] computed elsewhere; a point estimate is `from_logits(logits[None])`.

        With `antithetic`, samples 2j and 2j+1 are a pair.
        """
        average = Average(antithetic)
        average.add(logits)
        return average.prediction()

    def tensors(self) -> dict[str, Tensor]:
        """The fields that have a row for each example."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Chunk:
    """The average over one chunk of samples; its rows are examples of this shape, its logits were of this dtype."""

    state: AverageState
    shape: torch.Size
    dtype: torch.dtype


class Average:
    """Streams logits [S, ..., C] of successive chunks of samples into one average over all of them.

    Each chunk is averaged by itself and then merged, in float64, into what came before: the same chunks in the same
    order give the same bits, whether one process computed them or many.
    """

    def __init__(self, antithetic: bool) -> None:
        self.antithetic = antithetic
        self.state: AverageState | None = None
        self.shape: torch.Size = torch.Size()
        self._dtype = torch.float32

    def chunk(self, logits: Tensor) -> Chunk:
        """The average over one chunk alone."""
        if logits.ndim < 3:
            raise ValueError(f"logits must be [S, ..., C] with a sample axis, got {list(logits.shape)}")
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.detach().flatten(1, -2)
        state = AverageState(rows.shape[1], rows.shape[2], logits.device, self.antithetic, dtype)
        bayes_average_(state, rows)
        return Chunk(state, logits.shape[1:-1], dtype)

    def merge(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        self.shape, self._dtype, state = chunk.shape, chunk.dtype, chunk.state
        if self.state is None:
            self.state = AverageState(state.batch, state.num_classes, state.device, self.antithetic, torch.float64)
        self.state.merge_(state)

    def add(self, logits: Tensor) -> None:
        self.merge(self.chunk(logits))

    def keep(self, examples: Tensor) -> None:
        """Go on with some examples alone, by their indices on the first axis."""
        assert self.state is not None
        rows = torch.arange(self.state.batch, device=examples.device).view(self.shape)[examples]
        self.shape = rows.shape
        self.state = self.state.select(rows.flatten())

    def prediction(self, guarded: float | None = None) -> Prediction:
        """The average so far; `guarded`, the scale of the samples, takes the standard error that sampling may stop by."""
        assert self.state is not None
        state = self.state

        def shaped(rows: Tensor) -> Tensor:
            return rows.to(self._dtype).unflatten(0, self.shape)

        return Prediction(
            log_probs=shaped(state.log_probs()),
            entropy=shaped(state.entropy()),
            expected_entropy=shaped(state.expected_entropy()),
            mutual_information=shaped(state.mutual_information()),
            disagreement=shaped(state.disagreement()),
            std_error=shaped(state.std_error() if guarded is None else guarded_std_error(state, guarded)),
            num_samples=state.num_samples,
        )
