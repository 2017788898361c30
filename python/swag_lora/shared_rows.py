"""Rows that all samples have in common: ``[S * b, ...]`` to whoever looks at the shape, ``[b, ...]`` in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_ROW_BY_ROW = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.detach.default,
        _aten._to_copy.default,
        _aten.to.dtype,
        _aten.gelu.default,
        _aten.relu.default,
        _aten.sigmoid.default,
        _aten.silu.default,
        _aten.tanh.default,
    }
)
_ALONG_A_DIM = frozenset({_aten.select.int, _aten.slice.Tensor})


class SharedRows(Tensor):
    """S copies of the same rows ``[b, ...]`` along the first axis, made only when an operation needs them.

    What a module ahead of all randomness returns. Modules that know the class take `rows`; slices past the first axis
    and a few elementwise functions stay shared; any other operation sees an ordinary tensor of S * b rows.

    It carries no gradient: make it where none is recorded.
    """

    num_samples: int
    _rows: Tensor | None
    _wide: Tensor | None
    _view_of: tuple[SharedRows, Callable[[Tensor], Tensor]] | None

    @staticmethod
    def __new__(cls, rows: Tensor, num_samples: int) -> SharedRows:
        shape = (num_samples * len(rows), *rows.shape[1:])
        shared: SharedRows = Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=rows.device)
        shared._rows, shared.num_samples = rows, num_samples
        shared._wide, shared._view_of = None, None
        return shared

    @property
    def rows(self) -> Tensor | None:
        """What the samples share, ``[b, ...]``; None after a write in place, which may have set them apart."""
        if not self.is_inference() and self._version != 0:  # a view of it was written to
            self._rows = None
        return self._rows

    def wide(self) -> Tensor:
        """All S * b rows as an ordinary tensor, made once."""
        if self._wide is None:
            assert self._rows is not None
            self._wide = repeat(self._rows, self.num_samples)
        return self._wide

    def _aliased(self) -> Tensor:
        """All rows, for a view of them; in inference mode nobody would tell of a write through it."""
        wide = self.wide()
        if self.is_inference():
            self._rows = None
        return wide

    def _written(self) -> Tensor:
        """All rows, for a write in place, which a view passes on to what it is a view of."""
        if self._view_of is not None:
            whole, view = self._view_of
            self._wide = view(whole._written())
        wide = self.wide()
        self._rows = None
        return wide

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SharedRows(num_samples={self.num_samples}, rows={self._rows})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, SharedRows) and first.rows is not None and _stays_shared(func, first, args):

            def view(x: Tensor) -> Tensor:
                return func(x, *args[1:], **kwargs)

            shared = SharedRows(view(first.rows), first.num_samples)
            if func in _ALONG_A_DIM or func in (_aten.alias.default, _aten.detach.default):
                shared._view_of = (first, view)
            return shared
        if not func._schema.is_mutable:
            aliases = any(a.alias_info is not None for a in func._schema.arguments)
            args, kwargs = tree_map_only(
                SharedRows, SharedRows._aliased if aliases else SharedRows.wide, (args, kwargs)
            )
            return func(*args, **kwargs)
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        plain = {name: _plain(value, name in written) for name, value in named.items()}
        result = func(**plain)
        targets = [named[name] for name in written if isinstance(named.get(name), SharedRows)]
        return targets[0] if len(targets) == 1 and isinstance(result, Tensor) else result


def repeat(tensor: Tensor, times: int) -> Tensor:
    """``[n, ...]`` as ``[times * n, ...]``, one whole copy after the other."""
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))


def share(rows: Tensor, num_samples: int) -> Tensor:
    """`rows` for each of S samples: lazily where no gradient is recorded and nothing is traced, else by copies."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return repeat(rows, num_samples)
    return SharedRows(rows, num_samples)


def _stays_shared(func: Any, first: SharedRows, args: Any) -> bool:
    if func in _ROW_BY_ROW or (func is _aten.dropout.default and not args[2]):
        return True
    dim = args[1] if len(args) > 1 else 0
    return func in _ALONG_A_DIM and dim % first.dim() != 0


def _plain(value: Any, written: bool) -> Any:
    return tree_map_only(SharedRows, SharedRows._written if written else SharedRows.wide, value)
