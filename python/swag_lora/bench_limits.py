"""What a machine can do at best, measured: the physical limit beside every timing."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .bench_case import Case

_ROUNDS = 15


@dataclass(frozen=True)
class Limits:
    """Operations a second of a large matrix product in the model's dtype, and bytes a second of a large copy."""

    matmul: float
    copy: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Limits:
        """Best of several; the copy counts bytes read and bytes written."""
        size, elements = (8192, 512 << 20) if device.type == "cuda" else (2048, 32 << 20)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.ones(elements, device=device)
        target = torch.empty_like(source)
        return cls(
            2 * size**3 / _best(lambda: a @ b, device),
            2 * source.nbytes / _best(lambda: target.copy_(source), device),
        )

    def floor(self, case: Case) -> tuple[float, str]:
        """The least seconds that a case can take, and what sets them.

        Two operations for each weight of a linear layer and token, K·B·T tokens where the axis has begun and B·T
        before, the head's for one token of a row (attention's own products not counted), at the rate of a matrix
        product; or every linear weight and all K samples read once at the speed of a copy. The larger of the two.
        """
        adapted, samples = case.adapted, case.samples
        sizes, shared = adapted.sizes, adapted.sizes.layers - adapted.random_layers
        per_token = sizes.each * (shared + samples * adapted.random_layers)
        operations = 2 * (case.tokens * per_token + samples * case.batch * sizes.head)
        item = next(adapted.model.parameters()).dtype.itemsize
        moved = (sizes.each * sizes.layers + sizes.head) * item + samples * adapted.sample_bytes
        by = {"matmul": operations / self.matmul, "copy": moved / self.copy}
        largest = max(by, key=lambda name: by[name])
        return by[largest], largest

    def __str__(self) -> str:
        return f"matrix product {self.matmul / 1e9:.3g} GFLOP/s, copy {self.copy / 1e9:.3g} GB/s read and written"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """The line under every table: processor, threads, versions."""
    names = []
    if (file := Path("/proc/cpuinfo")).exists():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    parts = [names[0] if names else platform.processor() or platform.machine(), f"{torch.get_num_threads()} threads"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    for package in ("torch", "triton", "transformers", "peft", "swag-kernels"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


def _best(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
