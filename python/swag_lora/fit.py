"""Fine-tuning with LoRA: the point estimate, and a SWAG posterior that branches off on the way to it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from .data import Dataset
from .evaluate import Encoded, Evaluator, choose_scale
from .metrics import nll
from .posterior import SwagPosterior
from .tasks import Task
from .trainer import SwagCallback

HISTORY_FILE = "fit.json"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The point estimate (MAP) trains for `epochs` on a linear schedule with 6 % warm-up. SWAG goes on from one of its
    epochs, at the constant rate `swag_lr`, and collects at the end of each of `collections` epochs; the last `rank`
    deviations are kept. It goes on from the epoch with the smallest validation NLL: earlier it has not learned enough,
    and later the mean inherits the overconfidence. `start` names a fraction of the epochs instead; without validation
    data it is a third.

    `threads` is fixed because the sums of a backward pass on the CPU are split by thread: with it a seed gives one
    result, whatever OMP_NUM_THREADS says. One thread is also not held up by other load on the machine; larger models
    want more.
    """

    epochs: int = 15
    start: float | None = None
    collections: int = 10
    rank: int = 10
    lr: float = 1e-3
    swag_lr: float = 1e-4
    batch_size: int = 32
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    threads: int = 1

    def branch(self, validated: bool) -> int | None:
        """The epoch after which SWAG leaves, from 1 to `epochs`; None for the best on validation data."""
        if self.start is None and validated:
            return None
        return min(self.epochs, max(1, round((self.start or 1 / 3) * self.epochs)))

    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=None if self.target_modules is None else list(self.target_modules),
        )


def fit(
    folder: str | Path, model: str | Path, dataset: Dataset, recipe: Recipe, max_length: int = 128, show: bool = False
) -> dict[str, Any]:
    """Train on `dataset` and write to `folder` all that `swag-lora evaluate` needs; returns what is in `fit.json`.

    The folder holds the posterior as `SwagPosterior.save_pretrained` writes it (an adapter at the mean, and the
    moments), the point estimates as adapters in `map` and `map-best` (smallest validation NLL of all epochs), the
    tokenizer, `task.json` and `fit.json`. Without a `val` split there is no `map-best`, and the scale stays at 0.5.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the posterior needs a folder")
    if recipe.collections < 2 or recipe.rank < 2:
        raise ValueError(
            f"a covariance needs at least two collections and rank 2, got {recipe.collections} and {recipe.rank}"
        )
    train_examples = dataset.split("train")
    task = Task.of(model, dataset, max_length, recipe.seed)
    tokenizer = task.tokenizer()
    set_seed(recipe.seed)
    peft_model = task.peft_model(tokenizer, recipe.lora())
    folder.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(task, peft_model, tokenizer, recipe.batch_size, show)
    train = evaluator.encode(train_examples)
    val = evaluator.encode(dataset.splits["val"]) if "val" in dataset.splits else None

    with _threads(recipe.threads):
        snapshots = Snapshots(evaluator, val, recipe.branch(val is not None))
        _train(evaluator, train, recipe, recipe.epochs, recipe.lr, "linear", "MAP", [snapshots])
        last = _state(peft_model)
        _load(peft_model, snapshots.branch or snapshots.best)
        swag = SwagCallback(rank=recipe.rank, start=0, every="epoch")
        _train(evaluator, train, recipe, recipe.collections, recipe.swag_lr, "constant", "SWAG", [swag])
    posterior = swag.posterior
    scales = choose_scale(evaluator, posterior, val, recipe.seed) if val else {}
    if scales:
        task = replace(task, scale=min(scales, key=scales.__getitem__))
    history = {
        "recipe": asdict(recipe),
        "data": {"name": dataset.name, **{name: len(examples) for name, examples in dataset.splits.items()}},
        "validation_nll": snapshots.nll,
        "scale_nll": {f"{scale:g}": value for scale, value in scales.items()},
        "scale": task.scale,
    }
    _save(folder, task, posterior, {"map": last, "map-best": snapshots.best}, history)
    tokenizer.save_pretrained(str(folder))
    return history


class Snapshots(TrainerCallback):
    """Keeps the trained weights of the epoch with the smallest validation NLL, and those of epoch `branch_epoch`, if given."""

    def __init__(self, evaluator: Evaluator, val: Encoded | None, branch_epoch: int | None) -> None:
        self.evaluator, self.val, self.branch_epoch = evaluator, val, branch_epoch
        self.nll: list[float] = []
        self.best: State = {}
        self.branch: State = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if round(state.epoch) == self.branch_epoch:
            self.branch = _state(self.evaluator.model)
        if self.val:
            labels = torch.tensor([example["label"] for example in self.val])
            self.nll.append(nll(self.evaluator.point(self.val).log_probs, labels))
            if self.nll[-1] == min(self.nll):
                self.best = _state(self.evaluator.model)


class Bar(TrainerCallback):
    """A progress bar over optimizer steps."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.task = progress, progress.add_task(title, total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)


class TaskTrainer(Trainer):
    """A `Trainer` whose logits are those of a `Task`."""

    def __init__(self, evaluator: Evaluator, **kwargs: Any) -> None:
        self.evaluator = evaluator
        super().__init__(
            model=evaluator.model,
            data_collator=lambda examples: evaluator.task.collate(evaluator.tokenizer, examples),
            **kwargs,
        )

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return cross_entropy(self.evaluator.task.logits(model, inputs).float(), inputs["labels"])


def _train(
    evaluator: Evaluator,
    train: Encoded,
    recipe: Recipe,
    epochs: int,
    lr: float,
    schedule: str,
    title: str,
    callbacks: list[TrainerCallback],
) -> None:
    steps = epochs * math.ceil(len(train) / recipe.batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(console=Console(stderr=True), disable=not evaluator.show) as progress,
    ):
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=lr,
            lr_scheduler_type=schedule,
            warmup_steps=round(0.06 * steps) if schedule == "linear" else 0,
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            use_cpu=device.type == "cpu",
            bf16=_bf16(device),
            seed=recipe.seed,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = TaskTrainer(
            evaluator, args=arguments, train_dataset=list(train), callbacks=[*callbacks, Bar(progress, title)]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(evaluator.model, keep_fp32_wrapper=False)


def _save(
    folder: Path, task: Task, posterior: SwagPosterior, points: Mapping[str, State], history: Mapping[str, Any]
) -> None:
    """Everything beside the posterior first, so that a folder with a posterior in it is complete."""
    model: Any = posterior.model
    for name, state in points.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        if state:
            _load(model, state)
            model.save_pretrained(str(folder / name))
    (folder / HISTORY_FILE).write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    task.save(folder)
    posterior.load_mean()
    posterior.save_pretrained(folder)


def _state(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _load(model: nn.Module, state: State) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is native there; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
