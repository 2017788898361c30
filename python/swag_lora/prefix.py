"""What precedes the first random module: it runs on one copy of the rows, and once for all passes over a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sample_axis import SampleAxis


class Boundary:
    """Outputs of the modules ahead of all randomness, kept for the passes over one batch.

    Such an output is a function of the batch alone, and what identifies it is its module and how many times that was
    called in the pass.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.kept: dict[tuple[str, int, bool], Any] = {}
        self._calls: Counter[str] = Counter()
        self._inputs: dict[int | str, Any] | None = None

    def open(self) -> None:
        self.is_open = True
        self._calls.clear()

    def close(self) -> None:
        self.is_open, self._inputs = False, None
        self.kept.clear()

    def enter(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Start a pass; returns whether nothing can be kept for it yet.

        Raises:
            ValueError: the inputs are others than those of the first pass since `open`.
        """
        if not self.is_open or torch.compiler.is_compiling():
            return True
        self._calls.clear()
        inputs: dict[int | str, Any] = dict(enumerate(args))
        inputs.update(kwargs.items())
        if self._inputs is None:
            self._inputs = inputs
            return True
        if self._inputs.keys() != inputs.keys() or any(not _same(v, inputs[k]) for k, v in self._inputs.items()):
            raise ValueError("within same_batch() every call must be on the same batch: leave it for another one")
        return False

    def next_call(self, name: str, num_samples: int) -> tuple[str, int, bool] | None:
        """What the output of the call that comes now is kept under; None where nothing is kept."""
        if not self.is_open or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        self._calls[name] += 1
        return name, self._calls[name], num_samples > 1


class Prefix:
    """Forward of a module without random weights: one copy of the rows where nothing random has touched them."""

    def __init__(self, axis: SampleAxis, boundary: Boundary, name: str, module: nn.Module) -> None:
        self._axis = axis
        self._boundary = boundary
        self._name = name
        self._inner = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        axis, boundary = self._axis, self._boundary
        call = boundary.next_call(self._name, axis.num_samples)
        if call in boundary.kept:
            return axis.widen(boundary.kept[call])
        narrow = axis.narrow((args, kwargs))
        if narrow is not None:
            (few_args, few_kwargs), rows = narrow
            axis.count(self._name, rows)
            few = axis.one_copy(self._inner(*few_args, **few_kwargs), rows)
            if few is not None:
                if call is not None:
                    boundary.kept[call] = few
                return axis.widen(few)
        axis.count(self._name, axis.rows_in((args, kwargs)))
        return self._inner(*args, **kwargs)


def _same(a: object, b: object) -> bool:
    """Whether two arguments are the same memory, or equal where they are no tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (
            a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        )
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
