"""A posterior trained with the published SWAG-LoRA code (Onal et al. 2024, arXiv 2405.03425), made adapter-sized."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .adapter_folder import adapter_key, adapter_name, is_lora, placeholder
from .checkpoint import POSTERIOR_NAME, sha256
from .compat_state import Moments
from .folders import whole_folder
from .layout import Layout
from .posterior import SwagPosterior
from .published_run import ADAPTER_NAME, STATE_NAME, PublishedRun


def import_run(
    run: str | os.PathLike[str], output: str | os.PathLike[str], max_num_models: int | None = None
) -> dict[str, Any]:
    """Turn a run folder of the published code into the folder that `SwagPosterior.save_pretrained` writes.

    `run` holds ``base_model/``, an adapter, and ``swag_model.pt``, the state dict of the SWAG module with the whole base
    model in it (`PublishedRun`). The new folder holds the adapter at the mean, and its moments:

        mean = mean,    m2 = n · max(sq_mean − mean², 0),    count = n,    deviations = cov_mat_sqrt, oldest first

    so that σ² = max(m2/n, 1e-30) is the published variance, with what float32 lost in that difference. The published class
    divides the low-rank part by √(R − 1), R = ``max_num_models`` as configured, and `SwagPosterior` by √(k − 1), k = the
    columns held. Once n ≥ R the two are the same. With fewer collections than R, of which the file says nothing, name
    `max_num_models`: the columns are then multiplied by √((k − 1)/(R − 1)), and ``draw(scale=x)`` has the covariance of
    the published ``sample(scale=x, cov=True)``; such a posterior is not to collect further. (The published default scale
    is 1, that of `draw` is 0.5.) Tensors of the adapter that were not collected keep the values in ``swag_model.pt``.

    Neither the base model's weights are read nor any code in the files run.

    Args:
        run: the run's folder.
        output: a folder that does not exist or is empty.
        max_num_models: R of the run, None for the number of columns held.

    Returns:
        ``collections``, ``deviations``, ``weights``, ``base_model`` and ``notes``, a list of what a user should know.

    Raises:
        FileNotFoundError: the run or one of its files is missing.
        ValueError: a file is damaged, foreign or would run code; moments are missing, not finite or of other shapes than
            the adapter; base weights were collected; `max_num_models` contradicts the file; `output` holds something.
    """
    run = Path(run)
    with whole_folder(output) as staging:
        found = PublishedRun.load(run)
        posterior = _posterior(found, max_num_models, run / STATE_NAME)
        means = posterior.mean_state_dict()
        weights = {adapter_key(name): means.get(name, value).clone() for name, value in found.values.items()}
        save_file(weights, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config = {**found.config, "inference_mode": True}
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (run / ADAPTER_NAME / "README.md").is_file():
            shutil.copy(run / ADAPTER_NAME / "README.md", staging)
        posterior.save_pretrained(staging)
        _complete(staging, sorted(name for name in found.values if is_lora(name) and name not in found.random))
    return {
        "collections": found.count,
        "deviations": found.columns,
        "weights": posterior.layout.numel,
        "base_model": found.config.get("base_model_name_or_path"),
        "notes": _notes(found, posterior.layout, max_num_models),
    }


def _posterior(found: PublishedRun, max_num_models: int | None, path: Path) -> SwagPosterior:
    rank = found.columns if max_num_models is None else max_num_models
    if rank < found.columns or (found.columns < found.count and rank != found.columns):
        raise ValueError(
            f"max_num_models is not {rank}: {path} holds {found.columns} deviations after {found.count} collections"
        )
    layout = Layout.of({name: found.values[name] for name in found.random})
    adapter_name(layout)
    moments = Moments(layout, rank, torch.device("cpu"))
    moments.load(found.moments, found.count)
    assert moments.deviations is not None
    if 2 <= found.columns < rank:
        moments.deviations.mul_(math.sqrt((found.columns - 1) / (rank - 1)))
    posterior = SwagPosterior(placeholder(layout), rank=rank, params=lambda name, parameter: True)
    posterior.load_state_dict(
        {"mean": moments.mean, "m2": moments.m2, "deviations": moments.deviations, "count": torch.tensor(found.count)}
    )
    return posterior


def _complete(folder: Path, fixed: list[str]) -> None:
    """Say in the posterior's metadata what only a model with its adapter could: the adapter beside it, what of it is fixed."""
    path = folder / POSTERIOR_NAME
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata |= {"adapter_sha256": sha256(folder / SAFETENSORS_WEIGHTS_NAME), "fixed": json.dumps(fixed)}
    save_file(load_file(path), path, metadata=metadata)


def _notes(found: PublishedRun, layout: Layout, max_num_models: int | None) -> list[str]:
    notes = []
    if found.columns == found.count and max_num_models is None:
        notes.append(
            f"the run held as many deviations as it collected ({found.count}): if its max_num_models was larger, import "
            "it again with --max-num-models for the covariance that it had"
        )
    if found.columns < 2:
        notes.append("fewer than two deviations: samples have the diagonal variance alone")
    if found.constant:
        notes.append(f"{len(found.constant)} frozen base weights were collected, as {found.constant[0]}; left out")
    small = sorted({str(d).removeprefix("torch.") for d in layout.dtypes if torch.finfo(d).bits < 32})
    if small:
        notes.append(
            f"moments were kept in {', '.join(small)}: the variances, differences of squares, are mostly rounding"
        )
    return notes
