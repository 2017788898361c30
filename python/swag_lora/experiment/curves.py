"""The figures of a metric against what is chosen: the number of samples, and the sample scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import style
from .methods import TITLES
from .results import mean_and_error
from .stored import TEST

_PANELS = {"nll": "NLL, nats", "ece": "ECE-15", "accuracy": "accuracy"}
BESIDE = ("map-last", "map-best", "swa")
_SEEDS = (("o", "-"), ("s", "--"), ("^", "-."), ("v", ":"), ("D", (0, (5, 1, 1, 1, 1, 1))), ("P", (0, (8, 2))))


def against_samples(results: Mapping[str, Any]) -> Any:
    """Test NLL, ECE-15 and accuracy against the samples averaged, with standard errors over seeds; None without curves.

    Point estimates are level lines without markers.
    """
    curves = {method: _mean_curve(results["methods"][method]) for method in TITLES if method in results["methods"]}
    curves = {method: curve for method, curve in curves.items() if curve}
    if not curves:
        return None
    figure, axes = style.panels(len(_PANELS), width=2.9, height=2.7)
    lines: dict[str, Any] = {}
    for axis, (key, label) in zip(axes, _PANELS.items(), strict=True):
        for method in BESIDE:
            if method in results["methods"]:
                level = results["methods"][method]["summary"][TEST][key]["mean"]
                lines[TITLES[method]] = axis.axhline(level, **style.look(method, markers=False) | {"linewidth": 1.0})
        for method, curve in curves.items():
            counts = sorted(curve)
            points = [mean_and_error([values[key] for values in curve[count]]) for count in counts]
            errors = [error or 0.0 for _, error in points]
            lines[TITLES[method]] = axis.errorbar(
                counts, [mean for mean, _ in points], errors if any(errors) else None, capsize=2, elinewidth=0.8,
                **style.look(method),
            )  # fmt: skip
        style.powers_of_two(axis, [count for curve in curves.values() for count in curve])
        axis.set_xlabel("samples averaged, K")
        axis.set_ylabel(f"test {label}")
        style.grid(axis)
    style.legend_below(figure, lines)
    return figure


def against_scale(results: Mapping[str, Any]) -> Any:
    """Validation NLL, ECE-15 and accuracy against the sample scale, a line a seed, the chosen scale marked.

    None where no seed has a curve.
    """
    from matplotlib.lines import Line2D

    selections = {seed: chosen for seed, chosen in results["selection"].items() if chosen.get("scales")}
    if not selections:
        return None
    figure, axes = style.panels(len(_PANELS), width=2.9, height=2.7)
    scales = sorted({scale for chosen in selections.values() for scale in chosen["scales"]})
    lines: dict[str, Any] = {}
    for axis, (key, label) in zip(axes, _PANELS.items(), strict=True):
        for place, (seed, chosen) in enumerate(selections.items()):
            marker, dashes = _SEEDS[place % len(_SEEDS)]
            shade = str(0.65 * place / max(1, len(selections) - 1))
            where = [style.above_zero(scale, scales) for scale in chosen["scales"]]
            (lines[f"seed {seed}"],) = axis.plot(
                where, chosen[key], marker=marker, linestyle=dashes, color=shade, markersize=4, linewidth=1.2
            )
            if chosen["scale"] in chosen["scales"]:
                at = chosen["scales"].index(chosen["scale"])
                axis.plot(where[at], chosen[key][at], **_CHOSEN)
        style.powers_of_two(axis, scales)
        axis.set_xlabel("sample scale")
        axis.set_ylabel(f"validation {label}")
        style.grid(axis)
    style.legend_below(figure, lines | {"chosen": Line2D([], [], **_CHOSEN)})
    return figure


_CHOSEN: dict[str, Any] = {
    "marker": "o",
    "markersize": 11,
    "markerfacecolor": "none",
    "markeredgecolor": "#b2182b",
    "markeredgewidth": 1.6,
    "linestyle": "none",
    "zorder": 5,
}


def _mean_curve(method: Mapping[str, Any]) -> dict[int, list[dict[str, float]]]:
    """At each number of samples that all seeds have, the metrics of each seed."""
    curves = [seed["curve"] for seed in method["seeds"].values()]
    if not all(curves):
        return {}
    common = set.intersection(*(set(curve["samples"]) for curve in curves))
    return {
        count: [{key: curve[key][curve["samples"].index(count)] for key in _PANELS} for curve in curves]
        for count in sorted(common)
    }
