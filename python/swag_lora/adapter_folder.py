"""PEFT adapters as files: read, matched with a posterior's tensors and written, without a model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checkpoint import POSTERIOR_NAME
from .layout import Layout
from .posterior import SwagPosterior

_LORA = re.compile(r"\.(lora_\w+)\.([^.]+)(?=\.|$)")
_TRAINED = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")
_MAGNITUDE = ".lora_magnitude_vector"


def adapter_key(name: str) -> str:
    """What PEFT calls the parameter `name` of a model in an adapter file, where there is no name of the adapter.

    ``….query.lora_A.default.weight`` is ``….query.lora_A.weight``, and ``….classifier.modules_to_save.default.weight`` is
    ``….classifier.weight``. DoRA's ``….lora_magnitude_vector.default.weight`` is ``….lora_magnitude_vector``.
    """
    key = _TRAINED.sub("", _LORA.sub(r".\1", name))
    return key.removesuffix(".weight") if key.endswith(f"{_MAGNITUDE}.weight") else key


def adapter_name(layout: Layout) -> str:
    """The adapter whose tensors `layout` has, "default" if they are none's.

    Raises:
        ValueError: they are those of several adapters.
    """
    found = {match[2] for name in layout.names if (match := _LORA.search(name))}
    found |= {match[1] for name in layout.names if (match := _TRAINED.search(name))}
    if len(found) > 1:
        raise ValueError(f"the posterior is one of several adapters: {', '.join(sorted(found))}; collect one at a time")
    return found.pop() if found else "default"


def is_lora(name: str) -> bool:
    """Whether that parameter belongs to a LoRA layer's update."""
    return _LORA.search(name) is not None


@dataclass(frozen=True)
class BaseChange:
    """What in an adapter's configuration has PEFT change the base weights as it makes the adapter.

    `repeats`: PEFT makes the same change again where it loads the adapter onto the base model as it was.
    """

    option: str
    repeats: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BaseChange | None:
        """That of an ``adapter_config.json``; None if the base weights stay as they are."""
        given = config.get("init_lora_weights")
        init = given.lower() if isinstance(given, str) else ""
        if init.startswith(("pissa", "corda")) or init in ("olora", "loftq", "lora_ga"):
            # pissa_niter_N is random, corda and lora_ga need the data, and loftq rounds what may differ by a last bit.
            return cls(f"init_lora_weights={given!r}", init in ("pissa", "olora"))
        return cls("kasa_config", True) if config.get("kasa_config") else None


@dataclass(frozen=True)
class AdapterFolder:
    """A saved LoRA adapter: the content of ``adapter_config.json`` and the tensors of ``adapter_model.safetensors``."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> AdapterFolder:
        """Read the two files.

        Raises:
            FileNotFoundError: one is missing.
            ValueError: one is damaged, or the adapter is none of LoRA.
        """
        folder = Path(folder)
        config = read_config(folder)
        path = folder / SAFETENSORS_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: it is no PEFT adapter, or one in .bin"
            )
        return cls(folder, config, read_tensors(path))

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """Keys of the tensors that are no LoRA update: those of `modules_to_save`, biases, resized embeddings."""
        return tuple(key for key in self.tensors if ".lora_" not in key)

    def of_letters(self, letters: int) -> str | None:
        """The first key that belongs to an output head with the rows of that many letters alone, None if none does."""
        found = (key for key, tensor in self.tensors.items() if tensor.dim() and len(tensor) == letters)
        return next((key for key in found if ".lora_B." in key or ".lora_" not in key), None)

    def keys(self, layout: Layout) -> dict[str, tuple[str, ...]]:
        """For each tensor of `layout` its keys in this adapter: one, and of a tied parameter those of all its names.

        A tied parameter is in the posterior once and in the file several times, with the same values.

        Raises:
            ValueError: PEFT does not count a tensor to the adapter, it has another shape there, or the adapter goes with
                base weights that PEFT changed.
        """
        change = BaseChange.of(self.config)
        if change is not None:
            where = "" if change.repeats else " in the program that trained it"
            raise ValueError(
                f"{change.option} changed the weights of the base model, so that on the base model as it was an adapter "
                f"computes something else: write whole models with --merge (merge=True){where}"
            )
        found = {name: adapter_key(name) for name in layout.names}
        for (name, key), shape in zip(found.items(), layout.shapes, strict=True):
            if key not in self.tensors:
                raise ValueError(
                    f"{name} is random, and PEFT does not count it to the adapter: it is a weight of the base model, "
                    "which no adapter can hold; write whole models with --merge (merge=True)"
                )
            if tuple(self.tensors[key].shape) != shape:
                raise ValueError(
                    f"{key} has shape {list(self.tensors[key].shape)} in {self.path / SAFETENSORS_WEIGHTS_NAME} and "
                    f"{list(shape)} in {POSTERIOR_NAME}: the two are not of one model"
                )
        others = self.tensors.keys() - found.values()
        return {name: (key, *sorted(k for k in others if self._same(key, k))) for name, key in found.items()}

    def write(self, folder: Path, tensors: Mapping[str, Tensor], base_model: str) -> None:
        """Write to the new `folder` this adapter with the given tensors, by key, in place of its own."""
        folder.mkdir()
        config = {**self.config, "base_model_name_or_path": base_model, "inference_mode": True}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # Copies, for safetensors refuses two keys with one memory.
        state = {
            key: tensors.get(key, value).clone(memory_format=torch.contiguous_format)
            for key, value in self.tensors.items()
        }
        save_file(state, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _same(self, one: str, other: str) -> bool:
        a, b = self.tensors[one], self.tensors[other]
        if a.shape != b.shape or a.dtype != b.dtype or not a.numel():
            return False
        # Two biases that are still zero are not one bias.
        return torch.equal(a, b) and bool((a != a.flatten()[0]).any())


def read_config(folder: Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``; raises what `AdapterFolder.load` raises."""
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: it is no PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{path} is of type {kind}: only LoRA adapters are supported")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


def load_posterior(folder: str | os.PathLike[str]) -> SwagPosterior:
    """The posterior in `folder` without its model: it draws, and it neither collects nor loads its mean.

    Its dtype is that of the parameters when the posterior was made.

    Raises:
        FileNotFoundError, ValueError: see `SwagPosterior.from_pretrained`.
    """
    path = Path(folder) / POSTERIOR_NAME
    layout = None
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                layout = Layout.from_json((file.metadata() or {}).get("layout", ""))
        except (SafetensorError, ValueError):
            pass  # from_pretrained says better what is wrong
    return SwagPosterior.from_pretrained(nn.Module() if layout is None else placeholder(layout), folder)


def placeholder(layout: Layout) -> nn.Module:
    """A module whose parameters have the names, shapes and dtypes of `layout`, and take no memory."""
    root = nn.Module()
    for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        value = torch.empty((), dtype=dtype).expand(shape)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return root
