"""Fine-tuning with LoRA: the point estimate, and a SWAG posterior that branches off on the way to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import set_seed

from .data import Dataset
from .evaluator import Encoded, Evaluator
from .files import write_atomic, write_text
from .posterior import SwagPosterior
from .recipe import Recipe
from .scale import choose_scale
from .tasks import Task
from .threads import threads
from .trainer import SwagCallback
from .training import Phase, Snapshots, State, bars, load_state, state_of, train

HISTORY_FILE = "fit.json"
UNFINISHED = "unfinished"
"""The folder of a fit that has not ended."""


def fit(
    folder: str | Path,
    model: str | Path,
    dataset: Dataset,
    recipe: Recipe,
    max_length: int = 128,
    show: bool = False,
    task: Task | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Train on `dataset` and write to `folder` all that `swag-lora evaluate` needs; returns what is in `fit.json`.

    The folder holds the posterior as `SwagPosterior.save_pretrained` writes it (an adapter at the mean, and the
    moments), the point estimates as adapters in `map` and `map-best` (smallest validation NLL of all epochs), the
    tokenizer, `task.json` and `fit.json`. Without a `val` split there is no `map-best`, and the scale stays at 0.5.

    A fit that was killed goes on from its last whole epoch when it is called again with the same arguments, and gives the
    same bits; with others it starts over.

    Args:
        task: how the data go through the model, where that is not what `Task.of` takes.
        scale: of the samples; None chooses it by validation NLL.

    Raises:
        ValueError: the folder is a file, there is no `train` split, the recipe leaves no covariance, or the model does not
            fit the task or has no sampled form; before anything is trained.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the posterior needs a folder")
    recipe.check(len(dataset.split("train")))
    task = Task.of(model, dataset, max_length, recipe.seed) if task is None else task
    work = _Work(folder / UNFINISHED, {"recipe": asdict(recipe), "task": asdict(task), "data": _fingerprints(dataset)})
    trained = _train(work, task, dataset, recipe, show)
    val = trained.evaluator.encode(dataset.splits["val"]) if "val" in dataset.splits else None
    chosen = (
        choose_scale(trained.evaluator, trained.posterior, val, seed=recipe.seed) if val and scale is None else None
    )
    if chosen is not None:
        scale = chosen.scale
    if scale is not None:
        task = replace(task, scale=scale)
    history = {
        "recipe": asdict(recipe),
        "data": {"name": dataset.name, **{name: len(examples) for name, examples in dataset.splits.items()}},
        "validation_nll": trained.nll,
        "branch_epoch": trained.branch_epoch,
        "scale_nll": {}
        if chosen is None
        else {f"{c:g}": nll for c, nll in zip(chosen.scales, chosen.nll, strict=True)},
        "scale": task.scale,
    }
    _save(folder, task, trained, history)
    shutil.rmtree(work.folder)
    return history


@dataclass(frozen=True)
class _Trained:
    """What training gives: the posterior, whose model is the evaluator's, and the point estimates."""

    evaluator: Evaluator
    posterior: SwagPosterior
    points: Mapping[str, State]
    nll: list[float]
    branch_epoch: int


class _Work:
    """The folder of a fit under way: what belongs to other arguments is thrown away."""

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        self.folder = folder
        told, path = json.dumps(arguments, sort_keys=True), folder / "arguments.json"
        if not (path.is_file() and path.read_text(encoding="utf-8") == told):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_text(path, told)


def _train(work: _Work, task: Task, dataset: Dataset, recipe: Recipe, show: bool) -> _Trained:
    """Both phases: MAP to its end, then SWAG from the epoch it leaves."""
    set_seed(recipe.seed)
    tokenizer = task.tokenizer()
    evaluator = Evaluator(task, task.peft_model(tokenizer, recipe.lora()), tokenizer, recipe.batch_size, show)
    evaluator.check_sampled()
    examples = evaluator.encode(dataset.split("train"))
    val = evaluator.encode(dataset.splits["val"]) if "val" in dataset.splits else None
    with threads(recipe.threads), bars(show, console=Console(stderr=True)) as progress:
        states, told = _map_phase(work.folder, evaluator, examples, val, recipe, progress)
        load_state(evaluator.model, states["branch"])
        steps_per_epoch = recipe.steps_per_epoch(len(examples))
        anneal_steps = recipe.anneal_epochs * steps_per_epoch
        leave = told["branch_epoch"] if recipe.start is None else recipe.branch(val is not None)[0]
        begin = recipe.rate(leave * steps_per_epoch, steps_per_epoch) if anneal_steps else recipe.swag_lr
        swag = SwagCallback(
            rank=recipe.rank,
            start=0,
            every="epoch" if recipe.every is None else recipe.every,
            lr=recipe.swag_lr if anneal_steps else None,
            anneal_steps=anneal_steps,
            anneal=recipe.anneal,
        )
        phase = Phase(
            "SWAG",
            work.folder / "swag",
            recipe.collections,
            begin,
            "constant",
            recipe.batch_size,
            recipe.seed,
            recipe.max_grad_norm,
            None if recipe.every is None else recipe.every * recipe.collections,
        )
        train(evaluator, examples, phase, [swag], progress)
    points = {"map": states["last"], "map-best": states["best"]}
    return _Trained(evaluator, swag.posterior, points, told["nll"], told["branch_epoch"])


def _map_phase(
    work: Path, evaluator: Evaluator, examples: Encoded, val: Encoded | None, recipe: Recipe, progress: Progress
) -> tuple[dict[str, State], dict[str, Any]]:
    """The weights of the last, the best and the branching epoch; kept in a file, so that they are trained once."""
    path = work / "map.safetensors"
    if not path.is_file():
        snapshots = Snapshots(evaluator, val, *recipe.branch(val is not None))
        phase = Phase(
            "MAP",
            work / "map",
            recipe.epochs,
            recipe.lr,
            "linear",
            recipe.batch_size,
            recipe.seed,
            recipe.max_grad_norm,
        )
        train(evaluator, examples, phase, [snapshots], progress)
        states = {"last": state_of(evaluator.model), "best": snapshots.best, "branch": snapshots.branch}
        told = {"nll": snapshots.nll, "branch_epoch": snapshots.left_after}
        kept = {f"{name}/{key}": value.clone().cpu() for name, state in states.items() for key, value in state.items()}
        write_atomic(path, lambda fresh: save_file(kept, fresh, {"json": json.dumps(told)}))
        shutil.rmtree(work / "map")
    states = {"last": {}, "best": {}, "branch": {}}
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["json"])
    for key, value in load_file(path).items():
        name, _, parameter = key.partition("/")
        states[name][parameter] = value
    return states, told


def _save(folder: Path, task: Task, trained: _Trained, history: Mapping[str, Any]) -> None:
    """Everything beside the posterior first, so that a folder with a posterior in it is complete."""
    posterior: Any = trained.posterior
    for name, state in trained.points.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        if state:
            load_state(posterior.model, state)
            posterior.model.save_pretrained(str(folder / name))
    write_text(folder / HISTORY_FILE, json.dumps(history, indent=1) + "\n")
    trained.evaluator.tokenizer.save_pretrained(str(folder))
    task.save(folder)
    posterior.load_mean()
    posterior.save_pretrained(folder)


def _fingerprints(dataset: Dataset) -> dict[str, str]:
    return {name: dataset.fingerprint(name) for name in ("train", "val") if name in dataset.splits}
