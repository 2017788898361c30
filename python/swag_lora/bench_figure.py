"""The figure of `swag-lora bench`: examples a second against K for each batch, and the error against K."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import check_parent
from .bench_error import ErrorPoint
from .bench_report import Row
from .files import write_atomic

FORMATS = (".png", ".pdf", ".svg")

# Every line differs from the others by its marker and its dashes, so that a print in grey can be read.
_STYLES = {
    "published loop": ("o", "-", "#b2182b"),
    "prebuilt loop": ("s", "--", "#e08214"),
    "PEFT adapter_names": ("^", "-.", "#8073ac"),
    "vmap": ("v", ":", "#542788"),
    "late axis": ("*", "-", "#1b7837"),
    "late axis, from start": ("P", "--", "#7fbf7b"),
}
_ONE_PASS = (("D", "-", "#053061"), ("X", "--", "#4393c3"), ("h", "-.", "#2166ac"), ("p", ":", "#92c5de"))


def check(path: str | Path) -> None:
    """Refuse a figure that could not be drawn, before hours of measuring.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file's ending is none of `FORMATS`.
        FileNotFoundError: no such folder.
    """
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the figure needs matplotlib: pip install 'swag-kernels[plots]'")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the figure {path} must end in {', '.join(FORMATS)}")
    check_parent(path, "--figure")


def draw(rows: Sequence[Row], errors: Sequence[ErrorPoint], path: str | Path) -> None:
    """Write the figure, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.batch, row.seq) for row in rows))
    panels = len(cases) + bool(errors)
    across = min(panels, 3)
    down = math.ceil(panels / across)
    figure = Figure(figsize=(4.2 * across + 0.4, 3.4 * down + 1.3), dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12)
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    lines: dict[str, Any] = {}
    for axis, case in zip(axes, cases, strict=False):
        lines = {**_throughput(axis, [row for row in rows if (row.batch, row.seq) == case]), **lines}
    if errors:
        _errors(axes[len(cases)], errors)
    for axis in axes[panels:]:
        axis.remove()
    first = rows[0]
    figure.suptitle(f"{first.model}, {first.layers} layers, {first.dtype}, {first.device}", fontsize=11)
    if lines:
        order = [name for name in dict.fromkeys(row.strategy for row in rows) if name in lines]
        order += [name for name in lines if name not in order]
        figure.legend(
            [lines[name] for name in order],
            order,
            loc="outside lower center",
            ncols=min(len(order), 3 if across > 1 else 2),
            fontsize=8,
            handlelength=4,
            frameon=False,
        )
    write_atomic(path, figure.savefig)


def _throughput(axis: Any, rows: Sequence[Row]) -> dict[str, Any]:
    lines = {}
    one_pass = iter(_ONE_PASS * len(rows))
    for name in dict.fromkeys(row.strategy for row in rows):
        marker, dashes, color = _STYLES.get(name) or next(one_pass)
        timed = [row for row in rows if row.strategy == name and row.examples_per_second is not None]
        if not timed:
            continue
        (lines[name],) = axis.plot(
            [row.samples for row in timed],
            [row.examples_per_second for row in timed],
            marker=marker,
            linestyle=dashes,
            color=color,
            markersize=5,
            linewidth=1.4,
            label=name,
        )
    limits = {
        row.samples: row.batch / row.limit_seconds for row in rows if row.limit_seconds and "late" not in row.strategy
    }
    if limits:
        (lines["physical limit, axis from the start"],) = axis.plot(
            list(limits), list(limits.values()), color="0.5", linewidth=1, linestyle=(0, (1, 3))
        )
    _scales(axis, [row.samples for row in rows])
    axis.set_title(f"batch {rows[0].batch} × {rows[0].seq} tokens", fontsize=10)
    axis.set_ylabel("throughput, examples / s")
    return lines


def _errors(axis: Any, errors: Sequence[ErrorPoint]) -> None:
    samples = [point.samples for point in errors]
    axis.plot(samples, [point.iid for point in errors], "o-", color="#b2182b", markersize=5, label="independent")
    pairs = [point for point in errors if point.antithetic is not None]
    axis.plot(
        [point.samples for point in pairs],
        [point.antithetic for point in pairs],
        "s--",
        color="#2166ac",
        markersize=5,
        label="antithetic pairs",
    )
    _scales(axis, samples)
    axis.set_title("error of the averaged probabilities", fontsize=10)
    axis.set_ylabel("RMS error, probability")
    axis.legend(loc="best", fontsize=8, handlelength=4, frameon=False)


def _scales(axis: Any, samples: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted(set(samples))
    axis.set_xticks(ticks, [str(k) for k in ticks], rotation=45 if len(ticks) > 6 else 0)
    axis.set_xlabel("samples averaged, K")
    axis.grid(True, which="major", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
