"""What a run of the experiment was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..recipe import PRESETS, Recipe
from .methods import NEED_VALIDATION, TITLES

AUTO = "auto"


@dataclass(frozen=True)
class Settings:
    """The arguments of a run; the same ones on the same folder continue it.

    `ood` are shifted tasks, whose classes are those of `data`; of `ood_unlabelled` only the inputs count, and how well
    they are told from the test split. An `oos_test` split of `data` is one of these. `limits` are the most examples of a
    split (`train`, `val`, `test`, and `ood` for each out-of-distribution task), drawn at random but the same for every
    seed. The `scale` "auto" is chosen on validation data, and with `choose_rank` how many of the deviations are used.
    `samples` are those of each posterior, so that a mixture of M has M times as many.
    """

    model: str
    data: str
    ood: tuple[str, ...] = ()
    ood_unlabelled: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    recipe: Recipe = PRESETS["swag-lora"]
    samples: int = 32
    scale: float | str = AUTO
    choose_rank: bool = False
    methods: tuple[str, ...] | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    val_fraction: float | None = None
    max_length: int = 128
    batch_size: int = 32
    kind: str | None = None
    template: str | None = None
    train_head: bool = False

    def check(self) -> None:
        """
        Raises:
            ValueError: what no data could make right.
        """
        self.recipe.check()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"the seeds must be different numbers from 0 to 2^32 - 1, at least one: got {self.seeds}")
        if self.samples < 2 or self.samples % 2:
            raise ValueError(
                f"samples come in antithetic pairs: their number must be even and at least 2, got {self.samples}"
            )
        unknown = [method for method in self.methods or () if method not in TITLES]
        if unknown:
            raise ValueError(f"no method {unknown[0]!r}: there are {', '.join(TITLES)}")
        if self.methods is not None and not self.methods:
            raise ValueError(f"no methods are named: there are {', '.join(TITLES)}")
        if self.scale != AUTO and not (
            isinstance(self.scale, (int, float)) and math.isfinite(self.scale) and self.scale >= 0
        ):
            raise ValueError(f"the scale must be {AUTO!r} or a finite number, not negative, got {self.scale!r}")
        for name, limit in self.limits.items():
            if name not in ("train", "val", "test", "ood"):
                raise ValueError(f"no split {name!r} to limit: there are train, val, test and ood")
            if limit < 1:
                raise ValueError(f"the limit of {name} must be at least 1, got {limit}")

    def chosen_methods(self, validated: bool) -> tuple[str, ...]:
        """In the order of tables; all that the data allow, if none are named.

        Raises:
            ValueError: a choice on validation data, and there is none.
        """
        way_out = "the data have no val split: give them one, or hold out a part of train with --val-fraction 0.2"
        if not validated:
            if self.scale == AUTO:
                raise ValueError(f"--scale auto chooses on validation data, and {way_out}, or a number with --scale")
            if self.choose_rank:
                raise ValueError(f"--rank auto chooses on validation data, and {way_out}")
            needing = [method for method in self.methods or () if method in NEED_VALIDATION]
            if needing:
                raise ValueError(f"{needing[0]} needs validation data, and {way_out}")
        wanted = TITLES if self.methods is None else self.methods
        methods = (method for method in TITLES if method in wanted)
        return tuple(method for method in methods if validated or method not in NEED_VALIDATION)

    def of_seed(self, seed: int) -> Recipe:
        return replace(self.recipe, seed=seed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
