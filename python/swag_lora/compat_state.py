"""Moments of the drop-in class, and the published form of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swag_kernels import draw

from .layout import Layout

if TYPE_CHECKING:
    from .compat import SWAG


class Moments:
    """Running moments in a flat float32 arena: ``mean [N]``, ``m2 [N]`` and a ring ``deviations [R, N]`` or None.

    In the published form, which checkpoints have, each random tensor X has

    ====================  =================  ===========================
    ``X_mean``            [*shape]           mean
    ``X_sq_mean``         [*shape]           mean of squares
    ``X_cov_mat_sqrt``    [columns, numel]   deviations, oldest first
    ====================  =================  ===========================

    in its own dtype, with min(n, R) columns after n collections, and no entry of the last kind without deviations.
    """

    def __init__(self, layout: Layout, rank: int | None, device: torch.device) -> None:
        self.layout = layout
        self.mean = torch.zeros(layout.size, device=device)
        self.m2 = torch.zeros(layout.size, device=device)
        self.deviations = None if rank is None else torch.zeros(rank, layout.size, device=device)

    def to(self, device: torch.device) -> None:
        self.mean, self.m2 = self.mean.to(device), self.m2.to(device)
        if self.deviations is not None:
            self.deviations = self.deviations.to(device)

    def std(self, n: Tensor, var_clamp: float) -> Tensor:
        """``sqrt(max(m2 / n, var_clamp))``, ``[N]``."""
        return self.m2.div(n).clamp_(min=var_clamp).sqrt_()

    def sample(
        self, std: Tensor, seed: int, diag_scale: float, low_rank_scale: float, dtype: torch.dtype
    ) -> list[Tensor]:
        """One sample of every tensor, with one z for all; a low_rank_scale of 0 leaves the deviations out."""
        columns = self.deviations if low_rank_scale else None
        buffer = _draw_one(self.mean, std, columns, seed, 0, diag_scale, low_rank_scale, self.layout, dtype)
        return list(self.layout.views(buffer).values())

    def sample_blocks(
        self, std: Tensor, seed: int, diag_scale: float, low_rank_scale: float, dtype: torch.dtype
    ) -> list[Tensor]:
        """`sample` with a fresh z for each tensor: tensor t is sample t of the seed, drawn in an arena of its own."""
        values = []
        for index, (segment, shape) in enumerate(zip(self.layout.segments, self.layout.shapes, strict=True)):
            own = Layout(("",), (shape,), (dtype,))
            at = slice(segment.start, segment.start + own.size)
            columns = self.deviations[:, at].contiguous() if self.deviations is not None and low_rank_scale else None
            buffer = _draw_one(self.mean[at], std[at], columns, seed, index, diag_scale, low_rank_scale, own, dtype)
            values.append(own.views(buffer)[""])
        return values

    def columns(self, n: int) -> list[Tensor]:
        """For each tensor a copy of its deviations after ``n`` collections, ``[min(n, R), numel]``, oldest first."""
        ring = self.mean.new_zeros(0, self.layout.size) if self.deviations is None else self.deviations
        slots = self._slots(n)
        return [ring[:, segment][slots] for segment in self.layout.segments]

    def published(self, n: int, dtypes: Sequence[torch.dtype]) -> dict[str, Tensor]:
        """Copies in the published form after ``n`` collections."""
        means = self.layout.views(self.mean)
        squares = self.layout.views(self.m2.div(max(n, 1)).addcmul_(self.mean, self.mean))
        columns = self.columns(n)
        state = {}
        for name, held, dtype in zip(self.layout.names, columns, dtypes, strict=True):
            state[f"{name}_mean"] = means[name].to(dtype, copy=True)
            state[f"{name}_sq_mean"] = squares[name].to(dtype, copy=True)
            if self.deviations is not None:
                state[f"{name}_cov_mat_sqrt"] = held.to(dtype)
        return state

    def shapes(self, n: int) -> dict[str, list[int]]:
        """Shape of each entry of `published`."""
        shapes = {}
        for name, shape, segment in zip(self.layout.names, self.layout.shapes, self.layout.segments, strict=True):
            shapes[f"{name}_mean"] = shapes[f"{name}_sq_mean"] = list(shape)
            if self.deviations is not None:
                shapes[f"{name}_cov_mat_sqrt"] = [len(self._slots(n)), segment.stop - segment.start]
        return shapes

    def load(self, state: dict[str, Tensor], n: int) -> None:
        """Take over `published` entries; without columns in ``state`` the deviations become zero.

        The variance is ``max(sq_mean - mean^2, 0)``, with the cancellation that implies.
        """
        if self.deviations is not None:
            self.deviations.zero_()
        means, m2s = self.layout.views(self.mean), self.layout.views(self.m2)
        for name, segment in zip(self.layout.names, self.layout.segments, strict=True):
            mean, square = state[f"{name}_mean"].double(), state[f"{name}_sq_mean"].double()
            means[name].copy_(mean)
            m2s[name].copy_((square - mean.square()).clamp_(min=0).mul_(n))
            columns = state.get(f"{name}_cov_mat_sqrt")
            if self.deviations is not None and columns is not None:
                self.deviations[self._slots(n), segment] = columns.to(self.deviations)

    def _slots(self, n: int) -> list[int]:
        """Rows of the ring in order of age: collection i is in row i mod R."""
        rank = 0 if self.deviations is None else len(self.deviations)
        return [i % rank for i in range(max(n - rank, 0), n)] if rank else []


def _draw_one(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    seed: int,
    index: int,
    diag_scale: float,
    low_rank_scale: float,
    layout: Layout,
    dtype: torch.dtype,
) -> Tensor:
    return draw(
        mean,
        std,
        deviations,
        1,
        seed=seed,
        first_sample=index,
        diag_scale=diag_scale,
        low_rank_scale=low_rank_scale,
        antithetic=False,
        layout=layout.table,
        dtype=dtype,
    )[0]


def save_hook(module: SWAG, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Adds the published entries of a `SWAG` to its state dict."""
    dtypes = [parameter.dtype for parameter in module._sampled()]
    for name, value in module._moments.published(int(module.n_models), dtypes).items():
        state_dict[f"{prefix}base.{name}"] = value


def load_hook(
    module: SWAG,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Takes the published entries of a `SWAG` out of a state dict and into its moments, all or none."""
    moments = module._moments
    count_key = f"{prefix}n_models"
    n = int(state_dict[count_key]) if count_key in state_dict else 0
    shapes = moments.shapes(n)
    # Popped, or the modules inside base would report them as unexpected.
    state = {key: state_dict.pop(f"{prefix}base.{key}") for key in shapes if f"{prefix}base.{key}" in state_dict}
    missing_keys.extend(f"{prefix}base.{key}" for key in shapes if key not in state)
    mismatches = [
        f"size mismatch for {prefix}base.{key}: {list(value.shape)} in the checkpoint, {shapes[key]} expected after "
        f"{n} collections{' with max_num_models=' + str(module.max_num_models) if key.endswith('sqrt') else ''}."
        for key, value in state.items()
        if list(value.shape) != shapes[key]
    ]
    error_msgs.extend(mismatches)
    complete = count_key in state_dict and all(key in state for key in shapes if not key.endswith("_cov_mat_sqrt"))
    if mismatches or not complete:
        if count_key in state_dict:
            state_dict[count_key] = module.n_models
        return
    if n != int(module.n_models) or not _is_current(module, state, n):
        moments.load(state, n)
    # Kept on the host as well, so that a sample does not wait for the device.
    module._has_models = n > 0


def _is_current(module: SWAG, state: dict[str, Tensor], n: int) -> bool:
    """Whether loading ``state`` would change nothing but the precision of the moments."""
    current = module._moments.published(n, [parameter.dtype for parameter in module._sampled()])
    return current.keys() == state.keys() and all(
        value.dtype == state[key].dtype and torch.equal(value, state[key].to(value.device))
        for key, value in current.items()
    )
