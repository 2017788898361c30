"""Samples of a model's weights, whatever posterior they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .layout import Layout


class SampledWeights(Mapping[str, Tensor]):
    """S samples of the random tensors of a model: parameter names to tensors ``[S, *shape]``.

    Every tensor is a view of one buffer ``[S, N]``, so a sample's weights lie together and the mapping costs nothing
    to build. It is all that `SampledModel` knows of a posterior.

    Args:
        layout: names, shapes and places of the tensors.
        buffer: ``[S, N]`` with ``N = layout.size``, in the dtype the model computes in.
        seed: seed the samples came from, None where that means nothing (an ensemble).
        first: index of the first sample; row i of the buffer is sample ``first + i`` of the seed.
        method: how the samples were made: "iid", "antithetic" or "antithetic+orthogonal" (in both, samples 2j and 2j+1
            mirror each other about the mean), or "given".
    """

    def __init__(
        self, layout: Layout, buffer: Tensor, *, seed: int | None = None, first: int = 0, method: str = "given"
    ) -> None:
        if buffer.dim() != 2 or buffer.shape[1] != layout.size or not len(buffer):
            raise ValueError(f"buffer must be [S, {layout.size}] with S at least 1, got {list(buffer.shape)}")
        self._layout = layout
        self._buffer = buffer
        self._views = MappingProxyType(layout.views(buffer))
        self._seed, self._first, self._method = seed, first, method

    @classmethod
    def from_mapping(cls, tensors: Mapping[str, Tensor]) -> SampledWeights:
        """Weights given as name -> ``[S, *shape]``, such as the members of an ensemble; copied into one buffer.

        The buffer has the tensors' dtype if they share one, else float32.
        """
        if not tensors:
            raise ValueError("no tensors given: weights need at least one name -> tensor [S, *shape]")
        samples = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
        if min(samples.values()) < 1 or len(set(samples.values())) > 1:
            raise ValueError(
                f"every tensor needs the same number of samples, at least 1, on its first axis: got {samples}"
            )
        layout = Layout.of({name: tensor[0] for name, tensor in tensors.items()})
        one = next(iter(tensors.values()))
        buffer = torch.zeros(len(one), layout.size, dtype=layout.common_dtype, device=one.device)
        for name, view in layout.views(buffer).items():
            view.copy_(tensors[name].detach())
        return cls(layout, buffer)

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def buffer(self) -> Tensor:
        """All samples, ``[S, N]``; elements between two tensors' segments are padding."""
        return self._buffer

    @property
    def num_samples(self) -> int:
        return len(self._buffer)

    @property
    def seed(self) -> int | None:
        return self._seed

    @property
    def first(self) -> int:
        return self._first

    @property
    def method(self) -> str:
        return self._method

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample's tensors, name -> ``[*shape]`` views; ``index`` counts rows of this object from 0."""
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return {name: view[index] for name, view in self._views.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"SampledWeights(num_samples={self.num_samples}, tensors={len(self)}, weights={self._layout.numel}, "
            f"dtype={self.dtype}, device='{self.device}', method={self.method!r}, seed={self.seed}, first={self.first})"
        )
