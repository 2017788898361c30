"""Predictions averaged over posterior samples, and the uncertainty that comes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from swag_kernels import AverageState, bayes_average_

from .patch import SampledModel
from .weights import SampledWeights


class Posterior(Protocol):
    """Anything that draws weights: sample k is a function of (posterior, seed, k) alone, whatever else is drawn."""

    def draw(self, num_samples: int, *, seed: int, first: int, scale: float, method: str) -> SampledWeights: ...


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
                                a single draw it is NaN
    num_samples                 S
    """

    log_probs: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor
    std_error: Tensor
    num_samples: int

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
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    @staticmethod
    def cat(predictions: Sequence[Prediction]) -> Prediction:
        """One prediction for the examples of several, in order; all must be averages of as many samples."""
        if not predictions:
            raise ValueError("no predictions to join")
        counts = {prediction.num_samples for prediction in predictions}
        if len(counts) > 1:
            raise ValueError(f"predictions of different sample counts cannot be joined: {sorted(counts)}")
        parts = [prediction._tensors() for prediction in predictions]
        joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return replace(predictions[0], **joined)

    @staticmethod
    def from_logits(logits: Tensor, antithetic: bool = False) -> Prediction:
        """Average logits [S, ..., C] computed elsewhere; a point estimate is `from_logits(logits[None])`.

        With `antithetic`, samples 2j and 2j+1 are a pair.
        """
        average = _Average(antithetic)
        average.add(logits)
        return average.prediction()

    def _tensors(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "num_samples"}


class Predictor:
    """`predict` with the weights drawn once: `predictor(batch)` for each batch of a data set.

    Arguments as in `predict`. It holds num_samples weight vectors; later collections into the posterior and later
    training of the random parameters do not reach it. The model's other parameters are shared, not copied.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        num_samples: int = 32,
        *,
        seed: int = 0,
        first: int = 0,
        scale: float = 0.5,
        method: str | None = None,
        samples_per_pass: int | None = None,
    ) -> None:
        method = _method(num_samples, first, method)
        self.antithetic = method == "antithetic"
        if not scale >= 0:
            raise ValueError(f"scale must be at least 0, got {scale}")
        step = num_samples if samples_per_pass is None else samples_per_pass
        if step < 1 or (self.antithetic and step % 2):
            raise ValueError(
                f"samples_per_pass must be at least 1, and even for antithetic samples, got {samples_per_pass}"
            )
        self.num_samples = num_samples
        self._passes = [
            posterior.draw(min(step, num_samples - start), seed=seed, first=first + start, scale=scale, method=method)
            for start in range(0, num_samples, step)
        ]
        self._sampled = SampledModel(model, self._passes[0]).eval()

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Prediction:
        """The averaged prediction for one batch: the model's keyword arguments, labels being ignored."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"batch must map the model's arguments to tensors, got {type(batch).__name__}")
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        average = _Average(self.antithetic)
        for weights in self._passes:
            if self._sampled.weights is not weights:
                self._sampled.set_weights(weights)
            logits = getattr(self._sampled(**inputs), "logits", None)
            if logits is None:
                raise TypeError("the model returned no logits: predictions need one with a prediction head")
            average.add(logits)
        return average.prediction()


def predict(
    model: nn.Module,
    posterior: Posterior,
    batch: Mapping[str, Any],
    num_samples: int = 32,
    *,
    seed: int = 0,
    first: int = 0,
    scale: float = 0.5,
    method: str | None = None,
    samples_per_pass: int | None = None,
) -> Prediction:
    """Average the model's class probabilities over posterior samples, for one batch.

    The model runs in evaluation mode without gradients; neither its mode nor anything else of it changes.

    Args:
        model: a PEFT model whose output has logits: [B, C] (classification), [B, choices] (multiple choice) or
            [B, T, C] (language model). For several batches build a `Predictor` once.
        posterior: anything with `draw(num_samples, seed=, first=, scale=, method=)`, as `SwagPosterior`.
        batch: the model's keyword arguments on its device; `labels` is ignored.
        num_samples: S, at least 1.
        seed, first: samples `first`, ..., `first + S - 1` of this seed.
        scale: multiplies the covariance; 0.5 is the paper's, 0 gives the mean weights.
        method: "iid", or "antithetic" for pairs mirrored about the mean, which needs even `num_samples` and `first`.
            None takes "antithetic" where both are even and "iid" otherwise.
        samples_per_pass: samples in one forward pass, all by default; fewer take less memory and give the same
            prediction up to rounding.
    """
    predictor = Predictor(
        model,
        posterior,
        num_samples,
        seed=seed,
        first=first,
        scale=scale,
        method=method,
        samples_per_pass=samples_per_pass,
    )
    return predictor(batch)


class _Average:
    """Streams logits [S, ..., C] of successive passes into one average over all their samples."""

    def __init__(self, antithetic: bool) -> None:
        self.antithetic = antithetic
        self.state: AverageState | None = None
        self.shape: torch.Size = torch.Size()

    def add(self, logits: Tensor) -> None:
        if logits.ndim < 3:
            raise ValueError(f"logits must be [S, ..., C] with a sample axis, got {list(logits.shape)}")
        rows = logits.detach().flatten(1, -2)
        if self.state is None:
            self.shape = logits.shape[1:-1]
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            _, batch, classes = rows.shape
            self.state = AverageState(batch, classes, logits.device, self.antithetic, dtype)
        bayes_average_(self.state, rows)

    def prediction(self) -> Prediction:
        assert self.state is not None
        state = self.state

        def shaped(rows: Tensor) -> Tensor:
            return rows.unflatten(0, self.shape)

        return Prediction(
            log_probs=shaped(state.log_probs()),
            entropy=shaped(state.entropy()),
            expected_entropy=shaped(state.expected_entropy()),
            mutual_information=shaped(state.mutual_information()),
            disagreement=shaped(state.disagreement()),
            std_error=shaped(state.std_error()),
            num_samples=state.num_samples,
        )


def _method(num_samples: int, first: int, method: str | None) -> str:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if first < 0:
        raise ValueError(f"first must be at least 0, got {first}")
    paired = num_samples % 2 == 0 and first % 2 == 0
    if method is None:
        return "antithetic" if paired else "iid"
    if method not in ("antithetic", "iid"):
        raise ValueError(f"method must be 'antithetic' or 'iid', got {method!r}")
    if method == "antithetic" and not paired:
        raise ValueError(
            "antithetic samples come in pairs: num_samples and first must be even, "
            f"got {num_samples} and {first}; use method='iid' for odd numbers"
        )
    return method
