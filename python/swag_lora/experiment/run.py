"""A run of the experiment: its stages, each of which leaves a file and is not repeated."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import training
from ..checkpoint import POSTERIOR_NAME
from ..evaluator import Evaluator
from ..files import write_text
from ..fit import fit
from ..positions import capacity
from ..pretrained import load_config
from ..tasks import Task
from . import report, style
from .methods import POOLED, TITLES
from .predictions import predict
from .settings import Settings
from .sources import Sources, load
from .workbench import SELECTION_FILE, Workbench

SETTINGS_FILE = "experiment.json"


@dataclass(frozen=True)
class Stage:
    """A piece of the run, done when `path` is there."""

    title: str
    path: Path
    work: Callable[[], object]

    @property
    def done(self) -> bool:
        return self.path.exists()


def reproduce(
    folder: str | Path, settings: Settings, show: bool = False, figures: bool | None = None
) -> dict[str, Any]:
    """Train every seed, predict with every method, and write the report; returns what is in `results.json`.

    The folder is described in `stored.Run`. Predictions are made in the arithmetic of training, see
    `training.arithmetic`. A run that was interrupted, at any point, goes on when it is called again with
    the same arguments and comes to the same predictions: a fit from its last whole epoch, everything else from the last
    stage that ended.

    Args:
        show: say which stage runs, with progress bars and the time left.
        figures: see `report.write`.

    Raises:
        ValueError, FileNotFoundError, ImportError: bad arguments or data, and a folder that holds another run; before
            anything is trained.
    """
    folder = Path(folder)
    if figures:
        style.check()
    sources, task, methods = prepare(settings)
    claim(folder, settings, sources, task, methods)
    plan = stages(folder, settings, sources, task, methods, show)
    console = Console(stderr=True, quiet=not show, highlight=False)
    for number, stage in enumerate(plan, 1):
        console.print(f"[{number}/{len(plan)}] {stage.title}{', done before' if stage.done else ''}", markup=False)
        if not stage.done:
            stage.work()
    return report.write(folder, figures)


def prepare(settings: Settings) -> tuple[Sources, Task, tuple[str, ...]]:
    """Read the data and check all that can be checked before training; the task is that of the first seed."""
    settings.check()
    sources = load(settings)
    settings.recipe.check(len(sources.inside.split("train")))
    methods = settings.chosen_methods(sources.validated)
    if "mc-dropout" in methods and settings.recipe.lora_dropout == 0:
        raise ValueError("MC dropout needs --lora-dropout above 0; or leave it out of --methods")
    task = Task.of(
        settings.model,
        sources.inside,
        settings.max_length,
        settings.seeds[0],
        settings.kind,
        settings.template,
        settings.train_head,
    )
    for outside in sources.outside:
        task.check(outside.dataset)
    tokenizer, model = task.tokenizer(), nn.Module()
    if not hasattr(load_config(task.model), "quantization_config"):  # quantised weights do not load without a device
        model = task.peft_model(tokenizer, settings.recipe.lora(), device="meta")
    most = capacity(model)
    if most is not None and settings.max_length > most:
        evaluator = Evaluator(task, model, tokenizer)
        for examples in (*sources.inside.splits.values(), *sources.splits().values()):
            evaluator.encode(examples)
    return sources, task, methods


def claim(folder: Path, settings: Settings, sources: Sources, task: Task, methods: tuple[str, ...]) -> None:
    """Write `experiment.json`, or find these arguments and data in it.

    Raises:
        ValueError: as `check_folder`.
    """
    check_folder(folder, settings, sources, task, methods)
    path = folder / SETTINGS_FILE
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    asked = _asked(settings, sources, task, methods)
    write_text(path, json.dumps({"format": 1, **asked, "environment": _environment()}, indent=1) + "\n")


def check_folder(folder: Path, settings: Settings, sources: Sources, task: Task, methods: tuple[str, ...]) -> None:
    """Refuse a folder that is not for these arguments and data.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    path = folder / SETTINGS_FILE
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        asked = _asked(settings, sources, task, methods)
        different = [key for key in asked if held.get(key) != asked[key]]
        if different:
            raise ValueError(
                f"{folder} holds a run with other arguments or data ({', '.join(different)}): go on with the same "
                "ones, or choose another --output"
            )
        before, now = held.get("environment", {}).get("arithmetic"), _environment()["arithmetic"]
        if before != now:
            raise ValueError(
                f"{folder} holds a run computed in {before}, and here it would go on in {now}: go on where it began, or "
                "choose another --output"
            )
    # A kill while it was written leaves its temporary name.
    elif folder.is_dir() and any(not file.match(f".{path.stem}.*.partial{path.suffix}") for file in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run: choose another --output")


def _asked(settings: Settings, sources: Sources, task: Task, methods: tuple[str, ...]) -> dict[str, Any]:
    """Of a template the text, which may change under its name."""
    template = None if settings.template is None else task.template
    asked = settings.to_dict() | sources.described() | {"methods": methods, "template": template}
    return json.loads(json.dumps(asked))


def _environment() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "arithmetic": "bfloat16" if training.native_bf16(torch.device("cuda" if cuda else "cpu")) else "float32",
    }


def stages(
    folder: Path, settings: Settings, sources: Sources, task: Task, methods: tuple[str, ...], show: bool
) -> list[Stage]:
    """In the order in which they run."""
    bench = Workbench(settings, sources, folder, show)
    plan = []
    for seed in settings.seeds:
        fits = partial(_fit, bench, task, seed, show)
        plan.append(Stage(f"fit of seed {seed}", bench.seed_folder(seed) / POSTERIOR_NAME, fits))
    for seed in settings.seeds:
        path = bench.seed_folder(seed) / SELECTION_FILE
        plan.append(Stage(f"scale for seed {seed}", path, partial(bench.select, seed)))
    for method in methods:
        seeds = (None,) if method in POOLED else settings.seeds
        for one in seeds:
            name = "all" if one is None else f"seed-{one}"
            path = folder / "predictions" / method / f"{name}.safetensors"
            title = f"{TITLES[method]}, {'all seeds' if one is None else f'seed {one}'}"
            plan.append(Stage(title, path, partial(predict, bench, method, one, path)))
    return plan


def _fit(bench: Workbench, task: Task, seed: int, show: bool) -> None:
    settings = bench.settings
    fit(
        bench.seed_folder(seed),
        settings.model,
        bench.sources.inside,
        settings.of_seed(seed),
        settings.max_length,
        show,
        replace(task, seed=seed),
        scale=0.5,
    )
