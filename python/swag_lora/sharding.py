"""Random tensors whose rows `torch.distributed.fsdp.fully_shard` has spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from .layout import Layout


@dataclass(frozen=True)
class Sharding:
    """How `torch.distributed.fsdp.fully_shard` has split the random tensors.

    The rows (dimension 0) of each tensor lie on the ranks along dimension `dim` of `mesh`, cut as ``torch.chunk`` cuts
    them: ceil(rows / ranks) each, the last ones fewer or none. Along any other dimension of the mesh the shards are
    repeated. `layout` is that of the whole tensors; a rank's arena has the layout `part`.
    """

    layout: Layout
    mesh: DeviceMesh
    dim: int

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Sharding | None:
        """The sharding of ``parameters``, None if they are ordinary tensors.

        Raises:
            ValueError: they are split otherwise than above, or not all in one way; the message names the first.
        """
        places = {name: _place(name, p) for name, p in parameters.items() if isinstance(p, DTensor)}
        if not places:
            return None
        first = next(iter(places))
        for name in parameters:
            if places.get(name) != places[first]:
                where = f"over {places[name][0]}" if name in places else "not at all"
                raise ValueError(
                    f"{first} is sharded over {places[first][0]}, {name} {where}: call fully_shard on the whole model "
                    "with one mesh, or leave one of them out of the posterior with params="
                )
        return cls(Layout.of(parameters), *places[first])

    @property
    def ranks(self) -> int:
        """Number of shards."""
        return self.mesh.size(self.dim)

    @property
    def is_writer(self) -> bool:
        """Whether this process is the one that writes for all."""
        return not any(self.mesh.get_local_rank(dim) for dim in range(self.mesh.ndim))

    @cached_property
    def part(self) -> Layout:
        """Of this rank's shards; an empty shard has no rows."""
        return self.parts[self.mesh.get_local_rank(self.dim)]

    @cached_property
    def parts(self) -> tuple[Layout, ...]:
        """Of each rank's shards."""
        parts = []
        for rank in range(self.ranks):
            shapes = [(len(_rows(shape[0], self.ranks, rank)), *shape[1:]) for shape in self.layout.shapes]
            parts.append(Layout(self.layout.names, tuple(shapes), self.layout.dtypes))
        return tuple(parts)

    def segments_of(self, rank: int) -> list[slice]:
        """Where the shards of ``rank`` lie in the arena of whole tensors."""
        segments = []
        for shape, segment in zip(self.layout.shapes, self.layout.segments, strict=True):
            rows, width = _rows(shape[0], self.ranks, rank), prod(shape[1:])
            segments.append(slice(segment.start + rows.start * width, segment.start + rows.stop * width))
        return segments

    @property
    def segments(self) -> list[slice]:
        """Where this rank's shards lie in the arena of whole tensors."""
        return self.segments_of(self.mesh.get_local_rank(self.dim))

    @torch.no_grad()
    def local(self, model: nn.Module) -> list[Tensor]:
        """This rank's shards of the model's parameters; without communication.

        Raises:
            ValueError: a parameter is gone, has another shape or is sharded otherwise by now.
        """
        parameters = self.layout.parameters(model)
        if not all(isinstance(parameter, DTensor) for parameter in parameters):
            reshard(model)
            parameters = self.layout.parameters(model)
        shards = []
        for name, shape, parameter in zip(self.layout.names, self.part.shapes, parameters, strict=True):
            if not isinstance(parameter, DTensor) or _place(name, parameter) != (self.mesh, self.dim):
                how = f"over {parameter.device_mesh}" if isinstance(parameter, DTensor) else "not at all"
                raise ValueError(
                    f"{name} is sharded {how}, the posterior over {self.mesh}: use posterior.gathered() with a model "
                    "that is not sharded; with any other, save the posterior and load it with from_pretrained"
                )
            shard = parameter.to_local()
            if shard.shape != shape:
                raise ValueError(f"the shard of {name} has shape {list(shard.shape)} instead of {list(shape)}")
            shards.append(shard)
        return shards

    @torch.no_grad()
    def assemble(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, as DTensors around this rank's ``shards``."""
        placements = [Shard(0) if dim == self.dim else Replicate() for dim in range(self.mesh.ndim)]
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        return {
            name: DTensor.from_local(
                shard, self.mesh, placements, shape=torch.Size(shapes[name]), stride=_strides(shapes[name])
            )
            for name, shard in shards.items()
        }

    def gather_state(self, state: Mapping[str, Tensor], everywhere: bool) -> dict[str, Tensor]:
        """The state of the whole posterior from ``state``, that of this rank's shards; every rank calls.

        One row of N elements travels after another. The writer alone gets it, in host memory, and the other ranks an
        empty dictionary; with `everywhere` each rank gets it on the device of its shards.
        """
        count = int(state["count"])
        self._require_same(count)
        receives = everywhere or self.is_writer
        device = state["mean"].device if everywhere else torch.device("cpu")
        whole: dict[str, Tensor] = {"count": state["count"].to(device)} if receives else {}
        for name in ("mean", "m2", "deviations"):
            rows = state[name] if state[name].dim() == 2 else state[name][None]
            held = torch.zeros(len(rows), self.layout.size, device=device) if receives else None
            for row in range(min(count, len(rows))):
                self._gather(rows[row], None if held is None else held[row], everywhere)
            if held is not None:
                whole[name] = held.view(*state[name].shape[:-1], self.layout.size)
        return whole

    def _require_same(self, count: int) -> None:
        span = torch.tensor([count, -count], device=self.mesh.device_type)
        for group in self.mesh.get_all_groups():
            dist.all_reduce(span, dist.ReduceOp.MAX, group=group)
        most, least = span.tolist()
        if most != -least:
            raise RuntimeError(
                f"the ranks hold from {-least} to {most} collections, rank {dist.get_rank()} {count}: every rank has to "
                "call collect at the same steps"
            )

    def _gather(self, shard: Tensor, whole: Tensor | None, everywhere: bool) -> None:
        """Fill ``whole [N]``, where it is given, from each rank's ``shard``."""
        if not everywhere and any(self.mesh.get_local_rank(dim) for dim in range(self.mesh.ndim) if dim != self.dim):
            return
        group = self.mesh.get_group(self.dim)
        sent = torch.zeros(max(part.size for part in self.parts), device=self.mesh.device_type)
        sent[: len(shard)] = shard
        received = [torch.zeros_like(sent) for _ in range(self.ranks)] if whole is not None else None
        if everywhere:
            dist.all_gather(received, sent, group=group)
        else:
            dist.gather(sent, received, dst=dist.get_global_rank(group, 0), group=group)
        if whole is None or received is None:
            return
        for rank, (part, values) in enumerate(zip(self.parts, received, strict=True)):
            here = values.to(whole.device)
            for place, held in zip(self.segments_of(rank), part.segments, strict=True):
                whole[place] = here[held]

    def scatter(self, whole: Any, shard: Tensor) -> None:
        """Copy this rank's part of ``whole [..., N]`` into ``shard``; without communication.

        ``whole`` is a tensor or a slice of a safetensors file, of which no more than that part is read.
        """
        for place, held in zip(self.segments, self.part.segments, strict=True):
            if held.stop > held.start:
                shard[..., held] = whole[place] if shard.dim() == 1 else whole[:, place]


def reshard(model: nn.Module) -> None:
    """Bring back the sharded parameters that a forward pass of `fully_shard` has replaced with whole ones.

    The next forward gathers them again. The whole ones may be in another dtype (mixed precision) and are not what an
    optimizer changes.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def require_whole(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raises a ValueError that names the first sharded parameter."""
    if not any(issubclass(kind, DTensor) for kind in set(map(type, parameters))):
        return
    name = next(name for name, p in zip(names, parameters, strict=True) if isinstance(p, DTensor))
    raise ValueError(
        f"{name} is sharded, the posterior is of whole tensors: make one from the model after fully_shard, or load a "
        "saved one into the sharded model with SwagPosterior.from_pretrained"
    )


def _place(name: str, parameter: DTensor) -> tuple[DeviceMesh, int]:
    """The mesh of ``parameter`` and the mesh dimension that its rows are split over."""
    mesh, placements = parameter.device_mesh, parameter.placements
    split = [dim for dim, placement in enumerate(placements) if type(placement) is not Replicate]
    if len(split) != 1 or placements[split[0]] != Shard(0):
        raise ValueError(
            f"{name} is placed as {list(placements)} on {mesh}: only parameters that fully_shard splits along "
            "dimension 0 over one dimension of a mesh can be random; leave it out with params= (tensor parallelism), "
            "or call fully_shard without shard_placement_fn"
        )
    return mesh, split[0]


def _rows(rows: int, ranks: int, rank: int) -> range:
    most = -(-rows // ranks)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
