"""A model with its task, and how whole splits go through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from . import plan
from .data import Example
from .drawing import resolve_method
from .patch import SampledModel
from .positions import capacity
from .prediction import Prediction
from .predictor import Posterior, Predictor
from .ranks import Ranks
from .stopping import draws_at_least
from .tasks import Task, TaskForward

Encoded = Sequence[Mapping[str, Any]]
Predict = Callable[[Mapping[str, Tensor]], Prediction]


@dataclass(frozen=True)
class Sampling:
    """Which samples are averaged. `method` None takes antithetic pairs where their number is even.

    With a `tolerance`, `samples` is the most that an example gets, see `predict`.
    """

    samples: int = 32
    seed: int = 0
    scale: float = 0.5
    method: str | None = None
    tolerance: float | None = None

    @property
    def resolved_method(self) -> str:
        return resolve_method(self.samples, 0, self.scale, self.method)

    @property
    def antithetic(self) -> bool:
        return self.resolved_method != "iid"


@dataclass(frozen=True)
class Passes:
    """How samples and examples go through the model, see `predict`; `resume` is a folder."""

    memory: int | str | None = None
    mesh: DeviceMesh | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Evaluator:
    """A model with its task and tokenizer, and how splits go through it."""

    task: Task
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    show: bool = False
    passes: Passes = Passes()

    def check_sampled(self) -> None:
        """Refuse, before any training, a model whose trained parameters cannot be sampled.

        Raises:
            ValueError: as `SampledModel`, also for modules without a sampled form; the message names the first.
        """
        one = {name: p.detach()[None] for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            SampledModel(self.model, one)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """
        Raises:
            ValueError: an example is longer than the model's table of positions.
        """
        encoded = self.task.encode(self.tokenizer, examples)
        longest, most = max((example["length"] for example in encoded), default=0), capacity(self.model)
        if most is not None and longest > most:
            raise ValueError(
                f"an example has {longest} tokens, and {self.task.model} has positions for {most}: take --max-length {most}"
            )
        return encoded

    def batches(self, encoded: Encoded) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of examples of similar length, with the examples' places in the split."""
        for places in self._places(encoded):
            yield places, self._batch(encoded, places)

    def point(self, encoded: Encoded, title: str = "") -> Prediction:
        """Predictions with the model's weights as they are."""
        training = self.model.training
        self.model.eval()
        prediction = self.predict(encoded, self.point_predictor(width_of(encoded)), title)
        self.model.train(training)
        return prediction

    def point_predictor(self, width: int | None = None) -> Predict:
        """Predicts a batch with the model's weights and mode as they are."""

        @torch.no_grad()
        def predict(batch: Mapping[str, Tensor]) -> Prediction:
            return Prediction.from_logits(self.task.logits(self.model, batch, width)[None])

        return predict

    def sampled(
        self, posterior: Posterior, encoded: Encoded, sampling: Sampling, title: str = "", part: str = "examples"
    ) -> Prediction:
        """Predictions averaged over samples; `part` names the file in the folder to resume from."""
        return self.predict(encoded, self.predictor(posterior, encoded, sampling, part), title)

    def predictor(
        self, posterior: Posterior, encoded: Encoded, sampling: Sampling, part: str = "examples"
    ) -> Predictor:
        """Predicts a batch of the split with the average over samples."""
        passes = self.passes
        fixed = sampling.tolerance is None
        if passes.resume is not None:
            passes.resume.mkdir(parents=True, exist_ok=True)
        return Predictor(
            self.model,
            posterior,
            sampling.samples if fixed else None,
            max_samples=None if fixed else sampling.samples,
            seed=sampling.seed,
            scale=sampling.scale,
            method=sampling.resolved_method,
            tolerance=sampling.tolerance,
            samples_per_pass=self.samples_per_pass(encoded, sampling) if passes.memory is None else None,
            examples_per_pass=-(-self.batch_size // Ranks.of(passes.mesh).data),
            memory=passes.memory,
            mesh=passes.mesh,
            resume=None if passes.resume is None else passes.resume / f"{part}.safetensors",
            forward=TaskForward(self.task, width_of(encoded)),
        )

    def prepared(self, posterior: Posterior, encoded: Encoded, sampling: Sampling, part: str) -> Predictor:
        """`predictor`, after its plan for the longest batch."""
        predictor = self.predictor(posterior, encoded, sampling, part)
        predictor.plan(self._batch(encoded, self._places(encoded)[-1]))
        return predictor

    def predict(self, encoded: Encoded, predict: Predict, title: str) -> Prediction:
        """The prediction for a split, in its order, batch by batch."""
        return self.predict_each(encoded, lambda batch: [predict(batch)], title)[0]

    def predict_each(
        self, encoded: Encoded, predict: Callable[[Mapping[str, Tensor]], Sequence[Prediction]], title: str
    ) -> list[Prediction]:
        """As `predict`, where a batch has several predictions: each for the whole split."""
        total = -(-len(encoded) // self.batch_size)
        console = Console(stderr=True)
        places, parts = [], []
        for chosen, batch in track(
            self.batches(encoded), title, total=total, console=console, disable=not (self.show and title)
        ):
            places += chosen
            parts.append([prediction.to("cpu") for prediction in predict(batch)])
        order = torch.tensor(places).argsort()
        return [Prediction.cat(column).select(order) for column in zip(*parts, strict=True)]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _places(self, encoded: Encoded) -> list[list[int]]:
        """Of each batch's examples in the split, the shortest first."""
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i]["length"], i))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _batch(self, encoded: Encoded, places: Sequence[int]) -> dict[str, Tensor]:
        batch = self.task.collate(self.tokenizer, [encoded[i] for i in places])
        return {name: value.to(self._device) for name, value in batch.items()}

    def _tokens(self, encoded: Encoded) -> int:
        """Of the largest batch."""
        rows = max(len(example["input_ids"]) for example in encoded)
        return min(self.batch_size, len(encoded)) * rows * max(example["length"] for example in encoded)

    def samples_per_pass(self, encoded: Encoded, sampling: Sampling) -> int:
        """All of them, or as many as one pass over the largest batch should take; the least where each may be the last."""
        group = 2 if sampling.antithetic else 1
        step = plan.samples_at_once(self._device, self._tokens(encoded), group)
        step = min(step, group * -(-sampling.samples // group // Ranks.of(self.passes.mesh).samples))
        if sampling.tolerance is not None:
            step = min(step, group * -(-draws_at_least(sampling.tolerance, sampling.scale) // 2))
        return min(sampling.samples, step)


def labels_of(encoded: Encoded) -> Tensor:
    return torch.tensor([example["label"] for example in encoded])


def width_of(encoded: Encoded) -> int:
    return max(len(example["input_ids"]) for example in encoded)
