"""Predictions for whole splits, and the rows that compare point estimates with the posterior."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedTokenizerBase

from . import plan
from .data import Dataset, Example
from .drawing import resolve_method
from .metrics import nll, report
from .posterior import SwagPosterior
from .prediction import Prediction
from .predictor import Predictor
from .ranks import Ranks
from .stopping import draws_at_least
from .tasks import Task, TaskForward

POINT_ESTIMATES = {"map": "MAP, last epoch", "map-best": "MAP, best epoch"}
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_SELECTION_SAMPLES = 8

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

    def encode(self, examples: Sequence[Example]) -> Encoded:
        return self.task.encode(self.tokenizer, examples)

    def batches(self, encoded: Encoded) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of examples of similar length, with the examples' places in the split."""
        for places in self._places(encoded):
            yield places, self._batch(encoded, places)

    def point(self, encoded: Encoded, title: str = "") -> Prediction:
        """Predictions with the model's weights as they are."""
        training = self.model.training
        self.model.eval()
        prediction = self.predict(encoded, self.point_predictor(_width(encoded)), title)
        self.model.train(training)
        return prediction

    def point_predictor(self, width: int | None = None) -> Predict:
        """Predicts a batch with the model's weights and mode as they are."""

        @torch.no_grad()
        def predict(batch: Mapping[str, Tensor]) -> Prediction:
            return Prediction.from_logits(self.task.logits(self.model, batch, width)[None])

        return predict

    def sampled(
        self, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling, title: str = "", part: str = "examples"
    ) -> Prediction:
        """Predictions averaged over samples; `part` names the file in the folder to resume from."""
        return self.predict(encoded, self.predictor(posterior, encoded, sampling, part), title)

    def predictor(
        self, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling, part: str = "examples"
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
            forward=TaskForward(self.task, _width(encoded)),
        )

    def prepared(self, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling, part: str) -> Predictor:
        """`predictor`, after its plan for the longest batch."""
        predictor = self.predictor(posterior, encoded, sampling, part)
        predictor.plan(self._batch(encoded, self._places(encoded)[-1]))
        return predictor

    def predict(self, encoded: Encoded, predict: Predict, title: str) -> Prediction:
        """The prediction for a split, in its order, batch by batch."""
        total = -(-len(encoded) // self.batch_size)
        console = Console(stderr=True)
        places, parts = [], []
        for chosen, batch in track(
            self.batches(encoded), title, total=total, console=console, disable=not (self.show and title)
        ):
            places += chosen
            parts.append(predict(batch).to("cpu"))
        joined = Prediction.cat(parts)
        order = torch.tensor(places).argsort()
        return joined.select(order)

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


def choose_scale(evaluator: Evaluator, posterior: SwagPosterior, encoded: Encoded, seed: int = 0) -> dict[float, float]:
    """The validation NLL at each of `SCALES`, averaged over 8 samples; take the scale with the smallest."""
    labels = _labels(encoded)
    result = {}
    for scale in SCALES:
        sampling = Sampling(_SELECTION_SAMPLES, seed, scale)
        prediction = evaluator.sampled(posterior, encoded, sampling, f"sample scale {scale:g} on validation data")
        result[scale] = nll(prediction.log_probs, labels)
    return result


def load_folder(
    folder: str | Path, model: str | None = None, batch_size: int = 32, show: bool = False
) -> tuple[Evaluator, SwagPosterior]:
    """The model at the posterior mean, and the posterior, of a folder that `swag-lora fit` wrote.

    `model` replaces the base model that the folder names, which may have moved since.
    """
    task = Task.load(folder)
    task = task if model is None else task.with_model(model)
    tokenizer = task.tokenizer(folder)
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder} has no adapter (adapter_config.json)")
    base, _ = task.base_model(tokenizer)
    try:
        peft_model = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"the adapter in {folder} does not fit {task.model}: {error}") from None
    peft_model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    posterior = SwagPosterior.from_pretrained(peft_model, folder)
    return Evaluator(task, peft_model, tokenizer, batch_size, show), posterior


def rows(
    folder: str | Path, evaluator: Evaluator, posterior: SwagPosterior, dataset: Dataset, sampling: Sampling
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The metrics on the test split, and on `oos_test` if there is one, of each saved point estimate, SWA and SWAG.

    Also how many rows each module computed for SWAG, see `SampledModel.rows_computed`.
    """
    test = evaluator.encode(dataset.split("test"))
    outside = evaluator.encode(dataset.splits["oos_test"]) if "oos_test" in dataset.splits else None
    labels = _labels(test)
    # Before anything is computed: what is wrong with a budget or with a file to go on from shows here.
    predictors = {
        part: evaluator.prepared(posterior, encoded, sampling, part)
        for part, encoded in (("test", test), ("oos_test", outside))
        if encoded
    }

    def row(name: str, samples: int, predict: Callable[[Encoded, str, str], Prediction]) -> dict[str, Any]:
        ood = predict(outside, f"{name}, out of distribution", "oos_test") if outside else None
        inside = predict(test, name, "test")
        drawn = torch.as_tensor(inside.num_samples).double().mean().item()
        return {"name": name, "samples": samples, "samples_drawn": drawn, **report(inside, labels, ood)}

    def point(encoded: Encoded, title: str, part: str) -> Prediction:
        return evaluator.point(encoded, title)

    def sampled(encoded: Encoded, title: str, part: str) -> Prediction:
        prediction = evaluator.predict(encoded, predictors[part], title)
        computed.update(predictors[part].rows_computed)
        return prediction

    computed: Counter[str] = Counter()
    table = []
    for part, name in POINT_ESTIMATES.items():
        if (Path(folder) / part).is_dir():
            set_peft_model_state_dict(evaluator.model, load_peft_weights(str(Path(folder) / part)))
            table.append(row(name, 1, point))
    posterior.load_mean()
    table.append(row("SWA (mean)", 1, point))
    most = "K=" if sampling.tolerance is None else "K up to "
    table.append(row(f"SWAG, {most}{sampling.samples}", sampling.samples, sampled))
    return table, dict(computed)


def _labels(encoded: Encoded) -> Tensor:
    return torch.tensor([example["label"] for example in encoded])


def _width(encoded: Encoded) -> int:
    return max(len(example["input_ids"]) for example in encoded)
