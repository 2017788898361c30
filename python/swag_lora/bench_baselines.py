"""What a way to average K posterior samples is to `swag-lora bench`, and the ways that the one pass is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.func import functional_call, vmap

from .bench_case import RANK, SCALE, Adapted, Case
from .loop import Loop
from .prediction import Prediction
from .tasks import Task
from .twin import twin_of

Run = Callable[[], Tensor]


class TooSlow(Exception):
    """A strategy's preparation ran past its deadline."""


class Strategy(Protocol):
    """A way to average K samples.

    name        in the table
    late        whether it is of the model with LoRA on its last quarter of layers
    draws_own   whether it draws its own samples, so that it can be compared with no other
    """

    name: str
    late: bool
    draws_own: bool

    def held_bytes(self, case: Case) -> int:
        """Beside the case's weights, while the strategy is prepared."""

    def passing_bytes(self, case: Case) -> int:
        """During a call."""

    def per_pass(self, case: Case) -> int:
        """Samples in one forward pass."""

    def prepare(self, case: Case, deadline: float) -> Run:
        """The function to time: log-probabilities ``[B, C]`` of the batch, averaged over the samples.

        Raises:
            TooSlow: not done by `deadline`, a time of `time.perf_counter`.
        """


@dataclass
class _Loop:
    """One sample passes at a time, and the model's weights are set before each."""

    name: str
    late: bool
    draws_own: bool

    def held_bytes(self, case: Case) -> int:
        return 8 * case.adapted.posterior.layout.size * (RANK + 2) if self.draws_own else 0

    def passing_bytes(self, case: Case) -> int:
        return case.hidden_bytes(1) + 2 * case.logit_bytes(case.samples)

    def per_pass(self, case: Case) -> int:
        return 1

    def prepare(self, case: Case, deadline: float) -> Run:
        adapted = case.adapted
        loop = Loop(Task("", labels=()), adapted.model, adapted.posterior, SCALE)
        if self.draws_own:
            return lambda: loop.resampled(case.inputs, case.samples).log_probs
        weights = case.weights
        return lambda: loop.kept(case.inputs, weights, case.antithetic).log_probs


def published() -> Strategy:
    """The published algorithm: a full-rank sample drawn on the host for every batch and sample, K forward passes."""
    return _Loop("published loop", late=False, draws_own=True)


def prebuilt(late: bool = False) -> Strategy:
    """Weights drawn once, set one after another, K forward passes."""
    return _Loop("late axis, prebuilt loop" if late else "prebuilt loop", late, draws_own=False)


@dataclass
class AdapterNames:
    """K adapters loaded in one PEFT model, and one mixed batch of K·B rows that names an adapter for each row.

    The adapters are loaded as K grows: a case adds those that smaller ones have not loaded.
    """

    name: str = "PEFT adapter_names"
    late: bool = False
    draws_own: bool = False
    _model: PeftModel | None = None

    def held_bytes(self, case: Case) -> int:
        return case.samples * case.adapted.sample_bytes

    def passing_bytes(self, case: Case) -> int:
        return case.hidden_bytes(case.samples) + 2 * case.logit_bytes(case.samples)

    def per_pass(self, case: Case) -> int:
        return case.samples

    @torch.no_grad()
    def prepare(self, case: Case, deadline: float) -> Run:
        names = [f"s{index}" for index in range(case.samples)]
        model = self._loaded(case.adapted, names, deadline)
        parameters = dict(model.named_parameters())
        for name, stacked in case.weights.items():
            for adapter, value in zip(names, stacked, strict=True):
                parameters[name.replace(".default.", f".{adapter}.")].copy_(value)
        repeated = {
            name: value.repeat(case.samples, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) else value
            for name, value in case.inputs.items()
        }
        rows = [adapter for adapter in names for _ in range(case.batch)]

        @torch.no_grad()
        def run() -> Tensor:
            logits = model(**repeated, adapter_names=rows).logits
            return Prediction.from_logits(logits.unflatten(0, (case.samples, case.batch)), case.antithetic).log_probs

        return run

    def _loaded(self, adapted: Adapted, names: list[str], deadline: float) -> PeftModel:
        if self._model is None:
            base: Any = twin_of(adapted.model)
            base = base.unload()
            self._model = get_peft_model(base, adapted.lora, names[0], autocast_adapter_dtype=False).eval()
        for name in names:
            if name in self._model.peft_config:
                continue
            if time.perf_counter() > deadline:
                raise TooSlow(f"loaded {len(self._model.peft_config)} adapters of {len(names)} until then")
            self._model.add_adapter(name, adapted.lora, autocast_adapter_dtype=False)
        return self._model.eval()


class Batched:
    """What strategies share in which several samples pass at a time."""

    late = False
    draws_own = False

    def held_bytes(self, case: Case) -> int:
        return 0

    def passing_bytes(self, case: Case) -> int:
        step = self.per_pass(case)
        return case.hidden_bytes(step) + 2 * case.logit_bytes(step)

    def per_pass(self, case: Case) -> int:
        return case.samples_per_pass


class Vmap(Batched):
    """`torch.func.functional_call` of the model, mapped over stacked weights by `torch.func.vmap`."""

    name = "vmap"

    def passing_bytes(self, case: Case) -> int:
        return super().passing_bytes(case) + case.logit_bytes(case.samples)

    def prepare(self, case: Case, deadline: float) -> Run:
        model, weights = case.adapted.model, dict(case.weights)

        def forward(sample: dict[str, Tensor]) -> Tensor:
            return functional_call(model, sample, kwargs=dict(case.inputs)).logits

        mapped = vmap(forward, chunk_size=case.samples_per_pass)

        @torch.no_grad()
        def run() -> Tensor:
            return Prediction.from_logits(mapped(weights), case.antithetic).log_probs

        return run
