"""How much memory there is, how much is asked for, and how much something takes."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .shared_rows import SharedRows

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


def parse(memory: int | str) -> int:
    """Bytes of a number of them, or of a text such as "4GiB", "512 MiB" or "2e9".

    Raises:
        ValueError: neither, or nothing.
    """
    units = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    units |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", str(memory).lower())
    try:
        size = int(float(found[1]) * units[found[2] or "b"]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise ValueError(f'memory must be a number of bytes above 0 or a text such as "4GiB", got {memory!r}')
    return size


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made within that were alive at once, on whatever device.

    For one pass before many, not for all of them: it costs some microseconds for each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if SharedRows in types:
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if _has_memory(t)}
        for tensor in tree_flatten(result)[0]:
            if _has_memory(tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._seen:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._free, key, size)
        self._live += size
        self.peak = max(self.peak, self._live)

    def _free(self, key: int, size: int) -> None:
        self._live -= size
        del self._seen[key]


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, SharedRows)


def text(size: int) -> str:
    """For people: "1.5 GiB"."""
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if size >= u), (1, "bytes"))
    return f"{size / unit:.3g} {name}"
