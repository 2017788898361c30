"""What a run would do and the memory it needs, without weights and without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from .. import memory, plan, predictor, scale
from ..answer_head import transformers_model
from ..data import Example
from ..layout import Layout
from ..pretrained import load_config
from ..tasks import Task
from .run import check_folder, prepare, stages
from .settings import AUTO, Settings
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
    steps = recipe.steps_per_epoch(len(train))
    tail = recipe.collections * (recipe.every or steps)
    console.print(f"{settings.model}: {task.kind}, seeds {', '.join(map(str, settings.seeds))}")
    console.print(f"{len(train)} training and {len(val)} validation examples; predicts " + _listed(sizes))
    for number, stage in enumerate(stages(Path(folder), settings, sources, task, methods, False), 1):
        work = f", {recipe.epochs} epochs of {steps} steps, then {tail} steps" if stage.title.startswith("fit") else ""
        console.print(f"  {number:3} {stage.title}{work}{', done' if stage.done else ''}")
    token_counts = lengths(sources, task)
    if told := _cut(token_counts, task):
        console.print(told)
    if hasattr(load_config(task.model), "quantization_config"):
        console.print("memory: unknown, because the quantised base loads on its device alone")
        return {}
    found = needs(settings, sources, task, token_counts)
    for what, size in found.items():
        console.print(f"{what:38}{'unknown' if size is None else memory.text(size):>12}")
    return found


def lengths(sources: Sources, task: Task) -> dict[str, list[int]]:
    """Tokens of each example by split, of its longest row; one more than `max_length` where it is longer than that."""
    tokenizer, longer = task.tokenizer(), replace(task, max_length=task.max_length + 1)
    return {
        name: [encoded["length"] for encoded in longer.encode(tokenizer, examples)]
        for name, examples in _splits(sources).items()
    }


def needs(
    settings: Settings, sources: Sources, task: Task, token_counts: Mapping[str, Sequence[int]]
) -> dict[str, int | None]:
    """Bytes, by what they are for; `token_counts` as `lengths` gives them."""
    tokenizer, recipe, members = task.tokenizer(), settings.recipe, len(settings.seeds)
    model: Any = task.peft_model(tokenizer, recipe.lora(), device="meta").to("meta")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    # In the arena of the posterior and its samples, where each tensor begins on its own block.
    arena = Layout.of({name: p for name, p in model.named_parameters() if p.requires_grad}).size * _BYTES
    posterior = (2 + recipe.rank) * arena
    longest = _Longest(task, tokenizer, model, _splits(sources), token_counts)
    step = longest.peak("train", recipe.batch_size, backward=True)
    validation = longest.peak("val", recipe.batch_size) if sources.validated else 0
    training = base + (_ADAMW + _STATES) * trained * _BYTES + posterior
    samples, activations = _largest_pass(longest, settings)
    weights = _samples_held(settings, samples, arena)
    predicting = base + members * posterior + weights
    return {
        "base model": base,
        "trained weights": trained * _BYTES,
        "posterior of a seed": posterior,
        "activations of a training step": step,
        "training, all of it": None if step is None or validation is None else training + max(step, validation),
        f"activations of a pass of {samples} samples": activations,
        "samples of the weights": weights,
        "prediction, all of it": None if activations is None else predicting + activations,
        "on the disk": members * (posterior + _STATES * trained * _BYTES),
    }


@dataclass(frozen=True)
class _Longest:
    """The longest batch of each split, through a model on the device "meta"."""

    task: Task
    tokenizer: Any
    model: nn.Module
    splits: Mapping[str, list[Example]]
    token_counts: Mapping[str, Sequence[int]]

    def encoded(self, split: str, size: int) -> list[dict[str, Any]]:
        examples, counts = self.splits[split], self.token_counts[split]
        order = sorted(range(len(examples)), key=lambda i: -counts[i])[:size]
        return self.task.encode(self.tokenizer, [examples[i] for i in order])

    def tokens(self, split: str, size: int) -> int:
        """By which the run decides on the samples of a pass, see `Evaluator.samples_per_pass`."""
        rows = self.encoded(split, size)
        return len(rows) * max(len(row["input_ids"]) for row in rows) * rows[0]["length"]

    def peak(self, split: str, size: int, backward: bool = False) -> int | None:
        return _peak(self.task, self.model, _inputs(self.task, self.tokenizer, self.encoded(split, size)), backward)


def _largest_pass(longest: _Longest, settings: Settings) -> tuple[int, int | None]:
    """Of all splits that are predicted the pass that takes most: its samples, and bytes of activations."""
    most = dict.fromkeys(longest.splits, settings.samples * len(settings.seeds))
    most["val"] = scale.SAMPLES if _chooses(settings) else 1
    found = []
    for split in longest.splits:
        if split != "train":
            tokens, point = longest.tokens(split, settings.batch_size), longest.peak(split, settings.batch_size)
            samples = min(most[split], plan.samples_at_once(_device(), tokens, 2))
            found.append((samples, None if point is None else samples * point))
    return max(found, key=lambda one: math.inf if one[1] is None else one[1])


def _samples_held(settings: Settings, samples: int, size: int) -> int:
    """Bytes of samples of the weights, each of `size`: those of a pass as they are drawn, and those that are kept.

    A `Predictor` keeps all that it draws where they are little; and a choice of the scale the noise of its own.
    """
    drawn = settings.samples * len(settings.seeds)
    kept = drawn if drawn * size * predictor.KEPT_SHARE <= plan.budget(_device(), None) else samples
    if _chooses(settings):
        kept = max(kept, 2 * scale.SAMPLES)
    return (kept + samples) * size


def _chooses(settings: Settings) -> bool:
    return settings.scale == AUTO or settings.choose_rank


def _splits(sources: Sources) -> dict[str, list[Example]]:
    """All that goes through the model, by name."""
    inside = {name: examples for name, examples in sources.inside.splits.items() if name in ("train", "val")}
    return inside | sources.splits()


def _cut(token_counts: Mapping[str, Sequence[int]], task: Task) -> str:
    """How many examples of which splits are cut at `max_length`; nothing where none is."""
    counts = {name: sum(length > task.max_length for length in found) for name, found in token_counts.items()}
    told = [f"{count} of {len(token_counts[name])} {name}" for name, count in counts.items() if count]
    lost = "beginning" if task.kind == "letters" else "end"
    return f"cut at {task.max_length} tokens, the {lost} is lost: {', '.join(told)}" if told else ""


def _inputs(task: Task, tokenizer: Any, encoded: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch as the model takes it, without what only data can tell: the padding."""
    batch = task.collate(tokenizer, encoded)
    left_out = {"labels", "attention_mask", "position_ids"} | ({"sizes"} if task.kind != "letters" else set())
    return {name: value for name, value in batch.items() if name not in left_out}


def _device() -> torch.device:
    """The one that a run takes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak(task: Task, model: nn.Module, inputs: dict[str, torch.Tensor], backward: bool) -> int | None:
    """Of a step or a pass over tensors that hold nothing, on the device that the run would take: it has its own attention."""
    device = _device()
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
