"""SWAG during `transformers.Trainer` training, as a callback."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from . import checkpoint
from .layout import Selection
from .posterior import SwagPosterior

logger = logging.get_logger(__name__)

# Two folders deep: the Trainer loads each direct subfolder of a checkpoint that holds an adapter into the model.
SUBFOLDER = os.path.join("swag", "posterior")

_START_RATE = "swag_start_lr"


class SwagCallback(TrainerCallback):
    """Collects a `SwagPosterior` over the tail of a `Trainer`'s training.

        callback = SwagCallback(rank=20, start=0.5, every="epoch", lr=1e-4)
        Trainer(model=peft_model, args=args, callbacks=[callback], ...).train()
        callback.posterior.save_pretrained(folder)

    A step here is an optimizer step, whatever the gradient accumulation. Of T steps the first `start` train as they
    would without the callback. After that the weights are collected at the end of every `every`-th step or of every
    epoch, before a checkpoint of the same step is written; a collection is passed over if no step changed the weights
    since the last one (a gradient scaler skipped them).

    Over several processes each rank collects: the whole under DistributedDataParallel, its shards under FSDP2.

    The posterior is saved with each checkpoint, as `checkpoint-N/swag/posterior`, and
    `trainer.train(resume_from_checkpoint=...)` continues with it, so that a resumed run collects what an uninterrupted
    one would.

    Without a `Trainer` the same is a call in the training loop:

        posterior = SwagPosterior(peft_model)
        for step, batch in enumerate(batches):
            peft_model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= start and (step - start + 1) % every == 0:
                posterior.collect()

    Args:
        posterior: to collect into, made from the model that is trained; it goes on from what it holds. None makes a
            new one for each training, of `rank` and `params` (see `SwagPosterior`), which is then at
            `callback.posterior`.
        rank, params: of a new posterior.
        start: where collecting begins, an int in steps or a float in [0, 1) as a fraction of all steps.
        every: steps between collections, or "epoch".
        lr: learning rate from `start` on, in place of the `Trainer`'s schedule; one for all parameter groups or one
            for each. None leaves the schedule alone.
        anneal_steps: steps from the schedule's rate at `start` to `lr`; 0 goes there at once.
        anneal: "cosine" or "linear", as `torch.optim.swa_utils.SWALR`.

    Raises:
        ValueError, TypeError: for arguments out of range.
        RuntimeError: when training begins, if the posterior belongs to another model, no optimizer step is left after
            `start`, `lr` does not fit the parameter groups, or a resumed checkpoint is not found.
    """

    def __init__(
        self,
        posterior: SwagPosterior | None = None,
        *,
        rank: int = 20,
        params: Selection = "trainable",
        start: float = 0.5,
        every: int | Literal["epoch"] = "epoch",
        lr: float | Sequence[float] | None = None,
        anneal_steps: int = 0,
        anneal: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        if isinstance(start, bool) or not isinstance(start, (int, float)):
            raise TypeError(f"start must be a number of steps (int) or a fraction of them (float), got {start!r}")
        if start < 0 or (isinstance(start, float) and not start < 1):
            raise ValueError(f"start must be a number of steps (int) or a fraction in [0, 1), got {start}")
        if every != "epoch" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every must be 'epoch' or a number of steps, at least 1, got {every!r}")
        self._lr = [] if lr is None else list(lr) if isinstance(lr, Sequence) else [lr]
        if not all(math.isfinite(rate) and rate >= 0 for rate in self._lr):
            raise ValueError(f"lr must be finite and at least 0, got {lr}")
        if anneal_steps < 0 or (anneal_steps and lr is None):
            raise ValueError(f"anneal_steps must be at least 0, and 0 without lr, got {anneal_steps}")
        if anneal not in ("cosine", "linear"):
            raise ValueError(f"anneal must be 'cosine' or 'linear', got {anneal!r}")
        self._posterior = posterior
        self.rank, self.params = rank, params
        self.start, self.every = start, every
        self.lr, self.anneal_steps, self.anneal = lr, anneal_steps, anneal
        self._owns_posterior = posterior is None
        self._start_step = 0
        self._changed = False

    @property
    def posterior(self) -> SwagPosterior:
        """The posterior collected into; without one of the caller's it exists once training has begun."""
        if self._posterior is None:
            raise RuntimeError("there is no posterior yet: it is made when training begins")
        return self._posterior

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        optimizer = kwargs["optimizer"]
        start = round(self.start * state.max_steps) if isinstance(self.start, float) else self.start
        if start >= state.max_steps:
            raise RuntimeError(f"collecting starts after step {start}, but training ends at step {state.max_steps}")
        self._start_step, self._changed = start, False
        if self.lr is not None:
            self._rates(optimizer)
        if state.global_step <= start:
            for group in optimizer.param_groups:
                group.pop(_START_RATE, None)
        posterior = self._posterior_for(model, args)
        if state.global_step:
            self._restore(posterior, args, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = state.global_step - self._start_step
        if self.lr is None or steps < 0:
            return
        alpha = min(1.0, steps / self.anneal_steps) if self.anneal_steps else 1.0
        if self.anneal == "cosine":
            alpha = (1 - math.cos(math.pi * alpha)) / 2
        groups = kwargs["optimizer"].param_groups
        for group, target in zip(groups, self._rates(kwargs["optimizer"]), strict=True):
            # Kept in the group because the optimizer's state is saved and restored with a checkpoint.
            begin = group.setdefault(_START_RATE, float(group["lr"]))
            rate = target if alpha == 1 else begin + alpha * (target - begin)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        # The Trainer logs this list. The scheduler computes it anew from its own base rates at its next step.
        scheduler = kwargs["lr_scheduler"]
        scheduler = getattr(scheduler, "scheduler", scheduler)
        scheduler._last_lr = [float(group["lr"]) for group in groups]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._changed |= not getattr(kwargs["optimizer"], "step_was_skipped", False)
        # Here and not in on_epoch_end, which comes after the epoch's last checkpoint by steps has been written.
        due = (
            float(state.epoch).is_integer()
            if self.every == "epoch"
            else (state.global_step - self._start_step) % self.every == 0
        )
        if due:
            self._collect(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # An epoch cut short, or of a data set without a length.
        if self.every == "epoch":
            self._collect(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A hyperparameter search writes to folders that callbacks are not told.
        if state.is_hyper_param_search or not int(self.posterior.count):
            return
        # Shards are gathered from every rank. Whole, each rank that the Trainer has save does so, one on each node maybe.
        if args.should_save or self.posterior.sharding is not None:
            checkpoint.write(self.posterior, os.path.join(_checkpoint_folder(args, state), SUBFOLDER))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        count = int(self.posterior.count)
        if count < 2:
            logger.warning(
                f"SwagCallback collected {count} times in {state.global_step} steps with start={self.start} and "
                f"every={self.every!r}; a posterior needs at least two collections"
            )

    def _collect(self, state: TrainerState) -> None:
        if self._changed and state.global_step > self._start_step:
            self.posterior.collect()
            self._changed = False

    def _rates(self, optimizer: torch.optim.Optimizer) -> list[float]:
        groups = len(optimizer.param_groups)
        rates = self._lr if len(self._lr) != 1 else self._lr * groups
        if len(rates) != groups:
            raise RuntimeError(f"lr has {len(rates)} values for the optimizer's {groups} parameter groups")
        return rates

    def _posterior_for(self, model: nn.Module, args: TrainingArguments) -> SwagPosterior:
        if self._owns_posterior:
            self._posterior = SwagPosterior(model, rank=self.rank, params=self.params)
        elif self.posterior.model is not model:
            raise RuntimeError(
                "the posterior was made from another model than the Trainer trains: pass SwagPosterior(trainer.model)"
            )
        try:
            parameters = self.posterior.local_parameters(model)
        except ValueError as error:
            raise RuntimeError(
                f"the posterior does not fit the model as the Trainer has prepared it: {error}. SwagCallback(rank=…, "
                "params=…) makes a posterior that does"
            ) from error
        self.posterior.replicated = args.world_size > 1 and self.posterior.sharding is None
        return self.posterior.to(parameters[0].device)

    def _restore(self, posterior: SwagPosterior, args: TrainingArguments, state: TrainerState) -> None:
        """Bring back what the posterior held when the checkpoint was written, which may be nothing."""
        resumed = _resumed_folder(args, state)
        if resumed is None:
            raise RuntimeError(
                f"training resumes at step {state.global_step}, but its checkpoint is not in {args.output_dir}, so a "
                "posterior in it is not found; set TrainingArguments.resume_from_checkpoint to the checkpoint's folder"
            )
        folder = os.path.join(resumed, SUBFOLDER)
        if os.path.isfile(os.path.join(folder, checkpoint.POSTERIOR_NAME)):
            saved = SwagPosterior.from_pretrained(posterior.model, folder)
            if difference := posterior.layout.difference(saved.layout):
                raise RuntimeError(f"the posterior in {folder} is over other parameters: {difference}")
            posterior.load_state_dict(saved.state_dict())
        else:
            for tensor in posterior.state_dict().values():
                tensor.zero_()


def _resumed_folder(args: TrainingArguments, state: TrainerState) -> str | None:
    """The folder whose trainer state is `state`: the Trainer does not tell callbacks what it resumes from."""
    for folder in (args.resume_from_checkpoint, _checkpoint_folder(args, state)):
        path = os.path.join(folder or "", TRAINER_STATE_NAME)
        if folder and os.path.isfile(path):
            saved = TrainerState.load_from_json(path)
            if saved.global_step == state.global_step and _history(saved) == _history(state):
                return folder
    return None


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _history(state: TrainerState) -> str:
    # As text, because a logged NaN does not equal itself.
    return json.dumps(state.log_history, sort_keys=True)
