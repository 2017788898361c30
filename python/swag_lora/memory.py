"""Whether a number of samples fits into memory, asked before anything is allocated."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; on the CPU also within the control group's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def check_samples(samples: int, bytes_each: int, bytes_activations: int, device: torch.device) -> None:
    """Refuse more samples than fit.

    Args:
        samples: how many weight vectors are to be held.
        bytes_each: of one weight vector.
        bytes_activations: of one forward pass.

    Raises:
        ValueError: naming what is needed, what is there, and how many samples fit.
    """
    free = available(device)
    if samples * bytes_each + bytes_activations <= free:
        return
    fit = max(0, free - bytes_activations) // bytes_each
    raise ValueError(
        f"{samples} samples need {_gib(samples * bytes_each)} for weights and {_gib(bytes_activations)} for "
        f"activations, {_gib(free)} of memory is free: at most {fit} samples fit (--samples)"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
