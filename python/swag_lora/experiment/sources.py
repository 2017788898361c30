"""The data of a run: the task in distribution, and those out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import data
from ..data import Dataset
from ..examples import Example
from .settings import Settings

TEST = "test"
_SUFFIX = re.compile(r"\.jsonl(\.gz)?$")


@dataclass(frozen=True)
class Outside:
    """A task out of distribution: the examples of its one split, and whether their labels are classes of the model."""

    name: str
    dataset: Dataset
    labelled: bool

    @property
    def examples(self) -> list[Example]:
        return self.dataset.split(TEST)


@dataclass(frozen=True)
class Sources:
    """Everything a run predicts."""

    inside: Dataset
    outside: tuple[Outside, ...]

    @property
    def validated(self) -> bool:
        return "val" in self.inside.splits

    def splits(self) -> dict[str, list[Example]]:
        """What is predicted, by name."""
        return {TEST: self.inside.split(TEST), **{task.name: task.examples for task in self.outside}}

    def fingerprints(self) -> dict[str, str]:
        inside = {name: self.inside.fingerprint(name) for name in self.inside.splits}
        return inside | {task.name: task.dataset.fingerprint(TEST) for task in self.outside}

    def described(self) -> dict[str, Any]:
        """For `experiment.json`."""
        labels = None if self.inside.labels is None else list(self.inside.labels)
        sizes = {name: len(examples) for name, examples in self.inside.splits.items()}
        return {
            "data": {"name": self.inside.name, "labels": labels, "splits": sizes},
            "ood": [
                {"name": task.name, "labelled": task.labelled, "examples": len(task.examples)} for task in self.outside
            ],
            "fingerprints": self.fingerprints(),
        }


def load(settings: Settings) -> Sources:
    """Read all data, and refuse what would only show after training.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `data.load`; no test split, or a task out of distribution that is of
            another kind or has other classes.
    """
    whole = data.load(settings.data, val_fraction=settings.val_fraction)
    whole.split("train")
    whole.split(TEST)
    splits: Mapping[str, list[Example]] = {
        name: whole.splits[name] for name in ("train", "val", TEST) if name in whole.splits
    }
    inside = replace(whole, splits=splits).subset(settings.limits)
    limit = {TEST: settings.limits["ood"]} if "ood" in settings.limits else {}
    outside = []
    named = (*settings.ood, *settings.ood_unlabelled)
    twice = next((source for source in named if named.count(source) > 1), None)
    if twice is not None:
        raise ValueError(f"the task {twice} is named twice")
    if "oos_test" in whole.splits:
        unlabelled = Dataset(f"{whole.name} oos_test", {TEST: whole.splits["oos_test"]}, whole.labels)
        outside.append(Outside("oos_test", unlabelled.subset(limit), False))
    for source in named:
        found = data.load_outside(source, inside.labels, labelled=source in settings.ood)
        labelled = data.check_shift(inside, found)
        name = _name(source, {"train", "val", TEST, *(task.name for task in outside)})
        outside.append(Outside(name, found.subset(limit), labelled))
    return Sources(inside, tuple(outside))


def _name(source: str, taken: set[str]) -> str:
    """The last part of a path, with the one before where that is taken, as in mmlu/law.jsonl.gz."""
    parts = [part for part in Path(_SUFFIX.sub("", source)).parts if part not in ("/", ".", "..")]
    for count in range(1, len(parts) + 1):
        name = "-".join(parts[-count:]).replace(":", "-")
        if name not in taken:
            return name
    raise ValueError(f"the task {source} is named twice")
