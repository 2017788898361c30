"""Samples of a posterior as ordinary PEFT adapters or whole models, for programs that know nothing of posteriors."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import checkpoint
from .adapter_folder import AdapterFolder, BaseChange, adapter_name, load_posterior
from .drawing import Method, integer
from .folders import whole_folder
from .merging import load_model, rows_of_letters, write_merged
from .posterior import SwagPosterior
from .tasks import TASK_FILE, Task

MANIFEST_NAME = "manifest.json"
KIND = "swag_lora.export"
_AVERAGE = (
    "The prediction is the mean of the samples' probabilities: softmax(logits) of each, then the mean, each with the same "
    "weight. Not the softmax of mean logits, and not an adapter with mean weights."
)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def export_samples(
    posterior: SwagPosterior | str | os.PathLike[str],
    output: str | os.PathLike[str],
    num_samples: int = 8,
    *,
    seed: int = 0,
    first: int = 0,
    scale: float | None = None,
    method: Method | str = "antithetic",
    dtype: torch.dtype | None = None,
    mean: bool = False,
    merge: bool = False,
    model: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write samples ``first … first + num_samples - 1`` of `seed`, each to a folder of its own, and a manifest.

    ==============================  ===================================================================================
    ``seed-0-sample-3/``            sample 3 of seed 0: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT
                                    writes them, with the bits of ``posterior.draw(1, seed=0, first=3, ...)``; with
                                    `merge` a whole model as transformers writes it
    ``mean/``                       with `mean`: the posterior's mean, likewise
    ``manifest.json``               what they are, of which posterior, and how to average them; all files, by name
    ==============================  ===================================================================================

    ``PeftModel.load_adapter(output / "seed-0-sample-3", "seed-0-sample-3")`` loads one. PEFT's ``adapter_names`` then runs
    several in one batch, with trained heads that are one linear layer; a head of several layers needs ``set_adapter`` for
    each, and so does DoRA. With trained biases (``bias`` other than "none") PEFT allows one adapter at a time. vLLM's
    multi-LoRA loads them too, unless the manifest's ``vllm.problems`` say why not: it loads no modules that were trained
    whole, such as a classification head. From a folder no base model is loaded unless `merge` asks for it.

    Args:
        posterior: a folder of `SwagPosterior.save_pretrained` (``swag-lora fit`` writes one), or the posterior of a PEFT
            model, whole on this process.
        output: a folder, new or empty or one that this function wrote and nobody added to, which is replaced in one step.
        num_samples: how many; 0 with `mean` for the mean alone.
        seed, first, method: see `SwagPosterior.draw`.
        scale: factor on the covariance; None takes the one in the folder's ``task.json``, which was chosen on validation
            data, or else 0.5.
        dtype: of the sampled tensors, or with `merge` of the model; None takes that of the model's parameters, which of
            a folder are those at the time of training (PEFT loads adapters as float32 on top of a 16-bit base: ask for
            float32 to get the bits of samples drawn there).
        mean: write the mean too.
        merge: write the base model with the sample merged in, rounded to the dtype of its weights.
        model: the base model's folder or name; None takes that in ``task.json`` or ``adapter_config.json``.

    Returns:
        The content of the manifest.

    Raises:
        FileNotFoundError: `posterior` is no folder with a posterior and an adapter.
        ValueError: nothing to write; `output` holds files that are no export; the base model is not known; without
            `merge` a random tensor that is none of the adapter's, or an adapter that changed the base weights when it was
            made (PiSSA, OLoRA, ...); with `merge` what no plain model holds, as a quantised base, see `write_merged`.

    Warns:
        UserWarning: vLLM does not serve these adapters.
        RuntimeWarning: the folder's adapter is not the one saved with the posterior.
    """
    num_samples = integer("num_samples", num_samples, minimum=0)
    first = integer("first", first, minimum=0)
    if not num_samples and not mean:
        raise ValueError("nothing to export: num_samples is 0, and the mean is not asked for")
    with whole_folder(output, _check_is_export) as staging, _source(posterior, merge, model) as source:
        scale = source.scale if scale is None else scale
        drawn = source.posterior
        entries = []
        for k in range(first, first + num_samples):
            weights = drawn.draw(1, seed=seed, first=k, scale=scale, method=method, dtype=None if merge else dtype)
            name = f"seed-{seed}-sample-{k}"
            source.write(staging / name, weights.sample(0), dtype)
            entries.append({"name": name, "folder": name, "seed": seed, "sample": k})
        if mean:
            means = drawn.mean_state_dict()
            if dtype is not None and not merge:
                means = {name: value.to(dtype) for name, value in means.items()}
            source.write(staging / "mean", means, dtype)
            entries.append({"name": "mean", "folder": "mean", "mean": True})
        manifest: dict[str, Any] = {
            "kind": KIND,
            "format": 1,
            "average": _AVERAGE,
            "base_model": source.base_model,
            "merged": merge,
            "adapters": entries,
            "samples": {"number": num_samples, "seed": seed, "first": first, "scale": scale, "method": method},
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
            "posterior": source.describe(),
            "vllm": vllm(source.adapter.config, source.letters_head) if not merge else None,
            "versions": {package: _version(package) for package in ("swag-kernels", "torch", "transformers", "peft")},
            "files": sorted(p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file()),
        }
        (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    if not merge and manifest["vllm"]["problems"]:
        wayout = "" if source.letters_head else "; --merge writes whole models"
        if wayout and source.adapter.config.get("lora_bias"):
            wayout += " where the layers under LoRA have biases of their own"
        problems = "; ".join(manifest["vllm"]["problems"])
        warnings.warn(f"vLLM does not serve these adapters: {problems}{wayout}", stacklevel=2)
    return manifest


def vllm(config: dict[str, Any], letters_head: str | None = None) -> dict[str, Any]:
    """What vLLM needs to serve a LoRA adapter of that configuration: ``max_lora_rank``, and ``problems``, why it does not.

    It takes ``r``, ``lora_alpha`` and ``use_rslora`` from ``adapter_config.json`` for one scaling of all modules.
    `letters_head` is a tensor of the adapter that belongs to a head with the rows of the answers' letters alone.
    """
    problems = []
    if letters_head:
        problems.append(f"its head has the letters' rows alone ({letters_head}): it loads only through swag_lora")
    elif config.get("modules_to_save"):
        names = ", ".join(config["modules_to_save"])
        problems.append(f"it loads no modules that were trained whole (modules_to_save: {names})")
    if change := BaseChange.of(config):
        problems.append(f"it adds to the base model's weights, which {change.option} changed")
    if config.get("bias", "none") != "none":
        problems.append(f"it loads no trained biases (bias={config['bias']!r})")
    if config.get("lora_bias"):
        problems.append("it loads no biases of LoRA layers (lora_bias)")
    if config.get("use_dora"):
        problems.append("it has no DoRA")
    for pattern in ("rank_pattern", "alpha_pattern"):
        if config.get(pattern):
            problems.append(f"it scales all modules alike and takes no {pattern}")
    rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    allowed = [limit for limit in _VLLM_RANKS if limit >= rank]
    if not allowed:
        problems.append(f"its largest max_lora_rank is {_VLLM_RANKS[-1]}, the adapter has rank {rank}")
    return {"max_lora_rank": allowed[0] if allowed else None, "problems": problems}


@dataclass(frozen=True)
class _Source:
    """A posterior to draw from, the adapter that its samples are written as, and what is known of both."""

    posterior: SwagPosterior
    adapter: AdapterFolder
    base_model: str
    scale: float
    keys: dict[str, tuple[str, ...]] | None
    letters_head: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def write(self, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype | None) -> None:
        if self.keys is not None:
            tensors = {key: weights[name] for name, keys in self.keys.items() for key in keys}
            self.adapter.write(folder, tensors, self.base_model)
            return
        model: Any = self.posterior.model
        write_merged(model, weights, folder, dtype)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))

    def describe(self) -> dict[str, Any]:
        posterior = self.posterior
        count = int(posterior.count)
        return {
            "sha256": checkpoint.sha256(self.adapter.path / checkpoint.POSTERIOR_NAME),
            "collections": count,
            "deviations": min(count, posterior.rank),
            "rank": posterior.rank,
            "weights": posterior.layout.numel,
            "tensors": len(posterior.layout),
        }


@contextmanager
def _source(
    posterior: SwagPosterior | str | os.PathLike[str], merge: bool, model: str | os.PathLike[str] | None
) -> Iterator[_Source]:
    if isinstance(posterior, SwagPosterior):
        if not isinstance(posterior.model, PeftModel):
            raise ValueError(f"only posteriors of PEFT models are exported, not of a {type(posterior.model).__name__}")
        if posterior.sharding is not None:
            raise ValueError("this rank holds only its shards: export posterior.gathered(), from one rank")
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.write(posterior, Path(scratch) / "posterior")
            adapter = AdapterFolder.load(Path(scratch) / "posterior")
            keys = None if merge else adapter.keys(posterior.layout)
            head = adapter.of_letters(rows_of_letters(posterior.model))
            yield _Source(posterior, adapter, _base_model(model, None, adapter), 0.5, keys, head)
        return
    folder = Path(posterior)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    offline = load_posterior(folder)
    adapter = AdapterFolder.load(folder)
    task = Task.load(folder) if (folder / TASK_FILE).is_file() else None
    base = _base_model(model, task, adapter)
    scale = 0.5 if task is None else task.scale
    rank = None if task is None else task.rank
    if not merge:
        offline = offline if rank is None else offline.truncated(rank)
        head = None if task is None else adapter.of_letters(task.letters)
        yield _Source(offline, adapter, base, scale, adapter.keys(offline.layout), head)
        return
    peft_model, tokenizer = load_model(adapter, base, adapter_name(offline.layout))
    whole = SwagPosterior.from_pretrained(peft_model, folder)
    whole = whole if rank is None else whole.truncated(rank)
    yield _Source(whole, adapter, base, scale, keys=None, tokenizer=tokenizer)


def _base_model(given: str | os.PathLike[str] | None, task: Task | None, adapter: AdapterFolder) -> str:
    found = given or (task and task.model) or adapter.config.get("base_model_name_or_path")
    if not found:
        raise ValueError("the adapter does not say which base model it belongs to: name it with --model (model=)")
    return str(Path(found).resolve()) if Path(found).is_dir() else str(found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_is_export(folder: Path) -> None:
    """Refuse a folder that holds anything but an export, all of which its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        mine = {MANIFEST_NAME, *manifest["files"]} if manifest["kind"] == KIND else set()
    except (OSError, ValueError, KeyError, TypeError):
        mine = set()
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in mine:
            raise ValueError(f"{folder} holds {path.relative_to(folder)}, which no export wrote: name another folder")
