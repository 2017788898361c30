"""A posterior on disk: a PEFT adapter that holds the mean, and the moments beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layout import Layout, find_parameter, lora_stems

if TYPE_CHECKING:
    from .posterior import SwagPosterior

POSTERIOR_NAME = "swag_posterior.safetensors"
KIND = "swag_lora.posterior"
VERSION = "1"


@dataclass(frozen=True)
class SavedPosterior:
    """What `load` found, checked against the model: ``deviations`` has the min(count, rank) rows held."""

    layout: Layout
    rank: int
    var_clamp: float
    device: torch.device
    tensors: dict[str, Tensor]


def save(posterior: SwagPosterior, folder: str | os.PathLike[str]) -> None:
    """Write ``posterior`` to ``folder``, made if need be; files of other names in it are left alone.

    ======================================  =================================================================
    ``adapter_config.json``, ``README.md``  as PEFT writes them
    ``adapter_model.safetensors``           the adapter with its random tensors at their means
    ``swag_posterior.safetensors``          ``mean [N]``, ``m2 [N]``, ``deviations [k, N]`` float32, ``count``; in
                                            the metadata the layout, rank, var_clamp and the adapter's SHA-256
    ======================================  =================================================================

    Everything is written and synced under another name first. A new folder then appears in one rename. In a folder
    that exists, each file is replaced in one step and the posterior last: a save killed at any moment leaves the old
    posterior or the new one, whole. Killed between the two steps it leaves the new adapter with the old posterior,
    which `load` reports.

    Raises:
        RuntimeError: nothing collected yet.
        ValueError: ``folder`` is a file, several adapters were active, or a parameter is gone from the model.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a posterior is saved to a folder")
    mean = posterior.mean_state_dict()
    fresh = not folder.exists()
    home = folder.parent if fresh else folder
    staging = home / f".{folder.name}.{uuid.uuid4().hex}.partial"
    staging.mkdir(parents=True)
    try:
        if (folder / "README.md").exists():
            shutil.copy(folder / "README.md", staging)
        _write_adapter(posterior, mean, staging)
        _write_posterior(posterior, staging)
        files = sorted(staging.iterdir(), key=lambda file: file.name == POSTERIOR_NAME)
        for path in (*files, staging):
            _sync(path)
        if fresh:
            os.rename(staging, folder)
        else:
            for file in files:
                os.replace(file, folder / file.name)
        _sync(home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        layout = Layout.from_json(metadata["layout"])
        rank, var_clamp = int(metadata["rank"]), float(metadata["var_clamp"])
        fixed = set(json.loads(metadata["fixed"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata: {error}") from error
    _check_tensors(path, tensors, layout.size, rank)
    device = _check_model(path, model, layout, fixed)
    adapter = folder / SAFETENSORS_WEIGHTS_NAME
    if metadata["adapter_sha256"] and metadata["adapter_sha256"] != _sha256(adapter):
        warnings.warn(
            f"{adapter} is not the adapter that {POSTERIOR_NAME} was saved with: it was changed, or a save was "
            "interrupted. The posterior is whole; tensors outside it (if any) may come from another time.",
            RuntimeWarning,
            stacklevel=3,
        )
    return SavedPosterior(layout, rank, var_clamp, device, tensors)


def _write_adapter(posterior: SwagPosterior, mean: dict[str, Tensor], staging: Path) -> None:
    model = posterior.model
    if not isinstance(model, PeftModel):
        return
    if len(posterior.adapters) != 1:
        raise ValueError(
            f"one adapter can be saved with a posterior, {len(posterior.adapters)} were active when it was made: "
            f"{', '.join(posterior.adapters)}"
        )
    (adapter,) = posterior.adapters
    # By identity, for a tied parameter has several names in the state dict and one in the posterior.
    means = {id(p): mean[name] for name, p in zip(mean, posterior.layout.parameters(model), strict=True)}
    state = {
        name: means.get(id(value), value.detach() if isinstance(value, Tensor) else value)
        for name, value in model.state_dict(keep_vars=True).items()
    }
    model.save_pretrained(str(staging), selected_adapters=[adapter], state_dict=state)
    nested = staging / adapter
    if nested.is_dir():
        for file in nested.iterdir():
            file.rename(staging / file.name)
        nested.rmdir()


def _write_posterior(posterior: SwagPosterior, staging: Path) -> None:
    stems = lora_stems(posterior.model)
    random = set(posterior.layout.names)
    lora = {name for name, _ in posterior.model.named_parameters() if f"{name}.".startswith(stems)}
    metadata = {
        "format": "pt",
        "kind": KIND,
        "version": VERSION,
        "layout": posterior.layout.to_json(),
        "rank": str(posterior.rank),
        "var_clamp": repr(posterior.var_clamp),
        "fixed": json.dumps(sorted(lora - random)),
        "adapter_sha256": _sha256(staging / SAFETENSORS_WEIGHTS_NAME),
    }
    held = min(int(posterior.count), posterior.rank)
    tensors = {**posterior.state_dict(), "deviations": posterior.deviations[:held]}
    save_file(tensors, staging / POSTERIOR_NAME, metadata=metadata)


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path} is not a posterior: it was not written by SwagPosterior.save_pretrained")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has format version {metadata.get('version')}, this package reads version {VERSION}: "
            "load it with the package version that wrote it"
        )


def _check_tensors(path: Path, tensors: dict[str, Tensor], size: int, rank: int) -> None:
    count = int(tensors["count"]) if "count" in tensors and tensors["count"].numel() == 1 else 0
    if count < 1:
        raise ValueError(f"{path} holds no collection count")
    shapes = {"mean": (size,), "m2": (size,), "deviations": (min(count, rank), size)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}")
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float32:
            raise ValueError(
                f"{path}: {name} is {tensors[name].dtype} {list(tensors[name].shape)} instead of "
                f"torch.float32 {list(shape)}"
            )


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


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
