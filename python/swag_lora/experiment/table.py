"""The tables of a run: Markdown for `table.md`, and the same for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .methods import TITLES
from .stored import TEST

_HEADERS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE-15",
    "ece_20": "ECE-20",
    "brier": "Brier",
    "mcc": "MCC",
    "ood_auroc_entropy": "AUROC, entropy",
    "ood_aupr_entropy": "AUPR, entropy",
    "ood_auroc_mutual_information": "AUROC, MI",
    "ood_aupr_mutual_information": "AUPR, MI",
    "seconds_per_1000": "s / 1000",
    "passes": "passes",
}
_LOWER_IS_BETTER = {"nll", "ece", "ece_20", "brier"}
_COST = {"seconds_per_1000", "passes"}


@dataclass(frozen=True)
class Cell:
    """A mean and its standard error over seeds as they are printed; empty where there is none."""

    mean: str = ""
    error: str = ""
    best: bool = False

    @property
    def plain(self) -> str:
        return f"{self.mean} ± {self.error}" if self.error else self.mean

    @property
    def markdown(self) -> str:
        mean = f"**{self.mean}**" if self.best else self.mean
        return f"{mean} ± {self.error}" if self.error else mean


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of `results.summarise` as Markdown with aligned columns: "test", then each out-of-distribution task.

    Mean ± standard error over seeds. The best mean of a metric is bold, with all that are printed alike.
    """
    parts = [f"# {_title(results)}", _about(results)]
    for split in _splits(results):
        parts += [f"## {_heading(results, split)}", _markdown(*cells(results, split))]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes(results))]) + "\n"


def terminal(results: Mapping[str, Any]) -> list[Table]:
    """One table for each test set, of the columns that fit a terminal: no standard errors, ECE-20 or AUPR."""
    left_out = {"ece_20", "ood_aupr_entropy", "ood_aupr_mutual_information"}
    tables = []
    for split in _splits(results):
        columns, rows = cells(results, split)
        kept = [key for key in columns if key not in left_out]
        heading = Text(_heading(results, split))
        table = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True, title=heading, title_justify="left")
        table.add_column("")
        for key in kept:
            table.add_column(_HEADERS[key].replace(", ", "\n"), justify="right", no_wrap=True)
        for title, row in rows:
            table.add_row(Text(title), *(Text(row[key].mean, style="bold" if row[key].best else "") for key in kept))
        tables.append(table)
    return tables


def cells(results: Mapping[str, Any], split: str) -> tuple[list[str], list[tuple[str, dict[str, Cell]]]]:
    """The metrics of one test set that some method has, and for each method its title and their cells."""
    methods = _methods(results)
    values = [_values(method, split) for method in methods]
    columns = [key for key in _HEADERS if any(key in row for row in values)]
    best = {key: _best(key, [row[key]["mean"] for row in values if key in row]) for key in columns}
    rows = []
    for method, row in zip(methods, values, strict=True):
        shown = {key: _cell(key, row[key], best[key]) if key in row else Cell() for key in columns}
        rows.append((method["title"], shown))
    return columns, rows


def notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables has to know: seeds, samples, scales, temperatures, what is missing."""
    methods, seeds = _methods(results), results["seeds"]
    listed = ", ".join(map(str, seeds))
    if len(seeds) > 1:
        lines = [f"Mean ± standard error over {len(seeds)} seeds ({listed})."]
        pooled = [method["title"] for method in methods if method["pooled"]]
        if pooled:
            lines.append(f"One value over all seeds, without an error: {' · '.join(pooled)}.")
    else:
        lines = [f"One seed ({listed}): no standard errors."]
    samples = {m["title"]: _samples(m) for m in methods}
    lines.append("Samples averaged: " + _grouped({title: text for title, text in samples.items() if text != "1"}) + ".")
    for key, name in (("scale", "Sample scale"), ("rank", "Deviations used"), ("temperature", "Temperature")):
        chosen = {m["title"]: _chosen(m, key) for m in methods}
        chosen = {title: text for title, text in chosen.items() if text}
        if chosen:
            lines.append(f"{name}: {_grouped(chosen)}.")
    if any("ood_auroc_entropy" in row for m in methods for row in m["summary"].values()):
        lines.append(
            "AUROC and AUPR: out-of-distribution examples (the positives) against the test split, by predictive entropy "
            "and by mutual information (MI)."
        )
    if "arithmetic" in results.get("environment", {}):
        environment = results["environment"]
        lines.append(
            f"Trained and predicted in {environment['arithmetic']} on {environment['device']}, torch {environment['torch']}."
        )
    lines.append("s / 1000: seconds of prediction for 1000 examples; passes: forward passes an example.")
    if results["missing"]:
        lines.append(f"NOT FINISHED, without {', '.join(results['missing'])}.")
    return [line for line in lines if not line.endswith(": .")]


def _methods(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """In the order of tables, which JSON does not keep."""
    return [results["methods"][method] for method in TITLES if method in results["methods"]]


def _values(method: Mapping[str, Any], split: str) -> dict[str, dict[str, Any]]:
    passes = [seed["passes"] for seed in method["seeds"].values()]
    return method["summary"][split] | {"passes": {"mean": sum(passes) / len(passes), "std_error": None}}


def _cell(key: str, value: Mapping[str, Any], best: str | None) -> Cell:
    mean = _number(key, value["mean"])
    error = value["std_error"]
    shown = "" if error is None or key in _COST else _number(key, error)
    return Cell(mean, shown, mean == best)


def _best(key: str, means: Sequence[float]) -> str | None:
    if key in _COST or len(means) < 2:
        return None
    return _number(key, min(means) if key in _LOWER_IS_BETTER else max(means))


def _number(key: str, value: float) -> str:
    if key == "passes":
        return f"{value:.4g}"
    digits = 2 if key == "seconds_per_1000" else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0 makes 0.000 of -0.000


def _markdown(columns: Sequence[str], rows: Iterable[tuple[str, Mapping[str, Cell]]]) -> str:
    grid = [["", *(_HEADERS[key] for key in columns)]]
    grid += [[title, *(row[key].markdown for key in columns)] for title, row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    lines = [_line([grid[0][0].ljust(widths[0]), *map(str.rjust, grid[0][1:], widths[1:])])]
    lines.append(_line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]))
    lines += [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in grid[1:]]
    return "\n".join(lines)


def _line(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _splits(results: Mapping[str, Any]) -> list[str]:
    return [TEST, *(task["name"] for task in results["ood"])]


def _title(results: Mapping[str, Any]) -> str:
    model = str(results.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
    return f"{model} on {results['data']['name']}" if model else str(results["data"]["name"])


def _about(results: Mapping[str, Any]) -> str:
    sizes = results["data"]["splits"]
    ordered = sorted(sizes, key=lambda name: (name == TEST, -sizes[name], name))
    return ", ".join(f"{sizes[name]:,} {name}" for name in ordered) + " examples."


def _heading(results: Mapping[str, Any], split: str) -> str:
    if split == TEST:
        return f"Test, {results['data']['splits'][TEST]:,} examples"
    count = next(task["examples"] for task in results["ood"] if task["name"] == split)
    return f"Out of distribution: {split}, {count:,} examples"


def _samples(method: Mapping[str, Any]) -> str:
    seed = next(iter(method["seeds"].values()))
    total, members = seed["samples"], seed["members"]
    return f"{members} × {total // members} = {total}" if 1 < members < total else str(total)


def _chosen(method: Mapping[str, Any], key: str) -> str:
    values = [seed[key] for seed in method["seeds"].values() if seed[key] is not None]
    values = values[:1] if len(set(values)) == 1 else values
    return ", ".join(f"{value:.4g}" for value in values)


def _grouped(texts: Mapping[str, str]) -> str:
    """Titles that share a text are named together."""
    titles: dict[str, list[str]] = {}
    for title, text in texts.items():
        titles.setdefault(text, []).append(title)
    return "; ".join(f"{text} ({' · '.join(names)})" for text, names in titles.items())
