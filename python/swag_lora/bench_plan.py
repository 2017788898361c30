"""What `swag-lora bench` sweeps, and how long a case will take."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .bench_strategies import FAMILIES
from .shapes import Shape


@dataclass(frozen=True)
class Settings:
    """What is swept. `seconds` is how long a strategy is timed in a case, `limit` how long it may take there in all."""

    shape: Shape
    samples: tuple[int, ...]
    batches: tuple[int, ...] = (1, 16)
    lengths: tuple[int, ...] = (32,)
    families: tuple[str, ...] = FAMILIES
    lora_rank: int = 8
    targets: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seconds: float = 2.0
    limit: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batches", "lengths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be whole numbers of at least 1, got {', '.join(map(str, values))}")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        if not self.families:
            raise ValueError(f"no strategy to time; known are {', '.join(FAMILIES)}")
        positions = self.shape.positions
        if positions is not None and self.lengths[-1] > positions:
            raise ValueError(
                f"{self.shape.name} takes at most {positions} tokens, {self.lengths[-1]} were asked for (--seq)"
            )
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no GPU: take --device cpu")


@dataclass
class Pace:
    """What strategies have taken so far, and what they would take next: time in proportion to K, B and T."""

    known: dict[str, dict[tuple[int, int, int], tuple[float, float]]] = field(default_factory=dict)

    def record(self, strategy: str, case: tuple[int, int, int], setup: float, call: float) -> None:
        self.known.setdefault(strategy, {})[case] = (setup, call)

    def estimate(self, strategy: str, case: tuple[int, int, int]) -> tuple[float, float] | None:
        """Seconds of preparation and of a call, from the most samples timed on this batch, else from the largest case."""
        known = self.known.get(strategy)
        if not known:
            return None
        same = [key for key in known if key[1:] == case[1:]]
        nearest = max(same or known, key=lambda key: key[0] * key[1] * key[2])
        setup, call = known[nearest]
        growth = case[0] / nearest[0]
        return setup * growth, call * growth * (case[1] * case[2]) / (nearest[1] * nearest[2])
