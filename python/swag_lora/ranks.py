"""One prediction by many processes: who averages what, and how every rank gets all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from swag_kernels import AverageState

from .plan import Plan
from .prediction import Chunk, Prediction

DIMENSIONS = ("samples", "data")
_STATE = ("log_sum", "m2", "votes", "mean_entropy")
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place along the dimensions "samples" and "data" of a mesh; one process has all to itself.

    Ranks along "samples" average chunk r, r + n, ... of the samples; what they found is exchanged after every round and
    merged in the order of the chunks, so that n does not show in any bit. Ranks along "data" take parts of the batch.
    """

    mesh: DeviceMesh | None = None
    samples: int = 1
    sample_rank: int = 0
    data: int = 1
    data_rank: int = 0

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> Ranks:
        """
        Raises:
            ValueError: the mesh has a dimension of another name, or none.
        """
        if mesh is None:
            return cls()
        names = mesh.mesh_dim_names or ()
        if not names or not set(names) <= set(DIMENSIONS):
            raise ValueError(
                f'mesh has the dimensions {list(names)}: it takes "samples", "data" or both, as in '
                'init_device_mesh("cuda", (4, 2), mesh_dim_names=("samples", "data"))'
            )
        sizes = {name: (mesh[name].size(), mesh[name].get_local_rank()) for name in names}
        return cls(mesh, *sizes.get("samples", (1, 0)), *sizes.get("data", (1, 0)))

    def check(self, draws: int, drawn: Mapping[str, Tensor], told: object) -> None:
        """Whether all ranks are about to do the same thing.

        Args:
            draws: samples that can be shared out.
            drawn: the first of them.
            told: the arguments that have to agree.

        Raises:
            ValueError: on every rank, naming the ranks that differ.
        """
        if self.mesh is None:
            return
        if draws < self.samples:
            raise ValueError(
                f"{self.samples} ranks share {draws} draws: ask for more samples, or for fewer ranks along "
                '"samples" (an antithetic pair is one draw)'
            )
        mine = (digest(drawn), repr(told))
        everyone = self._everyone(mine)
        for what, index in (("arguments", 1), ("posterior", 0)):
            others = [rank for rank, theirs in enumerate(everyone) if theirs[index] != everyone[0][index]]
            if others:
                raise ValueError(
                    f"the {what} of rank {', '.join(map(str, others))} differ{'s' * (what == 'posterior')} from rank 0's"
                    + ("" if what == "posterior" else f": {everyone[others[0]][1]} instead of {everyone[0][1]}")
                    + "; load the same folder and give the same arguments on every rank"
                )

    def share(self, parts: int) -> range:
        """The parts of a batch that are this rank's."""
        return range(self.data_rank, parts, self.data)

    def join(self, mine: Mapping[int, Prediction], parts: int) -> list[Prediction]:
        """All parts in order, from those that each rank has."""
        if self.data == 1:
            return [mine[i] for i in range(parts)]
        device = next(iter(mine.values())).log_probs.device if mine else "cpu"
        found: dict[int, Prediction] = {}
        for theirs in self._along("data", {i: part.to("cpu") for i, part in mine.items()}):
            found |= theirs
        return [found[i].to(device) for i in range(parts)]

    def gather(self, mine: Chunk | None, chunks: int) -> list[Chunk]:
        """The chunks of one round, in order; `mine` is None where none was left.

        Every rank adds its state to zeros of all ranks' places: exact, whatever the order of the sum.
        """
        if self.samples == 1:
            assert mine is not None
            return [mine]
        found = [None if one is None else _empty(one, self._device()) for one in self._along("samples", _outline(mine))]
        flat = _flat((mine or next(one for one in found if one is not None)).state)
        places = flat.new_zeros(self.samples, flat.numel())
        if mine is not None:
            places[self.sample_rank] = flat
        dist.all_reduce(places, group=self._group("samples"))
        complete = []
        for place, chunk in zip(places, found[:chunks], strict=False):
            assert chunk is not None
            parts = place.split([getattr(chunk.state, name).numel() for name in _STATE])
            for name, part in zip(_STATE, parts, strict=True):
                getattr(chunk.state, name).copy_(part.view_as(getattr(chunk.state, name)))
            complete.append(chunk)
        return complete

    def smallest(self, mine: Plan) -> Plan:
        """One plan for all: what fits everywhere."""
        if self.mesh is None:
            return mine
        plans = self._everyone((mine.samples, mine.examples))
        return Plan(*(min(numbers) for numbers in zip(*plans, strict=True)))

    def first_s(self, mine: T) -> T:
        """What the first rank along "samples" has, on each of them."""
        return mine if self.samples == 1 else self._along("samples", mine)[0]

    def _everyone(self, mine: T) -> list[T]:
        """From all ranks of the mesh, by data rank, then by sample rank."""
        per_rank: list[T] = self._along("samples", mine)
        return [one for many in self._along("data", per_rank) for one in many]

    def _along(self, dimension: str, mine: T) -> list[T]:
        if (self.samples if dimension == "samples" else self.data) == 1:
            return [mine]
        group = self._group(dimension)
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, mine, group=group)
        return heard

    def _group(self, dimension: str) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group(dimension)

    def _device(self) -> torch.device:
        assert self.mesh is not None
        return torch.device(
            self.mesh.device_type, torch.cuda.current_device() if self.mesh.device_type == "cuda" else 0
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and bytes of some tensors."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _outline(chunk: Chunk | None) -> tuple[Any, ...] | None:
    """All that sizes and names a chunk's state."""
    if chunk is None:
        return None
    state = chunk.state
    sizes = (state.batch, state.num_classes, state.antithetic, state.dtype, state.num_samples)
    return *sizes, tuple(chunk.shape), chunk.dtype


def _empty(outline: tuple[Any, ...], device: torch.device) -> Chunk:
    batch, classes, antithetic, kind, num_samples, shape, dtype = outline
    state = AverageState(batch, classes, device, antithetic, kind)
    state.count += num_samples
    return Chunk(state, torch.Size(shape), dtype)


def _flat(state: AverageState) -> Tensor:
    return torch.cat([getattr(state, name).flatten() for name in _STATE])
