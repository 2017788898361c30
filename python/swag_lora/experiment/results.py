"""`results.json`: the metrics of a run, of each seed and over the seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import metrics
from .methods import POOLED, TITLES
from .stored import TEST, Run, Split, Stored

PER_CLASS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": metrics.accuracy,
    "nll": metrics.nll,
    "ece": metrics.ece,
    "ece_20": lambda log_probs, labels: metrics.ece(log_probs, labels, 20),
    "brier": metrics.brier,
    "mcc": metrics.mcc,
    "aurc": metrics.aurc,
}
"""Of a test set with labels. `ece` has 15 bins, as everywhere in this package."""

_OPTIONAL = ("model", "recipe", "samples", "scale", "rank", "environment")
_TOLD = ("samples", "members", "passes", "seconds", "scale", "rank", "temperature", "curve")


def summarise(run_folder: str | Path, partial: bool = False) -> dict[str, Any]:
    """All metrics of a run's predictions.

    ::

        {"format": 1, "data", "ood", "seeds", "model", ...: as in experiment.json,
         "missing": [files],                                    empty for a finished run
         "selection": {"0": selection.json, ...},
         "methods": {METHOD: {"title", "pooled": over all seeds,
                              "seeds": {"0" | "all": {"samples", "members", "passes", "seconds": {SPLIT: s}, "scale",
                                                      "rank", "temperature", "curve",
                                                      "splits": {SPLIT: {METRIC: value}}}},
                              "summary": {SPLIT: {METRIC: {"mean", "std_error", "values"}}}}}}

    METRIC is one of `PER_CLASS` on "test" and on labelled out-of-distribution tasks; `ood_auroc_entropy` and
    `ood_aupr_entropy` on out-of-distribution tasks (these are the positives, against "test"), and
    `ood_auroc_mutual_information` and `ood_aupr_mutual_information` where more than one sample was averaged;
    `seconds_per_1000` examples everywhere. `std_error` is sqrt(sum (x - mean)^2 / (n - 1) / n) over the n seeds, None
    of a single value. With `partial` a run that is not finished is summarised over what is there.

    Raises:
        FileNotFoundError: no run there, or predictions are missing (all are named) and not `partial`.
        ValueError: a file is damaged, or methods were given different examples.
    """
    run = Run.open(run_folder)
    if not partial:
        run.check_finished()
    examples = Examples(run)
    methods = {}
    for method in run.methods:
        seeds = {}
        for seed, stored in run.predictions(method):
            examples.check(stored)
            seeds[seed] = {key: stored.told[key] for key in _TOLD} | {"splits": _splits(run, stored)}
        if seeds:
            methods[method] = {
                "title": TITLES[method],
                "pooled": method in POOLED,
                "seeds": seeds,
                "summary": _summary([values["splits"] for values in seeds.values()]),
            }
    if not methods:
        raise FileNotFoundError(f"the run {run.folder} has no predictions yet")
    return {
        "format": 1,
        "data": run.settings["data"],
        "ood": run.settings["ood"],
        "seeds": run.seeds,
        **{key: run.settings[key] for key in _OPTIONAL if key in run.settings},
        "missing": [str(path.relative_to(run.folder)) for path in run.missing()],
        "selection": run.selections(),
        "methods": methods,
    }


class Examples:
    """Refuses predictions for other examples than those of the first file, or in another order."""

    def __init__(self, run: Run) -> None:
        self._splits = list(run.sizes)
        self._first: Stored | None = None

    def check(self, stored: Stored) -> None:
        """
        Raises:
            ValueError: naming both files.
        """
        if self._first is None:
            self._first = stored
        for split in self._splits:
            same = stored.told["examples"].get(split) == self._first.told["examples"].get(split)
            if not same or not stored.splits[split].labels.equal(self._first.splits[split].labels):
                raise ValueError(
                    f"{stored.path} and {self._first.path} are predictions for different examples of {split}; "
                    "remove the older file and start the run again"
                )


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error sqrt(sum (x - mean)^2 / (n - 1) / n); None of one value, or of infinite ones."""
    n = len(values)
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else sum(values) / n
    if n < 2 or not math.isfinite(mean):
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)


def _splits(run: Run, stored: Stored) -> dict[str, dict[str, float]]:
    inside, result = stored.splits[TEST], {}
    for name, split in stored.splits.items():
        values: dict[str, float] = {}
        try:
            if name in run.labelled:
                values |= {key: metric(split.log_probs, split.labels) for key, metric in PER_CLASS.items()}
        except ValueError as error:
            raise ValueError(f"the predictions for {name} in {stored.path} are damaged: {error}") from None
        if name != TEST:
            values |= _detection(inside, split, stored.told["samples"])
        values["seconds_per_1000"] = 1000 * stored.told["seconds"][name] / len(split.labels)
        result[name] = values
    return result


def _detection(inside: Split, outside: Split, samples: int) -> dict[str, float]:
    values = {}
    for score in ("entropy", "mutual_information")[: 1 + (samples > 1)]:
        pair = getattr(inside, score), getattr(outside, score)
        values[f"ood_auroc_{score}"] = metrics.ood_auroc(*pair)
        values[f"ood_aupr_{score}"] = metrics.ood_aupr(*pair)
    return values


def _summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for split, of_first in runs[0].items():
        result[split] = {}
        for key in (key for key in of_first if all(key in run[split] for run in runs)):
            values = [run[split][key] for run in runs]
            mean, error = mean_and_error(values)
            result[split][key] = {"mean": mean, "std_error": error, "values": values}
    return result
