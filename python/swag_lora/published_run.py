"""A run folder of the published SWAG-LoRA code, read without its base model and without running code in it."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import Tensor

from .adapter_folder import adapter_key, read_config, read_tensors

STATE_NAME = "swag_model.pt"
ADAPTER_NAME = "base_model"
_KINDS = ("_sq_mean", "_cov_mat_sqrt", "_mean")


@dataclass(frozen=True)
class PublishedRun:
    """What such a run saved: its number of collections, the moments and values of the adapter's tensors.

    ``swag_model.pt`` is the flat state dict of the SWAG module:

    ==============================  =====================================================================================
    ``n_models``                    int64 ``[1]``
    ``base.X``                      each parameter and buffer X of the PEFT model, frozen base included
    ``base.X_mean``, ``…_sq_mean``  of each parameter that is collected: running means of θ and θ², in its shape and dtype
    ``base.X_cov_mat_sqrt``         ``[min(n, max_num_models), numel]`` deviations, oldest first; none without covariance
    ==============================  =====================================================================================

    ``base_model/`` is the adapter of the best epoch as PEFT saves it, in ``.safetensors`` or, by older versions, ``.bin``.
    Only its configuration and the names of its tensors are taken: values come from ``swag_model.pt``.

    Attributes:
        count: n, number of collections.
        columns: number of deviations held.
        random: names of the collected tensors of the adapter, in the order of the model's parameters.
        moments: for each X of them ``X_mean``, ``X_sq_mean`` and, unless `columns` is 0, ``X_cov_mat_sqrt``.
        values: for each tensor of the adapter, by the name of its parameter, its value when the run saved it.
        constant: names of frozen weights of the base model that were collected along with a trained bias beside them.
        config: content of ``adapter_config.json``.
    """

    count: int
    columns: int
    random: tuple[str, ...]
    moments: dict[str, Tensor]
    values: dict[str, Tensor]
    constant: tuple[str, ...]
    config: dict[str, Any]

    @classmethod
    def load(cls, run: str | Path) -> PublishedRun:
        """Read and check a run folder.

        Raises:
            FileNotFoundError: the folder or one of its files is missing.
            ValueError: a file is damaged or would run code, or what they hold is not what is said above; the message
                names the tensor.
        """
        run = Path(run)
        path = run / STATE_NAME
        if not run.is_dir():
            raise FileNotFoundError(f"no folder {run}")
        if not path.is_file():
            raise FileNotFoundError(
                f"{run} has no {STATE_NAME}: give the run's save_path, which holds it beside {ADAPTER_NAME}/"
            )
        config, shapes = _read_adapter(run / ADAPTER_NAME)
        state = _read_state(path)
        foreign = [key for key in state if key != "n_models" and not key.startswith("base.")]
        if "n_models" not in state or foreign:
            cause = f"has the key {foreign[0]!r}" if foreign else "has no n_models"
            raise ValueError(f"{path} is not the state dict of a SWAG model: it {cause}")
        if state["n_models"].numel() != 1:
            raise ValueError(f"{path} is damaged: n_models has shape {list(state['n_models'].shape)} instead of [1]")
        count = int(state.pop("n_models"))
        if count < 1:
            raise ValueError(f"{path} holds no collected model (n_models is {count}): it was saved before SWAG started")
        state = {key.removeprefix("base."): value for key, value in state.items()}
        collected = _collected(path, state)
        columns = _check_moments(path, state, collected, count)
        random, constant = _split(path, state, collected, shapes)
        return cls(
            count,
            columns,
            random,
            {name + kind: state[name + kind] for name in random for kind in _KINDS if name + kind in state},
            _values(path, state, shapes),
            constant,
            config,
        )


def _read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The adapter's configuration, and the shape of each tensor by its key."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: it holds the adapter's configuration, copy it from the run")
    if not (folder / CONFIG_NAME).is_file() and (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a whole model, not a PEFT adapter: only runs with LoRA can be imported")
    config = read_config(folder)
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        tensors = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    elif (folder / WEIGHTS_NAME).is_file():
        tensors = _read_state(folder / WEIGHTS_NAME)
    else:
        raise FileNotFoundError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
    # PEFT takes the class's buffers in the LoRA layers for part of the adapter, as they were in that epoch.
    own = [key for key in tensors if not _is_moment(key, tensors)]
    return config, {key: list(tensors[key].shape) for key in own}


def _read_state(path: Path) -> dict[str, Tensor]:
    """A dict of tensors that torch.save wrote, left on the disk until it is used; nothing in the file is called."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is damaged or was not written by torch.save") from None
        raise ValueError(
            f"{path} is refused: it is not a state dict alone but asks to call {wanted[1]}, which could be anything. "
            "Nothing in it was called. If you trust it, load it where it was made and save model.state_dict()"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path} is damaged or was not written by torch.save: {error}") from None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__} instead of a state dict")
    foreign = [key for key, value in state.items() if not isinstance(key, str) or isinstance(value, Mapping)]
    if foreign:
        raise ValueError(f"{path} is not a flat state dict: {foreign[0]!r} is a {type(state[foreign[0]]).__name__}")
    # A quantised base model has a few strings among its tensors.
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _collected(path: Path, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names with moments, in order; a buffer that happens to end in "_mean" (running_mean) has no parameter to go with."""
    names = dict.fromkeys(key.removesuffix(kind) for kind in _KINDS for key in state if key.endswith(kind))
    found = tuple(name for name in state if name in names)
    stray = [name for name in names if name not in state and f"{name}_sq_mean" in state]
    if stray:
        raise ValueError(f"{path} has moments of {stray[0]} and not that parameter itself")
    for name in found:
        for kind in ("_mean", "_sq_mean"):
            if name + kind not in state:
                raise ValueError(f"{path} is not complete: it has no base.{name}{kind}")
    if not found:
        raise ValueError(f"{path} has no moments: it is the state dict of a model, not of a SWAG model around it")
    return found


def _check_moments(path: Path, state: Mapping[str, Tensor], collected: tuple[str, ...], count: int) -> int:
    """Check shapes and values; the number of deviations held, the same for all tensors."""
    held = {name: len(d) for name in collected if (d := state.get(f"{name}_cov_mat_sqrt")) is not None}
    columns = next(iter(held.values()), 0)
    for name in collected:
        if held and held.get(name) != columns:
            raise ValueError(f"{path} holds {held.get(name, 0)} deviations of {name} and {columns} of others")
        shape = list(state[name].shape)
        for kind in _KINDS:
            moment = state.get(name + kind)
            wanted = [columns, state[name].numel()] if kind == "_cov_mat_sqrt" else shape
            if moment is None:
                continue
            if list(moment.shape) != wanted or not moment.is_floating_point():
                raise ValueError(
                    f"{path}: base.{name}{kind} is {moment.dtype} {list(moment.shape)} instead of floating-point {wanted}"
                )
            if not bool(torch.isfinite(moment).all()):
                raise ValueError(f"{path}: base.{name}{kind} holds a NaN or an infinity: its training diverged")
    if columns > count:
        raise ValueError(f"{path} holds {columns} deviations after {count} collections (n_models)")
    return columns


def _split(
    path: Path, state: Mapping[str, Tensor], collected: tuple[str, ...], shapes: Mapping[str, list[int]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Collected names that are the adapter's, and those of frozen weights, which the published class takes along when a
    bias of the same layer is trained."""
    random, constant = [], []
    for name in collected:
        if adapter_key(name) in shapes:
            random.append(name)
        elif _is_constant(state[name], state[f"{name}_mean"]):
            constant.append(name)
        else:
            raise ValueError(
                f"{path} has moments of {name}, a weight of the base model, which no adapter-sized folder can hold: the run "
                'collected more than the adapter (modules_to_swag="all"?). swag_lora.SWAG loads it around the whole model'
            )
    if not random:
        raise ValueError(f"{path} has no moments of a tensor of the adapter in {path.parent / ADAPTER_NAME}")
    return tuple(random), tuple(constant)


def _is_moment(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(kind) and name.removesuffix(kind) in tensors for kind in _KINDS)


def _is_constant(value: Tensor, mean: Tensor) -> bool:
    rounding = 16 * torch.finfo(value.dtype).eps
    return bool(((value - mean).abs() <= rounding * value.abs()).all())


def _values(path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    names = {adapter_key(name): name for name in state if not _is_moment(name, state)}
    for key, shape in shapes.items():
        if key not in names:
            raise ValueError(
                f"{path} has no parameter for {key} of {path.parent / ADAPTER_NAME}: they are of different runs"
            )
        found = list(state[names[key]].shape)
        if found != shape:
            raise ValueError(
                f"{names[key]} has shape {found} in {path} and {shape} in {path.parent / ADAPTER_NAME}: they are of "
                "different runs"
            )
    return {names[key]: state[names[key]] for key in shapes}
