"""Several runs and methods beside one of them, with the uncertainty of each difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from torch import Tensor

from . import bootstrap
from .methods import TITLES
from .results import Examples, mean_and_error
from .stored import TEST, Run

_HEADERS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE-15", "brier": "Brier"}
CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class _Row:
    run: str
    method: str
    values: Mapping[str, Mapping[str, float]]  # by seed, then by metric
    scores: Mapping[str, bootstrap.Scores]  # by seed


def compare(
    run_folders: Sequence[str | Path],
    methods: Sequence[str] | None = None,
    reference: str = "map-last",
    seed: int = 0,
    resamples: int = 10_000,
) -> dict[str, Any]:
    """Accuracy, NLL, ECE-15 and Brier on the test split of methods of one or more runs, and their differences from one.

    A metric is the mean over a method's seeds. Its difference from `reference` in the first run has a 95 % percentile
    interval of a paired bootstrap (Efron and Tibshirani 1993, chapter 13): test examples are resampled, the same for
    both; where both have the same seeds, and more than one, the seeds too. The ECE of few examples is biased upwards,
    in a resample even more: the interval of a difference between two small ECEs may lie to one side of it. Few seeds
    say little about others: their resampling makes an interval wider, not as wide as the truth.

    Args:
        run_folders: finished runs, or runs that have these methods.
        methods: which, None for all that every run has; the reference is always there.
        reference: the method that the others are compared with, of the first run.
        seed: of the resampling.
        resamples: how many.

    Returns:
        ``{"reference": {"run", "method"}, "examples": n, "seed", "resamples", "confidence", "rows": [{"run", "method",
        "title", "seeds", "resampled": "examples" | "examples and seeds" | None for the reference, "metrics": {METRIC:
        {"value", "std_error", "difference", "low", "high"}}}]}``, the rows of one method in all runs together. The last
        three are missing for the reference; an interval is None where an NLL is infinite.

    Raises:
        FileNotFoundError: no run there, or a method's predictions are missing.
        ValueError: an unknown method, or one that a run has not; runs on other test examples; a damaged file.
    """
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}")
    runs = _open(run_folders)
    chosen = _methods(runs, methods, reference)
    rows = _read(runs, chosen)
    drawn = iter(bootstrap.resampled([scores for row in rows for scores in row.scores.values()], resamples, seed))
    by_row = [{key: next(drawn) for key in row.scores} for row in rows]
    at = next(i for i, row in enumerate(rows) if row.run == next(iter(runs)) and row.method == reference)
    shown = []
    for row, values in zip(rows, by_row, strict=True):
        metrics = {name: _metric(row, name) for name in bootstrap.METRICS}
        resampled = None
        if row is not rows[at]:
            paired = row.scores.keys() == rows[at].scores.keys() and len(row.scores) > 1
            resampled = "examples and seeds" if paired else "examples"
            picks = bootstrap.resampled_seeds(len(row.scores), resamples, seed) if paired else None
            for name, metric in metrics.items():
                metric |= _difference(
                    metric, _metric(rows[at], name), bootstrap.difference(values, by_row[at], name, picks)
                )
        shown.append(
            {
                "run": row.run,
                "method": row.method,
                "title": TITLES[row.method],
                "seeds": list(row.scores),
                "resampled": resampled,
                "metrics": metrics,
            }
        )
    return {
        "reference": {"run": rows[at].run, "method": reference},
        "examples": len(next(iter(rows[0].scores.values())).correct),
        "seed": seed,
        "resamples": resamples,
        "confidence": CONFIDENCE,
        "rows": shown,
    }


def table(comparison: Mapping[str, Any]) -> Table:
    """A row a method and run: each metric's value, and under it the interval of its difference from the reference.

    A difference whose interval leaves out zero is bold.
    """
    runs = list(dict.fromkeys(row["run"] for row in comparison["rows"]))
    result = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    result.add_column("")
    for name in bootstrap.METRICS:
        result.add_column(_HEADERS[name], justify="right", no_wrap=True)
    for row in comparison["rows"]:
        title = row["title"] if len(runs) == 1 else f"{row['title']}\n{row['run']}"
        result.add_row(Text(title), *(_cell(row["metrics"][name]) for name in bootstrap.METRICS))
    return result


def caption(comparison: Mapping[str, Any]) -> str:
    """What the table says, in words."""
    reference, rows = comparison["reference"], comparison["rows"]
    runs = {row["run"] for row in rows}
    name = TITLES[reference["method"]] + (f" of {reference['run']}" if len(runs) > 1 else "")
    both = [row["title"] for row in rows if row["resampled"] == "examples and seeds"]
    only = [row["title"] for row in rows if row["resampled"] == "examples"]
    resampled = f"examples and seeds for {_listed(both)}" if both else ""
    if only:
        resampled += ("; " if both else "") + (f"examples alone for {_listed(only)}" if both else "examples")
    return (
        f"{comparison['examples']:,} test examples. Under each value: its difference from {name} and the "
        f"{100 * comparison['confidence']:.0f} % interval of it, bold where that leaves out 0; paired bootstrap, "
        f"{comparison['resamples']:,} resamples of {resampled}."
    )


def _open(folders: Sequence[str | Path]) -> dict[str, Run]:
    """The runs by a name: the folder's own, or its whole path where two would be alike."""
    if not folders:
        raise ValueError("no runs to compare")
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    names = [path.name for path in paths]
    return {(path.name if names.count(path.name) == 1 else str(path)): Run.open(path) for path in paths}


def _methods(runs: Mapping[str, Run], methods: Sequence[str] | None, reference: str) -> list[str]:
    asked = [*(methods or ()), reference]
    unknown = [method for method in asked if method not in TITLES]
    if unknown:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(TITLES)}")
    first, *others = runs
    for name, run in runs.items():
        lacking = [m for m in (asked if name == first else methods or ()) if m not in run.methods]
        if lacking:
            raise ValueError(f"the run {run.folder} has no {', '.join(lacking)}; it has {', '.join(run.methods)}")
    if methods is None:
        asked += [m for m in runs[first].methods if all(m in runs[other].methods for other in others)]
    if len(runs) == 1 and set(asked) == {reference}:
        raise ValueError(f"nothing to compare with {reference}: give another method or another run")
    return [method for method in TITLES if method in asked]


def _read(runs: Mapping[str, Run], methods: Sequence[str]) -> list[_Row]:
    rows: list[_Row] = []
    told: dict[str, tuple[str | None, Tensor]] = {}
    examples = {name: Examples(run) for name, run in runs.items()}
    for method in methods:
        for name, run in runs.items():
            if method not in run.methods:
                continue
            missing = [str(path) for path in run.files(method).values() if not path.is_file()]
            if missing:
                raise FileNotFoundError(f"{', '.join(missing)} missing: start the run {run.folder} again to go on")
            values, scores = {}, {}
            for seed, stored in run.predictions(method):
                examples[name].check(stored)
                test = stored.splits[TEST]
                told.setdefault(name, (stored.told["examples"].get(TEST), test.labels))
                values[seed] = bootstrap.values(test.log_probs, test.labels)
                scores[seed] = bootstrap.Scores.of(test.log_probs, test.labels)
            rows.append(_Row(name, method, values, scores))
    first = next(iter(told))
    for name, (digest, labels) in told.items():
        if digest is None or digest != told[first][0] or not labels.equal(told[first][1]):
            raise ValueError(
                f"the runs {runs[first].folder} and {runs[name].folder} have different test examples: only predictions "
                "for the same examples can be compared in pairs"
            )
    return rows


def _metric(row: _Row, name: str) -> dict[str, Any]:
    mean, error = mean_and_error([values[name] for values in row.values.values()])
    return {"value": mean, "std_error": error}


def _difference(
    one: Mapping[str, Any], other: Mapping[str, Any], resampled: NDArray[np.float64]
) -> dict[str, float | None]:
    found = bootstrap.interval(resampled, CONFIDENCE)
    if found is None:
        return {"difference": None, "low": None, "high": None}
    return {"difference": one["value"] - other["value"], "low": found[0], "high": found[1]}


def _cell(metric: Mapping[str, Any]) -> Text:
    value = f"{metric['value']:.3f}"
    if metric.get("low") is None:
        return Text(value)
    low, high = metric["low"], metric["high"]
    style = "bold" if low > 0 or high < 0 else ""
    return Text(f"{value}\n").append(f"{metric['difference']:+.3f}\n{low:+.3f}, {high:+.3f}", style)


def _listed(titles: Sequence[str]) -> str:
    return " · ".join(dict.fromkeys(titles))
