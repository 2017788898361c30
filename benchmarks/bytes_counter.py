"""Bytes that Triton kernels load and store, counted while they run in Triton's interpreter on CPU tensors.

The interpreter comes with Triton's import if TRITON_INTERPRET=1 was set before. It takes every load and store of a
kernel with the addresses of all elements, so nothing has to be known of the kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

PAGE = 20  # bits of an address within a page of the record


@dataclass(frozen=True)
class Moved:
    """Bytes of all loads and stores, and of first touches: of addresses loaded that no program of the launch loaded or
    stored before, and of addresses stored. That is what device memory moves if the cache serves all else."""

    total: int = 0
    first: int = 0

    @property
    def again(self) -> int:
        return self.total - self.first

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.total + other.total, self.first + other.first)

    def __sub__(self, other: Moved) -> Moved:
        return self + -1 * other

    def __rmul__(self, times: int) -> Moved:
        return Moved(times * self.total, times * self.first)


class Launch:
    """The record of one launch: for every address the size of the element that was loaded first, or stored, there."""

    def __init__(self) -> None:
        self.total = 0
        self.loaded = defaultdict(_page)
        self.stored = defaultdict(_page)

    def access(self, pointers: Any, mask: Any, *, loads: bool, stores: bool) -> None:
        addresses = pointers.data.ravel() if mask is None else pointers.data[mask.data]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        self.total += size * addresses.size * (loads + stores)
        pages = addresses >> PAGE
        for page in np.unique(pages).tolist():
            within = addresses[pages == page] & ((1 << PAGE) - 1)
            if loads:
                self.loaded[page][within[self.stored[page][within] == 0]] = size
            if stores:
                self.stored[page][within] = size

    @property
    def moved(self) -> Moved:
        pages = (*self.loaded.values(), *self.stored.values())
        return Moved(self.total, sum(int(page.sum()) for page in pages))


def _page() -> np.ndarray:
    return np.zeros(1 << PAGE, np.uint8)


@contextmanager
def counting() -> Iterator[dict[str, Moved]]:
    """What each kernel, by its name, moves inside; an atomic operation loads and stores."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    moved: dict[str, Moved] = defaultdict(Moved)
    launch = Launch()
    run = InterpretedFunction.run

    def counted_run(kernel, *arguments, **settings):
        nonlocal launch
        launch = Launch()
        run(kernel, *arguments, **settings)
        moved[kernel.__name__] += launch.moved

    def counted(name, pointers, mask, **kind):
        original = getattr(InterpreterBuilder, name)

        def access(self, *arguments):
            launch.access(arguments[pointers], None if mask is None else arguments[mask], **kind)
            return original(self, *arguments)

        return patch.object(InterpreterBuilder, name, access)

    with ExitStack() as stack:
        stack.enter_context(patch.object(InterpretedFunction, "run", counted_run))
        # Loads and stores without a mask are made from these.
        stack.enter_context(counted("create_masked_load", 0, 1, loads=True, stores=False))
        stack.enter_context(counted("create_masked_store", 0, 2, loads=False, stores=True))
        stack.enter_context(counted("create_atomic_rmw", 1, 3, loads=True, stores=True))
        stack.enter_context(counted("create_atomic_cas", 0, None, loads=True, stores=True))
        yield moved
