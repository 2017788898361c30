"""How the figures of a run look: one style for a method in all of them, told apart without colours."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..files import write_atomic

_LOOKS: dict[str, tuple[str, Any, str]] = {
    "map-last": ("o", "-", "#b2182b"),
    "map-best": ("s", "--", "#e08214"),
    "temperature": ("^", (0, (1, 1)), "#8c510a"),
    "swa": ("v", (0, (5, 1, 1, 1, 1, 1)), "#5aae61"),
    "swag-diagonal": ("P", (0, (3, 1, 1, 1)), "#4393c3"),
    "swag": ("D", "-", "#053061"),
    "mc-dropout": ("X", ":", "#8073ac"),
    "ensemble": ("h", "-.", "#35978f"),
    "ensemble-best": ("*", (0, (5, 5)), "#a6761d"),
    "multiswa": ("<", (0, (1, 3)), "#1b7837"),
    "multiswag": ("p", (0, (8, 2)), "#40004b"),
}
"""Method to marker, dashes and colour; no two share a pair of the first two, so that a print in grey can be read."""

MAIN = ("map-last", "map-best", "swag", "mc-dropout", "ensemble", "multiswag")
"""The methods of the figures in which all would cover one another."""

_RC: dict[Any, float] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}
_CHARACTER = 0.58  # em, a generous mean of the sans serif


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def check() -> None:
    """
    Raises:
        ImportError: matplotlib is not installed.
    """
    if not available():
        raise ImportError("the figures need matplotlib: pip install 'swag-kernels[plots]'")


def look(method: str, markers: bool = True) -> dict[str, Any]:
    """The keyword arguments of a line of this method; without markers for lines of many points."""
    marker, dashes, color = _LOOKS[method]
    shown = {"linestyle": dashes, "color": color, "linewidth": 1.5}
    return shown | ({"marker": marker, "markersize": 5, "markeredgewidth": 0} if markers else {})


def context() -> AbstractContextManager[None]:
    """The sizes of text, while figures are made and saved."""
    import matplotlib

    return matplotlib.rc_context(_RC)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, away from pyplot and its state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.06)
    return figure


def columns_of(count: int) -> int:
    """How many panels stand side by side: three at the most, and two of four."""
    return 2 if count == 4 else min(count, 3)


def panels(count: int, width: float = 2.6, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure of `count` axes, and the axes."""
    across = columns_of(count)
    down = -(-count // across)
    figure = new_figure(max(width * across, 4.2) + 0.3, height * down + 0.6)
    axes = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def grid(axis: Any) -> None:
    axis.grid(True, which="major", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)


def legend_below(figure: Any, lines: dict[str, Any], columns: int = 4) -> None:
    """One legend for all axes, under them, in at most so many columns and as wide as the figure at most."""
    em = _RC["legend.fontsize"] / 72
    room = figure.get_figwidth() - 2 * em
    handle = 6.5 * em
    widest = max(map(len, lines)) * _CHARACTER * em
    columns = max(1, min(columns, len(lines), int(room / (handle + widest))))
    figure.legend(
        list(lines.values()),
        [textwrap.fill(label, int((room / columns - handle) / (_CHARACTER * em))) for label in lines],
        loc="outside lower center",
        ncols=columns,
        handlelength=4,
        frameon=False,
    )


def powers_of_two(axis: Any, values: Sequence[float], most: int = 8) -> None:
    """A logarithmic axis with ticks at `values`, thinned out where there are many; 0 stands one step below the rest."""
    values = sorted(set(values))
    ticks = values[:: -(-len(values) // most)]
    axis.set_xscale("log", base=2)
    axis.set_xticks([above_zero(x, values) for x in ticks], [f"{x:g}" for x in ticks])
    axis.minorticks_off()


def above_zero(x: float, values: Sequence[float]) -> float:
    """Where `x` stands on a logarithmic axis of `values`."""
    return x if x > 0 else min((v for v in values if v > 0), default=1.0) / 2


def save(figure: Any, path: Path) -> Path:
    """Write the figure, atomically."""
    write_atomic(path, figure.savefig)
    return path
