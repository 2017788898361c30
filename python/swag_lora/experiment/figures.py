"""The figures of a run: what its predictions are worth, and what was averaged and chosen."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from . import curves, style
from .methods import TITLES
from .stored import TEST, Run, Split

_BINS = 15
_ENTROPY_BINS = 20


def draw(run: Run, results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all figures of a run into `folder` as PNG and return their paths; those without data are left out.

    `results` is what `results.summarise` made of the same run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    style.check()
    folder.mkdir(parents=True, exist_ok=True)
    splits = _splits_of(run, results)
    with style.context():
        drawn = _draw(splits, results)
        return [style.save(figure, folder / f"{name}.png") for name, figure in drawn.items()]


def reliability(splits: Mapping[str, Mapping[str, Sequence[Split]]], results: Mapping[str, Any]) -> Any:
    """Accuracy against confidence in 15 bins, and under it how many examples each bin has, a pair of axes a method.

    The seeds' predictions are taken together; counts are the mean over the seeds.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    across = style.columns_of(len(splits))
    down = -(-len(splits) // across)
    figure = style.new_figure(max(2.6 * across, 4.6) + 0.3, 3.5 * down + 0.5)
    axes = figure.subplots(2 * down, across, squeeze=False, height_ratios=[3, 1] * down, sharex=True)
    most = 1.0
    for place, (method, of_method) in enumerate(splits.items()):
        upper, lower = axes[2 * (place // across)][place % across], axes[2 * (place // across) + 1][place % across]
        counts, accuracy, confidence = _reliability(of_method[TEST])
        most = max(most, float(counts.max()))
        _bars(upper, counts, accuracy, confidence)
        _counts(lower, counts)
        ece = results["methods"][method]["summary"][TEST]["ece"]["mean"]
        upper.set_title(f"{TITLES[method]}\nECE-15 {ece:.3f}")
        if place % across == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("examples")
        if place + across >= len(splits):
            lower.set_xlabel("confidence")
            lower.tick_params(labelbottom=True)
    for row in axes[1::2]:
        for axis in row:
            axis.set_ylim(0, 1.1 * most)
    for place in range(len(splits), across * down):
        for row in (0, 1):
            axes[2 * (place // across) + row][place % across].remove()
    handles = {
        "accuracy": Patch(facecolor="0.55", edgecolor="black", linewidth=0.6),
        "gap to confidence": Patch(facecolor="white", edgecolor="#b2182b", hatch="////", linewidth=0.6),
        "accuracy = confidence": Line2D([], [], **_DIAGONAL),
    }
    style.legend_below(figure, handles)
    return figure


def entropy(splits: Mapping[str, Mapping[str, Sequence[Split]]], name: str) -> Any:
    """Histograms of the predictive entropy on the test split and on the task `name`, axes for each method."""
    figure, axes = style.panels(len(splits), height=2.1)
    across = style.columns_of(len(splits))
    classes = max(split.log_probs.shape[1] for of in splits.values() for part in (TEST, name) for split in of[part])
    edges = torch.linspace(0, math.log(max(classes, 2)), _ENTROPY_BINS + 1, dtype=torch.float64)
    lines: dict[str, Any] = {}
    task = name.replace("$", r"\$")  # a pair of them would be read as mathematics
    shown = {
        "test": (TEST, {"color": "#053061", "linestyle": "-", "linewidth": 1.6}),
        f"out of distribution: {task}": (name, {"color": "#d6604d", "linestyle": (0, (4, 1.5)), "linewidth": 1.6}),
    }
    highest = 0.0
    for place, (axis, (method, of_method)) in enumerate(zip(axes, splits.items(), strict=True)):
        for label, (part, look) in shown.items():
            values = torch.cat([split.entropy for split in of_method[part]]).double().clamp(edges[0], edges[-1])
            percent = 100 * torch.histogram(values, edges).hist / len(values)
            highest = max(highest, float(percent.max()))
            lines[label] = axis.stairs(percent.numpy(), edges.numpy(), **look)
        axis.set_title(TITLES[method])
        axis.set_xlim(0, float(edges[-1]))
        style.grid(axis)
        if place % across == 0:
            axis.set_ylabel("examples, % per bin")
        if place + across >= len(splits):
            axis.set_xlabel("predictive entropy, nats")
    for axis in axes:
        axis.set_ylim(0, 1.05 * highest)
    style.legend_below(figure, lines)
    return figure


def risk_coverage(splits: Mapping[str, Mapping[str, Sequence[Split]]], results: Mapping[str, Any]) -> Any:
    """The error rate among the most confident examples against their share of the test split, the mean over seeds."""
    figure, (axis,) = style.panels(1, width=6, height=3.8)
    lines: dict[str, Any] = {}
    for method, of_method in splits.items():
        risks = [metrics.risk_coverage(split.log_probs, split.labels) for split in of_method[TEST]]
        risk = 100 * torch.stack(risks).mean(0)
        coverage = 100 * torch.arange(1, len(risk) + 1, dtype=torch.float64) / len(risk)
        first = len(risk) // 50  # the error rate of a handful of examples is noise that hides the lines
        label = f"{TITLES[method]} (AURC {results['methods'][method]['summary'][TEST]['aurc']['mean']:.3f})"
        (lines[label],) = axis.plot(
            coverage[first:], risk[first:], **style.look(method), markevery=(0.05 * (1 + len(lines) / 3), 0.15)
        )
    axis.set_xlabel("coverage: most confident test examples, %")
    axis.set_ylabel("errors among them, %")
    axis.set_xlim(0, 100)
    axis.set_ylim(bottom=0)
    style.grid(axis)
    style.legend_below(figure, lines)
    return figure


def _draw(splits: Mapping[str, Mapping[str, Sequence[Split]]], results: Mapping[str, Any]) -> dict[str, Any]:
    drawn = {"samples": curves.against_samples(results), "scale": curves.against_scale(results)}
    if splits:
        drawn["reliability"] = reliability(splits, results)
        drawn["risk-coverage"] = risk_coverage(splits, results)
        for place, task in enumerate(results["ood"]):
            name = "entropy-" + re.sub(r"[^\w.-]+", "-", task["name"]).strip("-")[:80]
            drawn[f"{name}-{place}" if name in drawn else name] = entropy(splits, task["name"])
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _splits_of(run: Run, results: Mapping[str, Any]) -> dict[str, dict[str, list[Split]]]:
    """The predictions of the methods in `style.MAIN`: by test set, of each seed."""
    found = {}
    for method in style.MAIN:
        if method in results["methods"]:
            stored = [prediction for _, prediction in run.predictions(method)]
            found[method] = {name: [prediction.splits[name] for prediction in stored] for name in run.sizes}
    return found


def _reliability(splits: Sequence[Split]) -> tuple[Tensor, Tensor, Tensor]:
    """Examples a seed, accuracy and mean confidence of each bin; NaN of an empty one."""
    binned = [metrics.confidence_bins(split.log_probs, split.labels, _BINS) for split in splits]
    bins, correct, confidence = (torch.cat(parts) for parts in zip(*binned, strict=True))
    counts = torch.bincount(bins, minlength=_BINS).double()
    accuracy = torch.bincount(bins, correct, minlength=_BINS) / counts
    return counts / len(splits), accuracy, torch.bincount(bins, confidence, minlength=_BINS) / counts


def _bars(axis: Any, counts: Tensor, accuracy: Tensor, confidence: Tensor) -> None:
    width = 1 / _BINS
    filled = counts > 0
    centres = ((torch.arange(_BINS) + 0.5) * width)[filled].numpy()
    accuracy, confidence = accuracy[filled], confidence[filled]
    gap, bottom = (confidence - accuracy).abs().numpy(), torch.minimum(confidence, accuracy).numpy()
    axis.bar(centres, accuracy.numpy(), width, color="0.55", edgecolor="black", linewidth=0.6)
    axis.bar(centres, gap, width, bottom, facecolor="none", edgecolor="#b2182b", hatch="////", linewidth=0.6)
    axis.plot([0, 1], [0, 1], **_DIAGONAL)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    style.grid(axis)


def _counts(axis: Any, counts: Tensor) -> None:
    width = 1 / _BINS
    centres = ((torch.arange(_BINS) + 0.5) * width).numpy()
    axis.bar(centres, counts.numpy(), width, color="0.8", edgecolor="black", linewidth=0.6)
    style.grid(axis)


_DIAGONAL: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": (0, (4, 3))}
