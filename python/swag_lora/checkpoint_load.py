"""A posterior read back from disk and checked against a model."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .checkpoint import KIND, POSTERIOR_NAME, VERSION, sha256
from .layout import Layout, find_parameter, lora_stems
from .sharding import Sharding


@dataclass(frozen=True)
class SavedPosterior:
    """What `load` found, checked against the model: ``deviations`` has the min(count, rank) rows held.

    For a sharded model the tensors are this rank's shards.
    """

    layout: Layout
    sharding: Sharding | None
    rank: int
    var_clamp: float
    device: torch.device
    tensors: dict[str, Tensor]


def load(model: nn.Module, folder: str | os.PathLike[str]) -> SavedPosterior:
    """Read the posterior in ``folder`` and check it against ``model``; see `SwagPosterior.from_pretrained`.

    Warns:
        RuntimeWarning: the adapter in the folder is not the one saved with this posterior.
    """
    folder = Path(folder)
    path = folder / POSTERIOR_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no posterior in {folder}: it has no {POSTERIOR_NAME}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            try:
                layout = Layout.from_json(metadata["layout"])
                rank, var_clamp = int(metadata["rank"]), float(metadata["var_clamp"])
                fixed = set(json.loads(metadata["fixed"]))
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path} has damaged metadata: {error}") from error
            _check_tensors(path, file, layout.size, rank)
            device = _check_model(path, model, layout, fixed)
            parameters = zip(layout.names, layout.parameters(model), strict=True)
            sharding = Sharding.of(dict(parameters))
            tensors = _read(file, sharding)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    adapter = folder / SAFETENSORS_WEIGHTS_NAME
    if metadata["adapter_sha256"] and metadata["adapter_sha256"] != sha256(adapter):
        warnings.warn(
            f"{adapter} is not the adapter that {POSTERIOR_NAME} was saved with: it was changed, or a save was "
            "interrupted. The posterior is whole; tensors outside it (if any) may come from another time.",
            RuntimeWarning,
            stacklevel=3,
        )
    return SavedPosterior(layout, sharding, rank, var_clamp, device, tensors)


def _read(file: Any, sharding: Sharding | None) -> dict[str, Tensor]:
    names = ("mean", "m2", "deviations", "count")
    if sharding is None:
        return {name: file.get_tensor(name) for name in names}
    tensors = {"count": file.get_tensor("count")}
    for name in names[:-1]:
        whole = file.get_slice(name)
        tensors[name] = torch.zeros(*whole.get_shape()[:-1], sharding.part.size)
        sharding.scatter(whole, tensors[name])
    return tensors


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} is not a posterior: it was not written by SwagPosterior.save_pretrained")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('version')}, this package reads version {VERSION}: "
            "load it with the package version that wrote it"
        )


def _check_tensors(path: Path, file: Any, size: int, rank: int) -> None:
    held = set(file.keys())
    count = file.get_tensor("count") if "count" in held else torch.zeros(())
    if count.numel() != 1 or int(count) < 1:
        raise ValueError(f"{path} holds no collection count")
    shapes = {"mean": [size], "m2": [size], "deviations": [min(int(count), rank), size]}
    for name, shape in shapes.items():
        if name not in held:
            raise ValueError(f"{path} has no tensor {name}")
        found = file.get_slice(name)
        dtype = found[:0].dtype
        if found.get_shape() != shape or dtype != torch.float32:
            raise ValueError(f"{path}: {name} is {dtype} {found.get_shape()} instead of torch.float32 {shape}")


def _check_model(path: Path, model: nn.Module, layout: Layout, fixed: set[str]) -> torch.device:
    stems = lora_stems(model)
    found = {name: parameter for name in layout.names if (parameter := find_parameter(model, name)) is not None}
    device = next(iter(found.values())).device if found else torch.device("cpu")
    for name, parameter in model.named_parameters():
        if name not in fixed and f"{name}.".startswith(stems):
            found.setdefault(name, parameter)
    difference = layout.difference(Layout.of(found))
    if difference:
        adapters = getattr(model, "peft_config", None)
        raise ValueError(
            f"{path} does not fit the model: {difference}. The model needs the architecture, LoRA configuration and "
            f"adapter name of the posterior (its adapters: {', '.join(adapters) if adapters else 'none'})"
        )
    return device
