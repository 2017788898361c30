"""Sampling until sure, against the published loop with 32 independent samples, at equal error or less.

On the demo's posterior, and with CLINC150 in the environment on a second, see `fitted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from rich.table import Table
from torch import Tensor

from fitted import SOURCES, fitted
from harness import alternate, compare
from swag_lora import Prediction
from swag_lora.evaluator import Sampling
from swag_lora.loop import Loop

EXAMPLES, BATCH, SAMPLES, MOST = 32, 16, 32, 512
TOLERANCE = {"demo": 0.03, "clinc150": 0.02}
REFERENCE_SAMPLES, REPETITIONS = 512, 3
COVERED, SEEDS = 6, 40


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def bench_until_sure(name, tmp_path_factory, report, benchmark):
    evaluator, posterior, examples = fitted(name, tmp_path_factory)
    encoded = evaluator.encode(examples.split("test")[:EXAMPLES])
    scale = evaluator.task.scale
    batches = [batch for _, batch in replace(evaluator, batch_size=BATCH).batches(encoded)]

    def average(sampling: Sampling) -> Prediction:
        predictor = evaluator.predictor(posterior, encoded, sampling)
        return Prediction.cat([predictor(batch) for batch in batches])

    def until_sure(seed: int = 0) -> Prediction:
        return average(Sampling(MOST, seed, scale, "antithetic", TOLERANCE[name]))

    def resampled() -> Prediction:
        return Prediction.cat([loop.resampled(batch, SAMPLES) for batch in batches])

    reference = average(Sampling(REFERENCE_SAMPLES, 1000, scale, "antithetic"))
    loop = Loop(evaluator.task, evaluator.model, posterior, scale)
    try:
        published = rms([resampled()], reference)
    finally:
        posterior.load_mean()
    independent = rms([average(Sampling(SAMPLES, seed, scale, "iid")) for seed in range(REPETITIONS)], reference)
    found = [until_sure(seed) for seed in range(REPETITIONS)]
    mine = rms(found, reference)
    assert mine <= min(independent, published), f"RMS error {mine:.2e}, of 32 independent samples {independent:.2e}"
    covered = torch.stack([(f.probs - reference.probs).abs() <= 3 * f.std_error for f in found]).double().mean().item()
    assert covered >= 0.99, f"{covered:.4f} of the probabilities are within three standard errors"
    drawn = torch.stack([torch.as_tensor(f.num_samples, dtype=torch.float64) for f in found])

    try:
        seconds = alternate({"until sure": until_sure, "published loop, 32 samples": resampled}, rounds=5, warmup=1)
    finally:
        posterior.load_mean()
    case = f"{name}, {EXAMPLES} examples in batches of {BATCH}, antithetic until {TOLERANCE[name]}"
    table = Table(title=f"{case}: error of a probability", title_justify="left")
    for column in ("", "samples", "RMS error"):
        table.add_column(column)
    table.add_row("until sure", f"{drawn.mean():.1f} ({drawn.min():.0f} – {drawn.max():.0f})", f"{mine:.2e}")
    table.add_row("independent", str(SAMPLES), f"{independent:.2e}")
    table.add_row("published loop", str(SAMPLES), f"{published:.2e}")
    table.add_row("within 3 standard errors", "", f"{covered:.4f}")
    target = 6.0 if name == "clinc150" else None
    report(compare(case, seconds, "until sure", {"published loop, 32 samples": target}), table)
    benchmark.pedantic(until_sure, rounds=2, warmup_rounds=0)


@torch.no_grad()
def bench_coverage(tmp_path_factory, report, benchmark):
    """On the demo's posterior, against 20 000 samples: how many probabilities lie within three standard errors."""
    evaluator, posterior, examples = fitted("demo", tmp_path_factory)
    shortest = sorted(evaluator.encode(examples.split("test")), key=lambda e: e["length"])[:COVERED]
    _, batch = next(evaluator.batches(shortest))

    def average(samples: int, seed: int, tolerance: float | None = None) -> Prediction:
        sampling = Sampling(samples, seed, 0.5, "antithetic", tolerance)
        return evaluator.predictor(posterior, shortest, sampling)(batch)

    reference = average(20_000, 1000)
    table = Table(title=f"demo's posterior, scale 0.5, {COVERED} examples, {SEEDS} seeds", title_justify="left")
    for column in ("tolerance", "within 3 standard errors", "samples", "RMS error"):
        table.add_column(column)
    for tolerance in (0.02, 0.01, 0.005):
        found = [average(2048, seed, tolerance) for seed in range(SEEDS)]
        inside = [(f.probs - reference.probs).abs() <= 3 * f.std_error for f in found]
        covered = torch.stack(inside).double().mean().item()
        drawn = torch.stack([torch.as_tensor(f.num_samples, dtype=torch.float64) for f in found]).mean().item()
        table.add_row(f"{tolerance}", f"{covered:.4f}", f"{drawn:.1f}", f"{rms(found, reference):.2e}")
        assert covered >= 0.99, f"{covered:.4f} at a tolerance of {tolerance}"
    report([], table)
    benchmark.pedantic(lambda: average(32, 0), rounds=2, warmup_rounds=0)


def rms(found: Sequence[Prediction], reference: Prediction) -> float:
    errors: list[Tensor] = [prediction.probs - reference.probs for prediction in found]
    return torch.stack(errors).square().mean().sqrt().item()
