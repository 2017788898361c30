"""The sample axis: how rows of one batch become rows of S samples, and back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.cache_utils import Cache

from .shared_rows import SharedRows, repeat, share

_BATCH_FIRST = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "attention_mask",
    "decoder_input_ids",
)
_NOT_BATCHED = frozenset({"cache_position"})
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens"})


def _is_opaque(value: object) -> bool:
    return value is not None and not isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def leading(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor of a call whose first axis is the batch.

    Raises:
        ValueError: there is none, or it is empty.
    """
    first = next((kwargs[k] for k in _BATCH_FIRST if isinstance(kwargs.get(k), Tensor)), None)
    if first is None:
        leaves = tree_flatten((args, dict(kwargs)))[0]
        first = next((v for v in leaves if isinstance(v, Tensor) and v.dim() > 0), None)
    if first is None or len(first) == 0:
        raise ValueError("the batch is empty: no tensor with a leading batch axis was passed to the model")
    return first


@dataclass(frozen=True)
class OneCopy:
    """A tensor of b rows that stands for S * b."""

    rows: Tensor


class AxisReached(Exception):
    """A pass that only looks at what precedes the first random module has come to it."""


class SampleAxis:
    """Where the sample axis stands in one forward pass; shared by all modules of one `SampledModel`.

    Row ``s * b + i`` of an activation is row i of sample s. A batch of B examples has b = B rows a sample, or
    b = B * choices in a multiple-choice model, which flattens its choices into rows. Until the first random module
    has run (``begun``) the S * b rows are S copies of b rows, so one copy tells all. In modules that run one
    sample after the other, ``lane`` is the sample whose b rows are passing through.

    Whether a tensor is batch-leading shows in its shape alone, so every shortcut is taken only where no other size
    in sight could be mistaken for the number of rows; running all rows is always right. Where S * b is such a size
    (``mistakable``), a pass with another number of samples can look first: ``scouting``, it ends at the first random
    module.

    Args:
        tables: sizes that tensors without a batch may have in this model (embedding tables, loose parameters).
        features: sizes of the parameters that are not random.

    ``computed`` counts by module how many rows have passed through it; rows that samples share count once.
    """

    def __init__(self, num_samples: int, tables: tuple[int, ...] = (), features: tuple[int, ...] = ()) -> None:
        self.num_samples = num_samples
        self.computed: Counter[str] = Counter()
        self.scouting = False
        self._tables, self._features = tables, features
        self._reset(0, 0)

    def _reset(self, batch: int, rows: int) -> None:
        self.begun = False
        self.lane: int | None = None
        self._batch = batch
        self._rows = rows
        self._sizes: tuple[int, ...] = ()  # no sets of sizes: to hash a size is to compile for it alone
        self._share_prefix = False
        self.mistakable = False

    def enter(self, args: tuple, kwargs: dict[str, Any], share_prefix: bool) -> tuple[tuple, dict[str, Any]]:
        """Start a forward: every batch-leading tensor of the call, ``[B, ...]``, becomes ``[S * B, ...]``.

        Args:
            share_prefix: whether modules that precede all randomness may run on one copy of the rows.

        Raises:
            ValueError: no tensor to take B from, an empty batch, or a tensor whose leading size is neither B nor 1.
        """
        batch = len(leading(args, kwargs))
        packed = _PACKED & kwargs.keys()
        if packed:
            raise ValueError(f"packed sequences ({min(packed)}) have no batch axis: pad the batch instead")
        self._reset(batch, batch * _choices(kwargs))
        args = tuple(self._enter_value(value, f"positional argument {i}") for i, value in enumerate(args))
        kwargs = {name: self._enter_value(value, name) for name, value in kwargs.items()}

        self._sizes = tuple(
            size for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor) for size in v.shape[1:]
        )
        self._share_prefix = share_prefix
        self.mistakable = share_prefix and self.num_samples > 1 and self._is_mistakable(self.num_samples)
        return args, kwargs

    def _is_mistakable(self, num_samples: int) -> bool:
        known, total = self._sizes + self._tables, num_samples * self._rows
        among_known = total in known or any(total * length in known for length in known)
        return among_known or (not torch.compiler.is_compiling() and total in self._features)

    def unmistakable(self) -> int:
        """The smallest number of samples, at least 2, whose rows are no other size."""
        return next(n for n in itertools.count(2) if not self._is_mistakable(n))

    def _enter_value(self, value: Any, name: str) -> Any:
        if name in _NOT_BATCHED or isinstance(value, Cache):
            return value
        if isinstance(value, Tensor):
            if value.dim() == 0 or (len(value) == 1 and self._batch != 1):
                return value
            if len(value) != self._batch:
                raise ValueError(
                    f"{name} has leading size {len(value)}, the batch has {self._batch} examples: "
                    "every tensor must lead with the batch axis or with 1"
                )
            return repeat(value, self.num_samples)

        def widened(v: Any) -> Any:
            batched = isinstance(v, Tensor) and v.dim() > 0 and len(v) == self._batch
            return repeat(v, self.num_samples) if batched else v

        return tree_map(widened, value)

    def leave(self, output: Any) -> Any:
        """Give every batch-leading tensor of the output its sample axis: ``[S * n, ...]`` becomes ``[S, n, ...]``.

        Rows are S * B, S * b, or S * b tokens flattened together (router logits). Scalars and caches stay as they are.
        """
        batch_rows = (self.num_samples * self._batch, self.num_samples * self._rows)
        token_rows = tuple(self.num_samples * self._rows * size for size in self._sizes)

        def split(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            if len(value) in batch_rows or (value.dim() > 1 and len(value) in token_rows):
                return value.unflatten(0, (self.num_samples, -1))
            return value

        return tree_map(split, output, is_leaf=lambda v: isinstance(v, Cache))

    def split(self, x: Tensor, name: str) -> Tensor:
        """View the input of random module `name` as ``[S, n, ...]``, or ``[1, n, ...]`` where all samples share it.

        Shared are rows that come before any randomness and inputs without a batch (leading size 1). From here on the
        axis has begun.

        Raises:
            ValueError: the rows of `x` cannot be told apart by sample.
        """
        if self.scouting:
            raise AxisReached
        begun, self.begun = self.begun, True
        if isinstance(x, SharedRows) and x.rows is not None:
            x = x.rows.unsqueeze(0)
        elif self.lane is not None or self.num_samples == 1 or (x.dim() > 1 and len(x) == 1):
            x = x.unsqueeze(0)
        else:
            self._check_rows(x, name)
            x = x.unflatten(0, (self.num_samples, -1))[: None if begun else 1]
        self.count(name, x.shape[0] * x.shape[1])
        return x

    def count(self, name: str, rows: int) -> None:
        if not torch.compiler.is_compiling():
            self.computed[name] += rows

    def _check_rows(self, x: Tensor, name: str) -> None:
        total, known = self.num_samples * self._rows, self._sizes + self._tables
        lead = len(x) if x.dim() else 0
        if lead == total:
            time_major = x.dim() > 2 and x.shape[1] == lead and x.stride(0) < x.stride(1)
            certain = x.dim() > 1 and not time_major
        elif lead % total or lead == 0:
            certain = False
        elif x.dim() == 2:
            certain = lead // total in self._sizes and lead not in self._tables
        else:
            certain = x.dim() > 2 and lead not in known and total not in x.shape[1:-1]
        if not certain:
            raise ValueError(
                f"{name} was called on a tensor {list(x.shape)} whose rows cannot be told apart by sample (expected "
                f"{total} leading rows, {self.num_samples} samples of {self._rows}): leave this module out of the "
                "weights, or set one sample's weights at a time"
            )

    def join(self, y: Tensor, x: Tensor) -> Tensor:
        """Undo `split` on a result ``[S, n, ...]`` of input `x`: rows ``[S * n, ...]``.

        An input without a batch gives one result a sample, repeated for each of its b rows so that it broadcasts
        against batch-leading tensors.
        """
        if self.lane is None and self.num_samples > 1 and len(x) == 1:
            y = y.expand(-1, self._rows, *y.shape[2:])
        return y.flatten(0, 1)

    def of_lane(self, weight: Tensor) -> Tensor:
        """The samples of `weight` ``[S, *shape]`` that pass through now: all, or the lane's own, ``[1, *shape]``."""
        return weight if self.lane is None else weight[self.lane : self.lane + 1]

    def narrow(self, call: tuple[tuple, dict[str, Any]]) -> tuple[Any, int] | None:
        """One copy of the rows of a call's arguments and their number, or None where all rows have to run.

        `SharedRows` say themselves that all samples have them. Until the axis has begun, plain tensors with S * b leading
        rows are cut too. All others must certainly have no batch: a scalar, leading size 1, a size known from the inputs
        or the model's tables, or no multiple of S * b. Whatever cannot be looked into (a cache, a mask object, a row
        count given as an integer) keeps all rows. Where b equals another size, so that the output's batch could not be
        told from it, the rows are a small multiple of b.
        """
        args, kwargs = call
        behind = self.begun and not any(isinstance(v, SharedRows) for v in (*args, *kwargs.values()))
        if not self._share_prefix or behind:
            return None
        total = self.num_samples * self._rows
        leaves, spec = tree_flatten(call)
        if any(_is_opaque(v) or (type(v) is int and v == total) for v in leaves):
            return None
        tensors = [v for v in leaves if isinstance(v, Tensor) and v.dim() > 0]
        shared = [v for v in tensors if isinstance(v, SharedRows) and v.rows is not None]
        plain = [v for v in tensors if all(v is not s for s in shared)]
        if self.begun and (not shared or any(len(v) == total for v in plain)):
            return None
        inner = tuple(size for v in tensors for size in v.shape[1:])
        known = self._sizes + self._tables
        rows = self._rows
        if self.num_samples > 1:
            if self.mistakable or total in inner:
                certain = all(len(v) == 1 or len(v) % total for v in plain)
            else:
                certain = all(len(v) in (1, total) or len(v) in known or len(v) % total for v in plain)
            if not certain or all(len(v) != total for v in tensors):
                return None
            while rows > 1 and rows in known + inner:
                rows += self._rows
            if rows >= total:
                return None

        def cut(v: Any) -> Any:
            if not isinstance(v, Tensor) or v.dim() == 0 or len(v) != total:
                return v
            if isinstance(v, SharedRows) and v.rows is not None:
                return v.rows if len(v.rows) == rows else repeat(v.rows, rows // self._rows)
            return v[:rows]

        return tree_unflatten([cut(v) for v in leaves], spec), rows

    def can_scout(self, call: Any) -> bool:
        """Whether a pass that is broken off leaves no trace: neither in a graph of gradients nor in a cache."""
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return not traced and not any(_is_opaque(v) for v in tree_flatten(call)[0])

    def rows_in(self, call: tuple[tuple, dict[str, Any]]) -> int:
        """S * b where an argument leads with the batch, else 0."""
        total, (args, kwargs) = self.num_samples * self._rows, call
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() > 0 and len(value) == total:
                return total
        return 0

    def one_copy(self, output: Any, rows: int) -> Any | None:
        """The output of a module narrowed to `rows`, its batch-leading tensors as `OneCopy`; None where they are in doubt."""
        leaves, spec = tree_flatten(output)
        if any(_is_opaque(v) for v in leaves):
            return None
        few = []
        for value in leaves:
            if isinstance(value, Tensor) and value.dim() > 0:
                if len(value) == rows:
                    value = OneCopy(value[: self._rows])
                elif self.num_samples > 1 and len(value) > 1 and len(value) % rows == 0:
                    return None
            few.append(value)
        return tree_unflatten(few, spec)

    def widen(self, output: Any) -> Any:
        """What `one_copy` gave, for all S * b rows."""
        return tree_map(lambda v: share(v.rows, self.num_samples) if isinstance(v, OneCopy) else v, output)


def _choices(kwargs: Mapping[str, Any]) -> int:
    for name, flat_dim in (("input_ids", 2), ("inputs_embeds", 3)):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return value.shape[1] if value.dim() == flat_dim + 1 else 1
    return 1
