"""What a run would do and the memory it needs, without weights and without training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from .. import memory, plan
from ..answer_head import transformers_model
from ..data import Example
from ..pretrained import load_config
from ..tasks import Task
from .run import check_folder, prepare, stages
from .settings import Settings
from .sources import Sources

_ADAMW = 3  # copies of a trained weight: itself and two moments; its gradient is among what a step makes
_STATES = 3  # the last, the best and the branching epoch
_BYTES = 4


def show(folder: str | Path, settings: Settings) -> dict[str, int | None]:
    """Print the stages of the run, those that are done already, and what it needs; returns these bytes.

    The model is made without weights, and a training step and a pass of the longest batch run without data, so that the
    bytes of activations are those of tensors alive at once, in float32. None stands for what such a step cannot tell.

    Raises:
        ValueError, FileNotFoundError, ImportError: as the run would, before anything is trained.
    """
    sources, task, methods = prepare(settings)
    check_folder(Path(folder), settings, sources, task, methods)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    recipe, sizes = settings.recipe, {name: len(split) for name, split in sources.splits().items()}
    train, val = sources.inside.split("train"), sources.inside.splits.get("val", [])
    steps = math.ceil(len(train) / recipe.batch_size)
    tail = recipe.collections * (recipe.every or steps)
    console.print(f"{settings.model}: {task.kind}, seeds {', '.join(map(str, settings.seeds))}")
    console.print(f"{len(train)} training and {len(val)} validation examples; predicts " + _listed(sizes))
    for number, stage in enumerate(stages(Path(folder), settings, sources, task, methods, False), 1):
        work = f", {recipe.epochs} epochs of {steps} steps, then {tail} steps" if stage.title.startswith("fit") else ""
        console.print(f"  {number:3} {stage.title}{work}{', done' if stage.done else ''}")
    if hasattr(load_config(task.model), "quantization_config"):
        console.print("memory: unknown, because the quantised base loads on its device alone")
        return {}
    found = needs(settings, sources, task)
    for what, size in found.items():
        console.print(f"{what:38}{'unknown' if size is None else memory.text(size):>12}")
    return found


def needs(settings: Settings, sources: Sources, task: Task) -> dict[str, int | None]:
    """Bytes, by what they are for."""
    tokenizer, recipe, members = task.tokenizer(), settings.recipe, len(settings.seeds)
    model: Any = task.peft_model(tokenizer, recipe.lora(), device="meta").to("meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    posterior = (2 + recipe.rank) * trained * _BYTES
    longest = _longest(task, tokenizer, [*sources.inside.split("train"), *sources.splits()["test"]], recipe.batch_size)
    step = _peak(task, model, longest, backward=True)
    few = _longest(task, tokenizer, sources.splits()["test"], settings.batch_size)
    samples = plan.samples_at_once(torch.device("cpu"), few["input_ids"].numel(), 2)
    samples = min(samples, settings.samples * members)
    point = _peak(task, model, few, backward=False)
    training = base + (_ADAMW + _STATES) * trained * _BYTES + posterior
    predicting = base + members * posterior + 2 * samples * trained * _BYTES
    return {
        "base model": base,
        "trained weights": trained * _BYTES,
        "posterior of a seed": posterior,
        "activations of a training step": step,
        "training, all of it": None if step is None else training + step,
        f"activations of a pass of {samples} samples": None if point is None else samples * point,
        "prediction, all of it": None if point is None else predicting + samples * point,
        "on the disk": members * (posterior + _STATES * trained * _BYTES),
    }


def _longest(task: Task, tokenizer: Any, examples: list[Example], size: int) -> dict[str, torch.Tensor]:
    """The batch of the longest examples, as the model takes it and without what only data can tell: the padding."""
    encoded = sorted(task.encode(tokenizer, examples), key=lambda example: -example["length"])[:size]
    batch = task.collate(tokenizer, encoded)
    left_out = {"labels", "attention_mask", "position_ids"} | ({"sizes"} if task.kind != "letters" else set())
    return {name: value for name, value in batch.items() if name not in left_out}


def _peak(task: Task, model: nn.Module, inputs: dict[str, torch.Tensor], backward: bool) -> int | None:
    """Of a step or a pass over tensors that hold nothing, on the device that the run would take: it has its own attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device=device).train(backward)
        given = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
        if type(transformers_model(model)) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING.values():
            given = {name: value[:, None] for name, value in given.items()}
        try:
            with memory.PeakBytes() as bytes_alive, torch.set_grad_enabled(backward):
                logits = task.logits(model, given) if task.kind == "letters" else model(**given).logits
                if backward:
                    logits.float().sum().backward()
        except (RuntimeError, NotImplementedError):
            return None
    return bytes_alive.peak


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} ({size})" for name, size in sizes.items())
