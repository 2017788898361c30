"""What the processes of a group owe one another: to fail together, and to write a file once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """The mesh that parameters of ``model`` are sharded over, None for an ordinary model."""
    return next((parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)), None)


@contextmanager
def together(mesh: DeviceMesh | None) -> Iterator[None]:
    """What one rank of ``mesh`` raises inside, every rank raises at the end; every rank enters.

    Costs one reduction of a flag; nothing without a mesh.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if mesh is None:
            raise
        error = raised
    if mesh is None:
        return
    failed = torch.tensor(error is not None, dtype=torch.int32, device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    said = None if error is None else (isinstance(error, ValueError), f"{error} (on rank {dist.get_rank()})")
    for group in mesh.get_all_groups():
        heard: list[tuple[bool, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, said, group=group)
        said = next((one for one in heard if one is not None), None)
    if error is not None:
        raise error
    assert said is not None
    raise (ValueError if said[0] else RuntimeError)(said[1])


def is_replicated(model: nn.Module) -> bool:
    """Whether ``model`` is wrapped in DistributedDataParallel, so that every rank has the same weights."""
    return isinstance(getattr(model, "_orig_mod", model), DistributedDataParallel)


def write_once(write: Callable[[], None], what: str) -> None:
    """Call ``write`` on rank 0 alone; the other ranks that call wait until it is done.

    Rank 0 waits for nobody, so that it may be the only one to call: a barrier would hang there.

    Args:
        write: what rank 0 does.
        what: the same text on every rank, of what is written where.

    Raises:
        RuntimeError: on another rank, that rank 0 failed, or did not call within the time of the process group.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return write()
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    # Numbered, so that a second try does not hear of the first.
    key = f"swag_lora/{what}/{store.add(f'swag_lora/{what}/calls/{rank}', 1)}"
    if rank:
        try:
            store.wait([key])
        except RuntimeError as error:
            raise RuntimeError(f"rank 0 did not write {what}: it has to call save_pretrained too ({error})") from error
        if (said := store.get(key).decode()) != "done":
            raise RuntimeError(f"rank 0 could not write {what}: {said}")
        return
    try:
        write()
    except BaseException as error:
        store.set(key, f"{type(error).__name__}: {error}")
        raise
    store.set(key, "done")
