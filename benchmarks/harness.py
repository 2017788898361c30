"""Timing rules shared by every benchmark: correctness first, ratios from one alternating run, the physical limit beside."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LORA_SIZES: dict[str, list[tuple[int, ...]]] = {
    "RoBERTa-base r=8 q,v": [(8, 768), (768, 8)] * 24,
    "Llama-2-7B r=8 q,v": [(8, 4096), (4096, 8)] * 64,
    "Llama-3-8B r=16 all-linear": [
        shape
        for out, features in [
            (4096, 4096),
            (1024, 4096),
            (1024, 4096),
            (4096, 4096),
            (14336, 4096),
            (14336, 4096),
            (4096, 14336),
        ]
        for shape in [(16, features), (out, 16)]
    ]
    * 32,
}
"""Shapes of the random tensors (A ``[r, in]``, B ``[out, r]``) of three fine-tunes."""


@dataclass
class Row:
    """One line of the table: ``ours`` against one baseline, or against a physical limit; in seconds unless ``unit`` says else."""

    case: str
    baseline: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    target: float | None = None
    unit: str = "s"

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return f"≥ {self.target:g}: " + ("reached" if self.ratio >= self.target else "MISSED")


def quantity(seconds: float) -> str:
    scale, unit = next(((k, u) for k, u in ((1, "s"), (1e3, "ms")) if seconds * k >= 1), (1e6, "µs"))
    return f"{seconds * scale:.4g} {unit}" if seconds else ""


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """max|ours − exact| ≤ 2·max|plain − exact| + half a unit in the last place of max|exact|, as in the tests."""
    error, allowed = ((out - exact).abs().max().item() for out in (ours, plain))
    bound = 2 * allowed + torch.finfo(ours.dtype).eps / 2 * exact.abs().max().item()
    assert error <= bound, f"{what}: off by {error:.3g}, plain torch by {allowed:.3g}"


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int = 11, warmup: int = 2, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn A B A B …, after ``warmup`` uncounted rounds.

    A turn is ``calls`` calls, of which the last is timed: with one call a function finds the caches as the others left them,
    with more as it left them itself.

    A result is kept until just before the next call of its function. Memory that lies free for a second or two goes back
    from a virtual machine to its host, and getting it again can take five times as long as the op.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    kept: dict[str, object] = {}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            for _ in range(calls):
                kept[name] = None
                start = time.perf_counter()
                kept[name] = function()
                elapsed = time.perf_counter() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def compare(
    case: str, seconds: Mapping[str, list[float]], ours: str, targets: Mapping[str, float | None] | None = None
) -> list[Row]:
    """Rows of ``ours`` against every other entry: median of the round-by-round ratios, with their 20 % and 80 % quantiles."""
    rows = []
    for name, theirs in seconds.items():
        if name == ours:
            continue
        ratios = sorted(b / a for a, b in zip(seconds[ours], theirs, strict=True))
        cut = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 4
        rows.append(
            Row(
                case,
                name,
                statistics.median(seconds[ours]),
                statistics.median(theirs),
                statistics.median(ratios),
                cut[0],
                cut[-1],
                (targets or {}).get(name),
            )
        )
    return rows


def limit(case: str, what: str, seconds: list[float], floor: float, target: float | None = None) -> Row:
    """Row of a measured time against the least time the hardware allows: the ratio is the fraction of the limit reached."""
    fractions = sorted(floor / s for s in seconds)
    cut = statistics.quantiles(fractions, n=5, method="inclusive") if len(fractions) > 1 else [fractions[0]] * 4
    return Row(case, what, statistics.median(seconds), floor, statistics.median(fractions), cut[0], cut[-1], target)


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during a call, over those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@cache
def copy_bandwidth() -> float:
    """Bytes per second of a large copy on this machine, read plus written, best of several."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source).copy_(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * source.numel() * source.element_size() / min(seconds)


@cache
def matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large matrix product on this machine, best of several."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(alternate({"mm": lambda: a @ b}, rounds=7)["mm"])


def machine() -> str:
    """The line under every table: processor, threads, versions, commit."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return (
        f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"triton {triton}, commit {git.stdout.strip() or 'unknown'}"
    )
