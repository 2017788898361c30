"""How much an average over S samples varies with the method by which they are drawn, on posteriors of real fine-tunes.

On the demo's posterior, and with CLINC150 in the environment on a second, see `fitted`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from rich.table import Table
from torch import Tensor

from fitted import SOURCES, fitted
from harness import Row
from swag_lora import SampledModel, SampledWeights, SwagPosterior
from swag_lora.evaluator import Evaluator

METHODS = ("iid", "antithetic", "antithetic+orthogonal")
SIZES = (2, 4, 8, 16, 32)
REPETITIONS, EXAMPLES, SCALE = 16, 16, 0.5
_PER_PASS, _RESAMPLES = 8, 200


@pytest.mark.parametrize("name", SOURCES)
def bench_variance(name, tmp_path_factory, report, benchmark):
    """Variance over repetitions of the averaged probabilities and of the mutual information, at equal numbers of passes."""
    evaluator, posterior, examples = fitted(name, tmp_path_factory)
    shortest = sorted(evaluator.encode(examples.split("test")[: 6 * EXAMPLES]), key=lambda e: e["length"])[:EXAMPLES]
    _, batch = next(evaluator.batches(shortest))
    probs = {method: probabilities(evaluator, posterior, batch, method) for method in METHODS}
    table, rows = compare_methods(name, probs)
    report(rows, table)
    benchmark.pedantic(lambda: posterior.draw(32, seed=0, method=METHODS[-1]), rounds=5, warmup_rounds=1)


@torch.no_grad()
def probabilities(evaluator: Evaluator, posterior: SwagPosterior, batch: Mapping[str, Tensor], method: str) -> Tensor:
    """Class probabilities ``[REPETITIONS, 32, B, C]`` of the first 32 samples of as many seeds."""
    sampled = SampledModel(evaluator.model, posterior.draw(_PER_PASS, dtype=torch.float32))
    repetitions = []
    for seed in range(REPETITIONS):
        weights = posterior.draw(SIZES[-1], seed, scale=SCALE, method=method, dtype=torch.float32)
        logits = []
        for part in weights.buffer.split(_PER_PASS):
            sampled.set_weights(SampledWeights(weights.layout, part))
            logits.append(evaluator.task.logits(sampled, batch))
        repetitions.append(torch.cat(logits).double().softmax(-1))
    return torch.stack(repetitions)


def compare_methods(name: str, probs: Mapping[str, Tensor]) -> tuple[Table, list[Row]]:
    """The table of variances, and rows of each method against the one before it.

    The variance of averaged probabilities is the mean squared distance from the reference, the average of all pairs of
    both antithetic methods, over repetitions, examples and classes: of disjoint runs of S structured samples; of single
    samples, divided by S, for iid; of single pairs, divided by S/2, for antithetic. As one sample and one pair have the
    same distribution in all methods, those of all count, and a rare large one counts on both sides of a ratio. The
    mutual information is that of disjoint runs of each method: its variance about their mean, and its bias.
    """
    antithetic = torch.stack([probs[method] for method in METHODS[1:]])  # [2, repetitions, samples, B, C]
    reference = antithetic.mean((0, 1, 2))
    reference_information = information(antithetic.flatten(0, 2))

    def squared_error(averages: Tensor) -> Tensor:  # [..., repetitions, runs, B, C]
        return (averages - reference).square().mean((-3, -2, -1))

    single = torch.stack([squared_error(p) for p in probs.values()]).mean(0)
    pair = squared_error(antithetic.unflatten(2, (-1, 2)).mean(3)).mean(0)
    table = Table(
        title=f"{name}'s posterior, scale {SCALE:g}, variances at equal numbers of passes S", title_justify="left"
    )
    table.add_column("S", justify="right")
    for quantity in ("averaged\nprobability", "mutual\ninformation", "bias of mutual\ninformation"):
        for method in METHODS:
            table.add_column(f"{quantity}:\n{method.replace('+', chr(10) + '+ ')}", justify="right")
    rows = []
    for samples in SIZES:
        runs = {method: p.unflatten(1, (-1, samples)) for method, p in probs.items()}
        structured = squared_error(runs[METHODS[2]].mean(2))
        error = dict(zip(METHODS, (single / samples, pair / (samples / 2), structured), strict=True))
        found = {m: information(p.movedim(2, 0)) for m, p in runs.items()}
        spread = {m: (i - i.mean((0, 1))).square().mean((1, 2)) for m, i in found.items()}
        bias = {m: (i - reference_information).mean().item() for m, i in found.items()}
        table.add_row(
            str(samples),
            *(f"{error[m].mean().item():.2e}" for m in METHODS),
            *(f"{spread[m].mean().item():.2e}" for m in METHODS),
            *(f"{bias[m]:+.1e}" for m in METHODS),
        )
        rows.append(against(f"{name}, S={samples}", error, METHODS[1], METHODS[0]))
        if samples > 2:
            rows.append(against(f"{name}, S={samples}", error, METHODS[2], METHODS[1], 1.0))
    return table, rows


def information(probs: Tensor) -> Tensor:
    """Mutual information of samples ``[S, …, C]``: the entropy of the mean less the mean of the entropies."""
    entropy = torch.special.entr
    return entropy(probs.mean(0)).sum(-1) - entropy(probs).sum(-1).mean(0)


def against(case: str, values: Mapping[str, Tensor], method: str, baseline: str, target: float | None = None) -> Row:
    """A row whose ratio is that of the means over repetitions, its quantiles those over resampled repetitions."""
    ours, theirs = values[method], values[baseline]
    chosen = torch.randint(len(ours), (_RESAMPLES, len(ours)), generator=torch.Generator().manual_seed(0))
    ratios = theirs[chosen].mean(1) / ours[chosen].mean(1)
    low, high = ratios.quantile(torch.tensor([0.2, 0.8], dtype=ratios.dtype)).tolist()
    mean, other = ours.mean().item(), theirs.mean().item()
    case = f"variance of the averaged probability, {case}: {method}"
    return Row(case, baseline, mean, other, other / mean, low, high, target, unit="")
