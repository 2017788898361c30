"""Times on a GPU, and what the hardware could do at best. On the CPU, where the rows are only tried, the clock's times."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch

import harness
from harness import Row, quantity
from swag_kernels import backend
from swag_kernels.backend import choose

Functions = Mapping[str, Callable[[], object]]
OTHERS = {"cuda": ("triton",)}  # timed beside the back end that is chosen


def alternate(functions: Functions, device: torch.device, rounds: int = 15, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each function on the device, called in turn, the caches cold: before each call 256 MiB are written."""
    if device.type != "cuda":
        return harness.alternate(functions, rounds, warmup)
    flush = torch.empty(64 << 20, device=device)
    events = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            if index >= warmup:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def wall(functions: Functions, device: torch.device, rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of the clock until the device has finished, called in turn: for functions that work on the host as well."""

    def finished(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            result = function()
            synchronize(device)
            return result

        return run

    return harness.alternate({name: finished(f) for name, f in functions.items()}, rounds, warmup)


def host_seconds(function: Callable[[], object], device: torch.device, calls: int = 50) -> list[float]:
    """Seconds until the call returns, the device idle before it."""
    seconds = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


def back_to_back(
    functions: Functions, device: torch.device, rounds: int = 9, calls: int = 200
) -> dict[str, list[float]]:
    """Seconds a call of each function when calls follow one another: the host's or the device's, whichever is longer."""

    def repeated(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls):
                function()

        return run

    seconds = wall({name: repeated(f) for name, f in functions.items()}, device, rounds)
    return {name: [s / calls for s in values] for name, values in seconds.items()}


def by_others(function: Callable[[], object], name: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same call served by the back end that would be chosen next."""

    def by(other: str) -> Callable[[], object]:
        def run() -> object:
            with backend(other):
                return function()

        return run

    return {f"{name} by {other}": by(other) for other in OTHERS.get(choose(device), ())}


def host_row(case: str, function: Callable[[], object], target: float, device: torch.device) -> Row:
    seconds = sorted(host_seconds(function, device))
    ratios = [target / statistics.quantiles(seconds, n=5)[i] for i in (3, 0)]
    host = statistics.median(seconds)
    return Row(case, quantity(target), host, target, target / host, *ratios, 1.0)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_of(elements: int, device: torch.device) -> Callable[[], object]:
    """Reads and writes so many float32 elements in all."""
    source = torch.zeros(max(elements // 2, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@cache
def copy_bandwidth(device: torch.device, elements: int = 512 << 20) -> float:
    """Bytes per second of a large copy, read plus written."""
    return 4 * elements / statistics.median(alternate({"copy": copy_of(elements, device)}, device)["copy"])


@cache
def matmul_rate(device: torch.device, size: int = 8192) -> float:
    """Operations per second of a large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(alternate({"mm": lambda: a @ b}, device)["mm"])


@cache
def machine() -> str:
    """The line under the table: GPU, driver and CUDA, then the host's as in `harness.machine`."""
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    driver = "unknown"
    if smi := shutil.which("nvidia-smi"):
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        driver = lines[0] if lines else driver
    return f"{name}, {total / 2**30:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}, {harness.machine()}"
