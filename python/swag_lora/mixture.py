"""Several posteriors as one: MultiSWAG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from swag_kernels.reference import philox

from .drawing import Method, named_samples
from .layout import Layout
from .weights import SampledWeights

_STREAM = 4  # of the random counter: of the members' seeds


class Member(Protocol):
    """A posterior whose samples lie in a known layout, as `SwagPosterior`."""

    @property
    def layout(self) -> Layout: ...

    def draw(self, num_samples: int, *, seed: int, first: int, scale: float, method: str) -> SampledWeights: ...


class Mixture:
    """The mixture of M posteriors in equal parts: ``p(w) = 1/M Σ_m q_m(w)``.

    Of SWAG posteriors it is MultiSWAG (Wilson & Izmailov 2020, arXiv 2002.08791). It is a posterior like any other, so
    members × samples count in every average and spread. Members are tied to one model in memory:
    ``Mixture([SwagPosterior.from_pretrained(model, folder) for folder in folders])``.

    Sample k is a function of (members, seed, k). With method "iid" it is sample ``k div M`` of member ``k mod M``. Antithetic
    samples stay in pairs: pair j, of samples 2j and 2j + 1, is pair ``j div M`` of member ``j mod M``. What a member's pairs
    owe each other under "antithetic+orthogonal" they owe within the member; those of different members are independent.
    A member draws with `member_seed` of the seed and its place.

    Args:
        members: at least one, of the same tensors in the same order.
        scales: of each member, times the scale that is asked for; 1 by default.

    Raises:
        ValueError: no members, another number of scales, or a member of other tensors; the message names both.
    """

    def __init__(self, members: Sequence[Member], scales: Sequence[float] | None = None) -> None:
        if not members:
            raise ValueError("a mixture needs at least one member")
        self.members = tuple(members)
        self.scales = (1.0,) * len(members) if scales is None else tuple(float(scale) for scale in scales)
        if len(self.scales) != len(members):
            raise ValueError(f"{len(self.scales)} scales for {len(members)} members")
        if not all(math.isfinite(scale) and scale >= 0 for scale in self.scales):
            raise ValueError(f"scales must be finite and not negative, got {list(self.scales)}")
        for index, member in enumerate(members):
            if difference := self.layout.difference(member.layout):
                raise ValueError(
                    f"member {index} has other tensors than member 0: {difference}. The members of a mixture need one "
                    "architecture, LoRA configuration, adapter name and choice of random parameters"
                )

    @property
    def layout(self) -> Layout:
        return self.members[0].layout

    def map(self, change: Callable[[Member], Member]) -> Mixture:
        """The mixture of the changed members, with the same scales."""
        return Mixture([change(member) for member in self.members], self.scales)

    def draw(
        self,
        num_samples: int,
        seed: int = 0,
        first: int = 0,
        scale: float = 0.5,
        method: Method | str = "antithetic",
    ) -> SampledWeights:
        """Samples ``first … first + num_samples - 1`` of ``seed``; all members together make up `num_samples`.

        Arguments and errors as of `SwagPosterior.draw`. Each member is asked once, for consecutive samples.
        """
        num_samples, seed, first = named_samples(num_samples, seed, first)
        group, count = 1 if method == "iid" else 2, len(self.members)
        buffer = None
        for index, (member, factor) in enumerate(zip(self.members, self.scales, strict=True)):
            mine = [k for k in range(first, first + num_samples) if k // group % count == index]
            if not mine:
                continue
            start = mine[0] // group // count * group + mine[0] % group
            weights = member.draw(
                len(mine), seed=member_seed(seed, index), first=start, scale=scale * factor, method=method
            )
            if buffer is None:
                buffer = weights.buffer.new_empty(num_samples, self.layout.size)
            buffer[torch.tensor(mine, device=buffer.device) - first] = weights.buffer.to(buffer.dtype)
        assert buffer is not None
        return SampledWeights(self.layout, buffer, seed=seed, first=first, method=method)

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Mixture(members={len(self)}, weights={self.layout.numel})"


def member_seed(seed: int, member: int) -> int:
    """The 64-bit seed that member number `member` of a mixture draws with.

    Member 0 keeps ``seed``, so that its samples keep their names. Of the others it is ``x₀ + 2³² x₁`` with the words x of
    Philox4x32-10 at the counter ``(member, 0, 0, 4)`` under the key ``seed``: members of one seed, and of neighbouring
    seeds, share no random numbers.
    """
    if member == 0:
        return seed
    low, high, *_ = philox(torch.tensor([[member], [0], [0], [_STREAM]]), seed).flatten().tolist()
    return low | high << 32
