"""Predictions for whole splits, and the rows that compare point estimates with the posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import memory
from .data import Dataset, Example
from .metrics import nll, report
from .patch import SampledModel
from .posterior import SwagPosterior
from .predict import Prediction
from .tasks import Task
from .weights import SampledWeights

POINT_ESTIMATES = {"map": "MAP, last epoch", "map-best": "MAP, best epoch"}
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_SELECTION_SAMPLES = 8

# Activations of more tokens than this fall out of a CPU's caches, and then several passes are faster than one. Constants,
# not shares of the free memory, so that the same command does the same arithmetic everywhere.
_TOKENS_PER_PASS = {"cpu": 4096, "cuda": 65_536}

Encoded = Sequence[Mapping[str, Any]]
Predict = Callable[[Mapping[str, Tensor]], Prediction]


@dataclass(frozen=True)
class Sampling:
    """Which samples are averaged. `method` None takes antithetic pairs where their number is even."""

    samples: int = 32
    seed: int = 0
    scale: float = 0.5
    method: str | None = None

    @property
    def antithetic(self) -> bool:
        if self.method == "antithetic" and self.samples % 2:
            raise ValueError(f"antithetic samples come in pairs, {self.samples} is odd; take method iid")
        return self.method != "iid" and self.samples % 2 == 0

    def draw(self, posterior: SwagPosterior) -> SampledWeights:
        method = "antithetic" if self.antithetic else "iid"
        return posterior.draw(self.samples, self.seed, scale=self.scale, method=method)


@dataclass(frozen=True)
class Evaluator:
    """A model with its task and tokenizer, and how splits go through it."""

    task: Task
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    show: bool = False

    def encode(self, examples: Sequence[Example]) -> Encoded:
        return self.task.encode(self.tokenizer, examples)

    def batches(self, encoded: Encoded) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of examples of similar length, with the examples' places in the split."""
        order = sorted(range(len(encoded)), key=lambda i: (encoded[i]["length"], i))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.task.collate(self.tokenizer, [encoded[i] for i in places])
            yield places, {name: value.to(device) for name, value in batch.items()}

    def point(self, encoded: Encoded, title: str = "") -> Prediction:
        """Predictions with the model's weights as they are."""
        training = self.model.training
        self.model.eval()
        prediction = self._predict(encoded, self.point_predictor(_width(encoded)), title)
        self.model.train(training)
        return prediction

    def point_predictor(self, width: int | None = None) -> Predict:
        """Predicts a batch with the model's weights and mode as they are."""

        @torch.no_grad()
        def predict(batch: Mapping[str, Tensor]) -> Prediction:
            return Prediction.from_logits(self.task.logits(self.model, batch, width)[None])

        return predict

    def sampled(self, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling, title: str = "") -> Prediction:
        """Predictions averaged over samples."""
        self.check_memory(posterior, encoded, sampling)
        step = self.samples_per_pass(encoded, sampling)
        predict = self.predictor(sampling.draw(posterior), step, sampling.antithetic, _width(encoded))
        return self._predict(encoded, predict, title)

    def predictor(self, weights: SampledWeights, step: int, antithetic: bool, width: int | None = None) -> Predict:
        """Predicts a batch with the average over `weights`, `step` samples in one pass."""
        parts = [SampledWeights(weights.layout, rows) for rows in weights.buffer.split(step)]
        passes = [SampledModel(self.model, part).eval() for part in parts]

        @torch.no_grad()
        def predict(batch: Mapping[str, Tensor]) -> Prediction:
            logits = torch.cat([self.task.logits(sampled, batch, width) for sampled in passes])
            return Prediction.from_logits(logits, antithetic)

        return predict

    def _predict(self, encoded: Encoded, predict: Predict, title: str) -> Prediction:
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
        columns = {name: value[order] for name, value in vars(joined).items() if isinstance(value, Tensor)}
        return Prediction(**columns, num_samples=joined.num_samples)

    def _tokens(self, encoded: Encoded) -> int:
        """Of the largest batch."""
        rows = max(len(example["input_ids"]) for example in encoded)
        return min(self.batch_size, len(encoded)) * rows * max(example["length"] for example in encoded)

    def samples_per_pass(self, encoded: Encoded, sampling: Sampling) -> int:
        """All of them, or as many as `_TOKENS_PER_PASS` allows for the largest batch."""
        device = next(self.model.parameters()).device.type
        step = max(1, _TOKENS_PER_PASS.get(device, 4096) // self._tokens(encoded))
        return min(sampling.samples, max(2, step - step % 2) if sampling.antithetic else step)

    def check_memory(self, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling) -> None:
        """Raises a ValueError that says how many samples fit, if `sampling` asks for more."""
        step = self.samples_per_pass(encoded, sampling)
        config: Any = self.model.config
        config = config.get_text_config()
        hidden = getattr(config, "hidden_size", 1024)
        # Query, key, value, attention, residual and the feed-forward's inside, before and after its activation.
        per_token = 8 * hidden + 2 * (getattr(config, "intermediate_size", None) or 4 * hidden)
        size = torch.float32.itemsize
        memory.check_samples(
            sampling.samples,
            posterior.layout.size * size,
            step * self._tokens(encoded) * per_token * size,
            posterior.device,
        )


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
) -> list[dict[str, Any]]:
    """The metrics on the test split, and on `oos_test` if there is one, of each saved point estimate, SWA and SWAG."""
    test = evaluator.encode(dataset.split("test"))
    outside = evaluator.encode(dataset.splits["oos_test"]) if "oos_test" in dataset.splits else None
    for encoded in filter(None, (test, outside)):
        evaluator.check_memory(posterior, encoded, sampling)
    labels = _labels(test)

    def row(name: str, samples: int, predict: Callable[[Encoded, str], Prediction]) -> dict[str, Any]:
        ood = predict(outside, f"{name}, out of distribution") if outside else None
        return {"name": name, "samples": samples, **report(predict(test, name), labels, ood)}

    table = []
    for part, name in POINT_ESTIMATES.items():
        if (Path(folder) / part).is_dir():
            set_peft_model_state_dict(evaluator.model, load_peft_weights(str(Path(folder) / part)))
            table.append(row(name, 1, evaluator.point))
    posterior.load_mean()
    table.append(row("SWA (mean)", 1, evaluator.point))
    name = f"SWAG, K={sampling.samples}"
    table.append(row(name, sampling.samples, lambda e, title: evaluator.sampled(posterior, e, sampling, title)))
    return table


def _labels(encoded: Encoded) -> Tensor:
    return torch.tensor([example["label"] for example in encoded])


def _width(encoded: Encoded) -> int:
    return max(len(example["input_ids"]) for example in encoded)
