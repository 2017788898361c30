"""How to train: the point estimate, and the SWAG phase that branches off on the way to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig

WARMUP = 0.06


@dataclass(frozen=True)
class Recipe:
    """How to train, with AdamW without weight decay.

    The point estimate (MAP) trains for `epochs` on a linear schedule with 6 % warm-up. SWAG goes on from one of its
    epochs and collects `collections` times, at the end of each epoch or every `every` optimizer steps; the last `rank`
    deviations are kept. Its rate is `swag_lr`, at once or, over `anneal_epochs` epochs, from the rate the schedule had
    where SWAG begins.

    It begins at the epoch with the smallest validation NLL: earlier it has not learned enough, and later the mean inherits
    the overconfidence. `start` names a fraction of the epochs instead, and with `restart_best` the best epoch up to
    there; without validation data it begins after `start`, by default a third.

    Gradients whose norm exceeds `max_grad_norm` are scaled down to it; 0 leaves them as they are.

    `threads` is fixed because the sums of a backward pass on the CPU are split by thread: with it a seed gives one
    result, whatever OMP_NUM_THREADS says. One thread is also not held up by other load on the machine; larger models
    want more.
    """

    epochs: int = 15
    start: float | None = None
    restart_best: bool = False
    collections: int = 10
    every: int | None = None
    rank: int = 10
    lr: float = 1e-3
    swag_lr: float = 1e-4
    anneal_epochs: int = 0
    anneal: Literal["linear", "cosine"] = "linear"
    max_grad_norm: float = 1.0
    batch_size: int = 32
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.1
    target_modules: tuple[str, ...] | None = None
    seed: int = 0
    threads: int = 1

    def check(self, examples: int | None = None) -> None:
        """`examples` are those of the training split, where they are known.

        Raises:
            ValueError: what leaves no covariance, or ends before the rate is annealed.
        """
        if self.collections < 2 or self.rank < 2:
            raise ValueError(
                f"a covariance needs at least two collections and rank 2, got {self.collections} and {self.rank}"
            )

        if examples is not None:
            epoch = self.steps_per_epoch(examples)
            anneal, steps = self.anneal_epochs * epoch, self.collections * (self.every or epoch)
            if steps < anneal:
                raise ValueError(
                    f"the {self.collections} collections end after {steps} steps, the rate is annealed over {anneal}: "
                    "take fewer --anneal-epochs, or more --collections"
                )

    def steps_per_epoch(self, examples: int) -> int:
        return math.ceil(examples / self.batch_size)

    def branch(self, validated: bool) -> tuple[int, bool]:
        """The epoch after which SWAG leaves, and whether it is instead the best on validation data up to there."""
        if self.start is None and validated:
            return self.epochs, True
        return min(self.epochs, max(1, round((self.start or 1 / 3) * self.epochs))), validated and self.restart_best

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The rate of the linear schedule after `step` steps."""
        total = self.epochs * steps_per_epoch
        warmup = round(WARMUP * total)
        if step < warmup:
            return self.lr * step / warmup
        return self.lr * (total - step) / max(1, total - warmup)

    def lora(self) -> LoraConfig:
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=None if self.target_modules is None else list(self.target_modules),
        )


PRESETS = {
    "default": Recipe(),
    "swag-lora": Recipe(
        epochs=15,
        start=8 / 15,
        restart_best=True,
        collections=7,
        rank=5,
        lr=1e-4,
        swag_lr=1e-5,
        anneal_epochs=5,
        max_grad_norm=0.0,
        batch_size=32,
        lora_rank=8,
        lora_alpha=16,
        lora_dropout=0.1,
    ),
}
"""`default` trains small encoders in minutes. `swag-lora` has the values of the configuration that Onal et al. (2024)
published with their code: 15 epochs in all, SWAG from the best validation epoch after 8, its rate annealed over 5 epochs, no
gradient clipped. Beside theirs, the point estimate goes on to its own 15th epoch, and the moments of AdamW start anew with
SWAG."""
