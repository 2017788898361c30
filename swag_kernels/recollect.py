"""What was checked of a layout's last collection, so that one of which nothing but values changed goes without.

With some hundred tensors, the checks of the op take longer than its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from swag_kernels.describe import describe

Table = TypeVar("Table")


@dataclass
class Collection(Generic[Table]):
    """Descriptions of all that a collection was checked for, and what the back end made for it."""

    params: object  # contiguous ones, all of them
    buffers: object
    version: int  # of the layout
    table: Table


class Collections(Generic[Table]):
    """The last collection of each layout that lives."""

    def __init__(self) -> None:
        self._last: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def last(self, layout: Tensor) -> Collection[Table] | None:
        return self._last.get(layout)

    def keep(self, params: object, buffers: object, layout: Tensor, table: Table) -> None:
        self._last[layout] = Collection(params, buffers, layout._version, table)

    def repeated(self, params: list[Tensor], buffers: object, layout: Tensor) -> Table | None:
        """The table of the layout's last collection if nothing but values changed since."""
        last = self.last(layout)
        if (
            last is None
            or last.version != layout._version
            or last.buffers != buffers
            or last.params != describe(params)
        ):
            return None
        return last.table


def describe_buffers(mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor) -> object:
    return describe([mean, m2, count] if deviations is None else [mean, m2, count, deviations])
