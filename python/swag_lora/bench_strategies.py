"""The ways to average K posterior samples that `swag-lora bench` times: one pass, and what it is compared with."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swag_kernels import backend
from swag_kernels.backend import BACKENDS, choose

from .bench_baselines import AdapterNames, Batched, Run, Strategy, Vmap, prebuilt, published
from .bench_case import SCALE, Case
from .predictor import Predictor
from .weights import SampledWeights

FAMILIES = ("published", "prebuilt", "adapter-names", "vmap", "one-pass", "late-axis")


@dataclass
class _Drawn:
    """A posterior whose samples are drawn already, so that every strategy averages the same ones."""

    weights: SampledWeights

    def draw(self, num_samples: int, *, seed: int, first: int, scale: float, method: str) -> SampledWeights:
        rows = self.weights.buffer[first : first + num_samples]
        return SampledWeights(self.weights.layout, rows, seed=seed, first=first, method=method)


@dataclass
class OnePass(Batched):
    """Samples side by side in one pass of a `SampledModel`, in several passes where one would be too large.

    Args:
        server: the back end that serves the ops, None for the device's own choice.
        late: on the model with LoRA on its last quarter of layers, where the sample axis begins late.
        from_start: make the axis begin with the first layer nevertheless, by asking for the hidden states.
    """

    name: str
    server: str | None = None
    late: bool = False
    from_start: bool = False
    draws_own: bool = field(default=False, init=False)

    def passing_bytes(self, case: Case) -> int:
        layers = case.adapted.sizes.layers + 1 if self.from_start else 0
        kept = layers * case.hidden_bytes(self.per_pass(case)) // 8  # of a layer's, at most an eighth is its output
        return super().passing_bytes(case) + kept

    def prepare(self, case: Case, deadline: float) -> Run:
        inputs = {**case.inputs, **({"output_hidden_states": True} if self.from_start else {})}
        method = "antithetic" if case.antithetic else "iid"
        with self._served():
            predictor = Predictor(
                case.adapted.model,
                _Drawn(case.weights),
                case.samples,
                scale=SCALE,
                method=method,
                samples_per_pass=case.samples_per_pass,
            )

        def run() -> Tensor:
            with self._served():
                return predictor(inputs).log_probs

        return run

    def _served(self) -> Any:
        return nullcontext() if self.server is None else backend(self.server)


def backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The back ends that serve tensors on `device` here; Triton's interpreter on the CPU is none to time."""
    found = []
    for name in BACKENDS:
        if name == "triton" and device.type == "cpu":
            continue
        try:
            with backend(name):
                choose(device, dtype)
        except RuntimeError:
            continue
        found.append(name)
    return found


def strategies(families: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[Strategy]:
    """The strategies of these families, in the order of the table.

    Raises:
        ValueError: a family that is none of `FAMILIES`.
    """
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise ValueError(f"no strategy is called {unknown[0]!r}; known are {', '.join(FAMILIES)}")
    made: dict[str, list[Strategy]] = {
        "published": [published()],
        "prebuilt": [prebuilt()],
        "adapter-names": [AdapterNames()],
        "vmap": [Vmap()],
        "one-pass": [OnePass(f"one pass, {name}", name) for name in backends(device, dtype)],
        "late-axis": [
            OnePass("late axis", late=True),
            OnePass("late axis, from start", late=True, from_start=True),
        ],
    }
    return [strategy for family in FAMILIES if family in families for strategy in made[family]]
