"""One method's predictions for every split, as a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..evaluator import labels_of
from ..files import write_atomic
from ..metrics import accuracy, ece, nll
from ..prediction import Prediction
from ..temperature import tempered
from .methods import TITLES
from .sources import TEST
from .workbench import Averaged, Workbench

_FIELDS = ("log_probs", "entropy", "expected_entropy", "mutual_information", "disagreement", "std_error")
_CURVE = {"accuracy": accuracy, "nll": nll, "ece": ece}


def predict(bench: Workbench, method: str, seed: int | None, path: Path) -> None:
    """Predict every split with a method and write the file that `stored.Run` reads."""
    with bench.arithmetic():
        tensors, told = _predictions(bench, method, seed)
    _write(path, tensors, told)


def _predictions(bench: Workbench, method: str, seed: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    averaged = bench.averaged(method, seed)
    tensors: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    curve = None
    for split in bench.sources.splits():
        encoded = bench.encoded(split)
        labels = labels_of(encoded)
        counts = averaged.counts if split == TEST else ()
        begin = time.perf_counter()
        found = _predict(bench, averaged, split, counts, f"{TITLES[method]}, {split}")
        seconds[split] = time.perf_counter() - begin
        if counts:
            curve = {"samples": list(counts)} | {
                name: [metric(one.log_probs, labels) for one in found] for name, metric in _CURVE.items()
            }
        tensors |= {f"{split}/{name}": getattr(found[-1], name).float() for name in _FIELDS}
        tensors[f"{split}/labels"] = labels
    told = {
        "method": method,
        "seed": seed,
        "samples": averaged.sampling.samples,
        "members": averaged.members,
        "passes": averaged.sampling.samples,
        "seconds": seconds,
        "scale": averaged.scale,
        "rank": averaged.rank,
        "temperature": averaged.temperature,
        "examples": {split: value for split, value in bench.sources.fingerprints().items() if split in seconds},
        "curve": curve,
    }
    return tensors, told


def _predict(bench: Workbench, averaged: Averaged, split: str, counts: tuple[int, ...], title: str) -> list[Prediction]:
    """The predictions at each of the counts; without any, that of all samples."""
    evaluator, encoded = bench.evaluator, bench.encoded(split)
    predictor = evaluator.predictor(averaged.posterior, encoded, averaged.sampling)
    if counts:
        return evaluator.predict_each(encoded, lambda batch: predictor.at(batch, counts), title)
    prediction = evaluator.predict(encoded, predictor, title)
    return [prediction if averaged.temperature is None else tempered(prediction, averaged.temperature)]


def _write(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_atomic(path, lambda fresh: save_file(whole, fresh, {"json": json.dumps(told)}))
