"""What `swag-lora bench` writes: a row for each strategy and case, as a table and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .files import write_text

COLUMNS = {
    "model": "shape or folder",
    "layers": "transformer layers",
    "dtype": "of the model and its adapters",
    "device": "cpu or cuda",
    "strategy": "how the samples were averaged",
    "samples": "K",
    "batch": "B, examples in a batch",
    "seq": "T, tokens of an example",
    "status": "measured, skipped, or wrong (its probabilities differ from the loop's: not timed)",
    "reason": "why there is no time",
    "seconds": "of a batch, median",
    "seconds_low": "20 % quantile",
    "seconds_high": "80 % quantile",
    "examples_per_second": "B / seconds",
    "rounds": "of the alternating run",
    "setup_seconds": "before the first batch: drawing the samples if nobody has, loading or stacking them",
    "samples_per_pass": "samples in one forward pass",
    "checked_samples": "how many samples' average was compared with the prebuilt loop's; 0: draws its own, looked at alone",
    "error": "of log-probabilities in that comparison, RMS, as a fraction of the spread between samples",
    "x_published": "times as fast as the published loop, median of the rounds' ratios",
    "x_published_low": "20 % quantile",
    "x_published_high": "80 % quantile",
    "x_prebuilt": "times as fast as the prebuilt loop",
    "x_prebuilt_low": "20 % quantile",
    "x_prebuilt_high": "80 % quantile",
    "x_start": "late axis: times as fast as the same model with the axis from the start",
    "x_start_low": "20 % quantile",
    "x_start_high": "80 % quantile",
    "limit_seconds": "least time by the measured matrix product and copy",
    "limit_by": "which of the two sets it",
    "of_limit": "limit_seconds / seconds",
    "error_iid": "RMS error of K independent samples' averaged probabilities, on the smallest batch",
    "error_antithetic": "same, of antithetic pairs",
    "machine": "processor, threads, versions",
}
"""The columns of the CSV file, in their order."""

_AGAINST = {"x_published": "published", "x_prebuilt": "prebuilt", "x_start": "start"}


@dataclass
class Row:
    """One strategy in one case. The fields are `COLUMNS`; None where there is nothing to say."""

    model: str
    layers: int
    dtype: str
    device: str
    strategy: str
    samples: int
    batch: int
    seq: int
    machine: str
    status: str = "measured"
    reason: str = ""
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    examples_per_second: float | None = None
    rounds: int | None = None
    setup_seconds: float | None = None
    samples_per_pass: int | None = None
    checked_samples: int | None = None
    error: float | None = None
    x_published: float | None = None
    x_published_low: float | None = None
    x_published_high: float | None = None
    x_prebuilt: float | None = None
    x_prebuilt_low: float | None = None
    x_prebuilt_high: float | None = None
    x_start: float | None = None
    x_start_low: float | None = None
    x_start_high: float | None = None
    limit_seconds: float | None = None
    limit_by: str = ""
    of_limit: float | None = None
    error_iid: float | None = None
    error_antithetic: float | None = None

    def timed(self, seconds: Sequence[float], others: Mapping[str, Sequence[float]]) -> None:
        """Fill in the timing and, from the same rounds, the ratios to `others` (`x_published` and its like)."""
        self.seconds_low, self.seconds, self.seconds_high = quantiles(seconds)
        self.rounds = len(seconds)
        self.examples_per_second = self.batch / self.seconds
        if self.limit_seconds is not None:
            self.of_limit = self.limit_seconds / self.seconds
        for column, theirs in others.items():
            low, median, high = quantiles([b / a for a, b in zip(seconds, theirs, strict=True)])
            setattr(self, f"{column}_low", low)
            setattr(self, column, median)
            setattr(self, f"{column}_high", high)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20 % quantile, median, 80 % quantile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cut = statistics.quantiles(values, n=5, method="inclusive")
    return cut[0], statistics.median(values), cut[-1]


def csv_text(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in values.items()})
    return text.getvalue()


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write all rows, atomically."""
    write_text(path, csv_text(rows))


def report(rows: Sequence[Row]) -> Group:
    """A table for each case, a line for each strategy and each of its ratios; what has no time stands below it."""
    parts: list[RenderableType] = []
    for (samples, batch, seq), group in groupby(rows, key=lambda row: (row.samples, row.batch, row.seq)):
        case = list(group)
        parts.append(Text(f"K={samples}, batch {batch} × {seq} tokens", style="bold"))
        if any(row.seconds is not None for row in case):
            parts.append(_table([row for row in case if row.seconds is not None]))
        parts += [Text(f" {row.strategy}: {row.status}, {row.reason}") for row in case if row.seconds is None]
        parts.append(Text())
    return Group(*parts)


def _table(rows: Sequence[Row]) -> Table:
    """The fastest way to sample every layer is bold. Widths are the same in every case's table."""
    result = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    result.add_column("", width=22)
    for header, width in (("ms", 7), ("ex. / s", 7), ("× (20–80 %)", 16)):
        result.add_column(header, justify="right", no_wrap=True, min_width=width)
    result.add_column("against", no_wrap=True)
    result.add_column("limit", justify="right", no_wrap=True)
    fastest = min((row.seconds for row in rows if row.seconds and "late" not in row.strategy), default=None)
    for row in rows:
        assert row.seconds is not None
        ratios = [name for name in _AGAINST if getattr(row, name) is not None]
        result.add_row(
            row.strategy,
            Text(_number(row.seconds * 1e3), style="bold" if row.seconds == fastest else ""),
            _number(row.batch / row.seconds),
            "\n".join(_ratio(row, name) for name in ratios),
            "\n".join(_AGAINST[name] for name in ratios),
            "" if row.of_limit is None else f"{row.of_limit:.0%}",
        )
    return result


def error_table(errors: Sequence[Mapping[str, float | int | None]]) -> Table:
    """RMS errors against the number of samples."""
    result = Table(box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    for header in ("K", "error, independent", "error, antithetic"):
        result.add_column(header, justify="right", no_wrap=True)
    for entry in errors:
        cells = [entry["iid"], entry["antithetic"]]
        result.add_row(f"{entry['samples']}", *("" if cell is None else f"{cell:.2e}" for cell in cells))
    return result


def _ratio(row: Row, name: str) -> str:
    median, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return f"{_number(median, 3)} ({_number(low, 3)}–{_number(high, 3)})"


def _number(value: float, digits: int = 4) -> str:
    """So many digits, and never an exponent for what is large."""
    before = len(str(int(value))) if value >= 1 else 1
    return f"{value:.{max(0, digits - before)}f}" if value >= 0.01 else f"{value:.2g}"
