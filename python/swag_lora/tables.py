"""Results for people (a table in the terminal) and for machines (JSON)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .files import write_text

_COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE-15",
    "brier": "Brier",
    "ood_auroc_entropy": "OOD AUROC",
    "seconds_per_1000": "s / 1000",
}
_HIGHER_IS_BETTER = {"accuracy", "ood_auroc_entropy"}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a row, one column for each metric that some row has; the best value of a metric is bold."""
    columns = {key: header for key, header in _COLUMNS.items() if any(key in row for row in rows)}
    best = {key: _best(key, rows) for key in columns if key != "seconds_per_1000"}
    result = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)  # the demo's fits a terminal of 80 columns
    result.add_column("", no_wrap=True)
    for header in columns.values():
        result.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [_cell(key, row.get(key), best.get(key)) for key in columns]
        result.add_row(Text(row["name"]), *cells)
    return result


def show(result: Mapping[str, Any], title: str, caption: str, target: str | None) -> None:
    """Print the table of `result["rows"]` between its title and caption, and write `result` as JSON to `target`.

    With JSON on the standard output the table goes to the standard error.
    """
    console = Console(stderr=target == "-", highlight=False, markup=False)
    console.print(title, soft_wrap=True)
    console.print(table(result["rows"]))
    console.print(caption, soft_wrap=True)
    write_json(result, target)


def show_rows(computed: Mapping[str, int]) -> None:
    """Print the rows that each layer computed, on the standard error: the most of any of its modules."""
    layers: dict[str, int] = {}
    for name, rows in computed.items():
        found = re.match(r"(.*?\.\d+)(?:\.|$)", name)
        layer = found[1] if found else name
        layers[layer] = max(rows, layers.get(layer, 0))
    result = Table("layer", box=SIMPLE_HEAD, show_edge=False)
    result.add_column("rows computed", justify="right")
    for layer, rows in layers.items():
        result.add_row(Text(layer.removeprefix("base_model.model.")), f"{rows:,}")
    Console(stderr=True, highlight=False).print(result)


def write_json(result: Mapping[str, Any], target: str | None) -> None:
    """Write `result` to the file `target`, to the standard output for "-", nowhere for None."""
    text = json.dumps(result, indent=1, sort_keys=True) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif target is not None:
        write_text(target, text)


def _best(key: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    values = [row[key] for row in rows if key in row]
    if len(values) < 2:
        return None
    return _number(key, max(values) if key in _HIGHER_IS_BETTER else min(values))


def _cell(key: str, value: float | None, best: str | None) -> Text:
    text = "" if value is None else _number(key, value)
    return Text(text, style="bold" if text and text == best else "")


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "seconds_per_1000" else f"{value:.3f}"
