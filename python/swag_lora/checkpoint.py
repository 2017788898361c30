"""A posterior on disk: a PEFT adapter that holds the mean, and the moments beside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from .files import sync
from .layout import lora_stems
from .processes import together, write_once
from .sharding import require_whole

if TYPE_CHECKING:
    from .posterior import SwagPosterior

POSTERIOR_NAME = "swag_posterior.safetensors"
KIND = "swag_lora.posterior"
VERSION = "1"


def save(posterior: SwagPosterior, folder: str | os.PathLike[str]) -> None:
    """Write ``posterior`` to ``folder`` from one process of those that hold it, see `SwagPosterior.save_pretrained`."""
    if posterior.replicated:
        write_once(lambda: write(posterior, folder), f"{Path(folder).absolute()} at collection {int(posterior.count)}")
    else:
        write(posterior, folder)


def write(posterior: SwagPosterior, folder: str | os.PathLike[str]) -> None:
    """Write ``posterior`` to ``folder``, made if need be; files of other names in it are left alone.

    Every rank calls for a sharded posterior, and one writes. Otherwise it is this process that writes.

    ======================================  =================================================================
    ``adapter_config.json``, ``README.md``  as PEFT writes them
    ``adapter_model.safetensors``           the adapter with its random tensors at their means
    ``swag_posterior.safetensors``          ``mean [N]``, ``m2 [N]``, ``deviations [k, N]`` float32, ``count``; in
                                            the metadata the layout, rank, var_clamp and the adapter's SHA-256
    ======================================  =================================================================

    Everything is written and synced under another name first. A new folder then appears in one rename. In a folder
    that exists, each file is replaced in one step and the posterior last: a save killed at any moment leaves the old
    posterior or the new one, whole. Killed between the two steps it leaves the new adapter with the old posterior,
    which `checkpoint_load.load` reports.

    Raises:
        RuntimeError: nothing collected yet, or the ranks hold different numbers of collections.
        ValueError: ``folder`` is a file, several adapters were active, or a parameter is gone from the model.
    """
    folder = Path(folder)
    if posterior.sharding is None:
        _write(posterior, posterior.state_dict(), _weights(posterior), folder)
        return
    state = posterior.sharding.gather_state(posterior.state_dict(), everywhere=False)
    weights = _weights(posterior)
    with together(posterior.sharding.mesh):
        if state:
            _write(posterior, state, weights, folder)


def _write(posterior: SwagPosterior, state: dict[str, Tensor], weights: dict[str, Any], folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a posterior is saved to a folder")
    if not int(state["count"]):
        raise RuntimeError("nothing collected yet: call collect() before save_pretrained()")
    fresh = not folder.exists()
    home = folder.parent if fresh else folder
    staging = home / f".{folder.name}.{uuid.uuid4().hex}.partial"
    staging.mkdir(parents=True)
    try:
        if (folder / "README.md").exists():
            shutil.copy(folder / "README.md", staging)
        _write_adapter(posterior, state["mean"], weights, staging)
        _write_posterior(posterior, state, staging)
        files = sorted(staging.iterdir(), key=lambda file: file.name == POSTERIOR_NAME)
        for path in (*files, staging):
            sync(path)
        if not (fresh and _renamed(staging, folder)):
            for file in files:
                os.replace(file, folder / file.name)
        sync(home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _renamed(staging: Path, folder: Path) -> bool:
    """Whether ``staging`` now is ``folder``; False if another process has made that folder meanwhile."""
    try:
        os.rename(staging, folder)
    except OSError:
        if not folder.is_dir():
            raise
        return False
    return True


def _adapter(posterior: SwagPosterior) -> str | None:
    """The adapter to save, None if the model has none."""
    if not isinstance(posterior.model, PeftModel):
        return None
    if len(posterior.adapters) != 1:
        raise ValueError(
            f"one adapter can be saved with a posterior, {len(posterior.adapters)} were active when it was made: "
            f"{', '.join(posterior.adapters)}"
        )
    return posterior.adapters[0]


def _weights(posterior: SwagPosterior) -> dict[str, Any]:
    """The model's state dict, the values being its own parameters.

    Of a sharded model, those that belong to the adapter and are not random are gathered, which every rank has to call.
    """
    model, adapter = posterior.model, _adapter(posterior)
    if adapter is None:
        return {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    if posterior.sharding is None:
        require_whole(posterior.layout.names, posterior.layout.parameters(model))
    else:
        saved = {id(value) for value in get_peft_model_state_dict(model, state, adapter).values()}
        saved -= set(map(id, posterior.layout.parameters(model)))
        for name, value in state.items():
            if isinstance(value, DTensor) and id(value) in saved:
                state[name] = value.full_tensor().detach()
    return state


def _write_adapter(posterior: SwagPosterior, mean: Tensor, weights: dict[str, Any], staging: Path) -> None:
    model, adapter = posterior.model, _adapter(posterior)
    if not isinstance(model, PeftModel) or adapter is None:
        return
    views = posterior.layout.views(mean).values()
    # By identity, for a tied parameter has several names in the state dict and one in the posterior.
    means = {
        id(p): view.to(p.dtype, copy=True) for p, view in zip(posterior.layout.parameters(model), views, strict=True)
    }
    state = {
        name: means.get(id(value), value.detach() if isinstance(value, Tensor) else value)
        for name, value in weights.items()
    }
    model.save_pretrained(str(staging), selected_adapters=[adapter], state_dict=state)
    nested = staging / adapter
    if nested.is_dir():
        for file in nested.iterdir():
            file.rename(staging / file.name)
        nested.rmdir()


def _write_posterior(posterior: SwagPosterior, state: dict[str, Tensor], staging: Path) -> None:
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
        "adapter_sha256": sha256(staging / SAFETENSORS_WEIGHTS_NAME),
    }
    tensors = {**state, "deviations": state["deviations"][: int(state["count"])]}
    save_file(tensors, staging / POSTERIOR_NAME, metadata=metadata)


def sha256(path: Path) -> str:
    """Digest of a file's content, empty if there is no file."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
