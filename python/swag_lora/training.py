"""One phase of training through a `Trainer`, which an interrupted run goes on with at the last whole epoch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .evaluator import Encoded, Evaluator, labels_of
from .files import write_text
from .metrics import nll
from .recipe import WARMUP

State = dict[str, Tensor]

_WHOLE = "whole"
_SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `epochs` or, where given, `steps`; checkpoints lie in `folder` until it has ended."""

    title: str
    folder: Path
    epochs: int
    lr: float
    schedule: str
    batch_size: int
    seed: int
    max_grad_norm: float
    steps: int | None = None


def train(
    evaluator: Evaluator, examples: Encoded, phase: Phase, callbacks: Sequence[TrainerCallback], progress: Progress
) -> None:
    """Train the evaluator's model, from the last whole checkpoint in the phase's folder if there is one.

    A checkpoint is written after each epoch, with the states of the random number generators, so that a phase which was
    killed gives the bits of one that was not.
    """
    total = phase.epochs * math.ceil(len(examples) / phase.batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = TrainingArguments(
        output_dir=str(phase.folder),
        num_train_epochs=phase.epochs,
        max_steps=phase.steps or -1,
        per_device_train_batch_size=phase.batch_size,
        learning_rate=phase.lr,
        lr_scheduler_type=phase.schedule,
        warmup_steps=round(WARMUP * total) if phase.schedule == "linear" else 0,
        weight_decay=0.0,
        max_grad_norm=phase.max_grad_norm,
        use_cpu=device.type == "cpu",
        bf16=native_bf16(device),
        seed=phase.seed,
        save_strategy="epoch",
        save_total_limit=2,  # the one before the last, until the last is marked as whole
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    checkpoint = _last_whole(phase.folder)
    trainer = TaskTrainer(
        evaluator,
        examples,
        args=arguments,
        callbacks=[*callbacks, Bar(progress, phase.title), Whole()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model = trainer.accelerator.unwrap_model(evaluator.model, keep_fp32_wrapper=False)
    # Else the next phase's Trainer would take the model for prepared, and train it without autocast.
    vars(model).pop("_is_accelerate_prepared", None)


class TaskTrainer(Trainer):
    """A `Trainer` whose logits are those of a `Task`, and whose batches are of examples of similar length."""

    def __init__(self, evaluator: Evaluator, examples: Encoded, **kwargs: Any) -> None:
        self.evaluator, self.lengths = evaluator, [example["length"] for example in examples]
        super().__init__(
            model=evaluator.model,
            train_dataset=list(examples),
            data_collator=lambda examples: evaluator.task.collate(evaluator.tokenizer, examples),
            **kwargs,
        )

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return cross_entropy(self.evaluator.task.logits(model, inputs).float(), inputs["labels"])

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        # The Trainer's own grouping by length would take the number of an example's rows for its length.
        return LengthGroupedSampler(self.args.train_batch_size, lengths=self.lengths)


class Snapshots(TrainerCallback):
    """Keeps the trained weights of two epochs: `best`, with the smallest validation NLL, and `branch`.

    `branch` is epoch `leave`, or with `best_so_far` the best up to there. Both are written into the phase's checkpoints and
    read back from them.
    """

    def __init__(self, evaluator: Evaluator, val: Encoded | None, leave: int, best_so_far: bool) -> None:
        self.evaluator, self.val = evaluator, val
        self.leave, self.best_so_far = leave, best_so_far
        self.nll: list[float] = []
        self.best: State = {}
        self.branch: State = {}
        self.left_after = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        kept = load_file(folder / f"{_SNAPSHOTS}.safetensors")
        for name in ("best", "branch"):
            prefix = f"{name}/"
            setattr(self, name, {k.removeprefix(prefix): v for k, v in kept.items() if k.startswith(prefix)})
        told = json.loads((folder / f"{_SNAPSHOTS}.json").read_text(encoding="utf-8"))
        self.nll, self.left_after = told["nll"], told["left_after"]

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = round(state.epoch)
        now = None
        if self.val:
            self.nll.append(nll(self.evaluator.point(self.val).log_probs, labels_of(self.val)))
            if self.nll[-1] == min(self.nll):
                self.best = now = state_of(self.evaluator.model)
                if self.best_so_far and epoch <= self.leave:
                    self.branch, self.left_after = now, epoch
        if epoch == self.leave and not self.best_so_far:
            self.branch, self.left_after = now or state_of(self.evaluator.model), epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        kept = {f"{name}/{k}": v for name in ("best", "branch") for k, v in getattr(self, name).items()}
        save_file({k: v.clone() for k, v in kept.items()}, folder / f"{_SNAPSHOTS}.safetensors")
        (folder / f"{_SNAPSHOTS}.json").write_text(json.dumps({"nll": self.nll, "left_after": self.left_after}))


class Whole(TrainerCallback):
    """Marks a checkpoint as whole, once all other callbacks have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer would go on from a last epoch that was cut short, past its own end.
        if float(state.epoch).is_integer():
            write_text(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _WHOLE, "")


class Bar(TrainerCallback):
    """A progress bar over optimizer steps."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.progress, self.task = progress, progress.add_task(title, total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)


def bars(show: bool, **kwargs: Any) -> Progress:
    """Progress bars with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not show, **kwargs)


def state_of(model: nn.Module) -> State:
    """The trained parameters, copied."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def load_state(model: nn.Module, state: State) -> None:
    """Set parameters, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _last_whole(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those that were not are removed."""
    whole: dict[int, Path] = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / _WHOLE).is_file():
            whole[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def arithmetic(device: torch.device) -> torch.autocast:
    """The autocast that models are trained in on a device, to predict in the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device))


def native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is native there; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
