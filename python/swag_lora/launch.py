"""The mesh of a command that `torchrun` or `accelerate launch` has started in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def ranks(data: int = 1) -> Iterator[DeviceMesh | None]:
    """A mesh ("samples", "data") over all processes, `data` of them along the second; None in a single process.

    Raises:
        ValueError: the number of processes is no multiple of `data`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % data:
        raise ValueError(f"{world} processes cannot be {data} ranks of data: the one must divide the other")
    if world == 1:
        yield None
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield init_device_mesh(device, (world // data, data), mesh_dim_names=("samples", "data"))
    finally:
        if own:
            dist.destroy_process_group()
