"""What a run of the experiment left on the disk: its arguments, its predictions, and what it chose on validation data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .methods import POOLED, TITLES

TEST = "test"
_SCORES = ("entropy", "mutual_information")
_TOLD = ("samples", "members", "passes", "seconds", "scale", "rank", "temperature", "examples", "curve")
_SETTINGS = ("data", "ood", "seeds", "methods")


@dataclass(frozen=True, eq=False)
class Split:
    """The prediction for one test set.

    log_probs           [n, C]  float32
    entropy             [n]     nats
    mutual_information  [n]     nats
    labels              [n]     int64, -1 where the example has none
    """

    log_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Stored:
    """One prediction file: its test sets by name and what was written beside them (the format is in `Run`)."""

    path: Path
    splits: Mapping[str, Split]
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run's folder; predictions are read when they are asked for.

    ``experiment.json`` has the arguments; ``predictions/METHOD/seed-N.safetensors`` (``all.safetensors`` for a method
    over all seeds) the tensors ``SPLIT/log_probs``, ``SPLIT/entropy``, ``SPLIT/mutual_information``, ``SPLIT/labels``
    and the metadata ``json``; ``seed-N/selection.json`` the validation metrics at each scale.
    """

    folder: Path
    settings: Mapping[str, Any]

    @staticmethod
    def open(folder: str | Path) -> Run:
        """The run in a folder.

        Raises:
            FileNotFoundError: it has no ``experiment.json``.
            ValueError: that file is damaged, or of another format.
        """
        folder = Path(folder)
        path = folder / "experiment.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no run of the experiment: it has no experiment.json")
        settings = _json(path)
        if settings.get("format") != 1:
            raise ValueError(f"{path} has format {settings.get('format')!r}, this version reads 1")
        lacking = [key for key in _SETTINGS if key not in settings or not (settings[key] or key == "ood")]
        if not lacking and TEST not in settings["data"].get("splits", ()):
            lacking = ["the size of the test split"]
        if lacking:
            raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}")
        unknown = [method for method in settings["methods"] if method not in TITLES]
        if unknown:
            raise ValueError(f"{path} names unknown methods: {', '.join(unknown)}")
        return Run(folder, settings)

    @property
    def seeds(self) -> list[int]:
        return list(self.settings["seeds"])

    @property
    def methods(self) -> list[str]:
        """In the order of tables."""
        return [method for method in TITLES if method in self.settings["methods"]]

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each test set, "test" first."""
        inside = {TEST: int(self.settings["data"]["splits"][TEST])}
        return inside | {task["name"]: int(task["examples"]) for task in self.settings["ood"]}

    @property
    def labelled(self) -> list[str]:
        """The test sets whose labels are classes of the model."""
        return [TEST, *(task["name"] for task in self.settings["ood"] if task["labelled"])]

    def files(self, method: str) -> dict[str, Path]:
        """The prediction files that a finished run has, by seed; "all" for a method over all seeds."""
        folder = self.folder / "predictions" / method
        if method in POOLED:
            return {"all": folder / "all.safetensors"}
        return {str(seed): folder / f"seed-{seed}.safetensors" for seed in self.seeds}

    def missing(self) -> list[Path]:
        """The prediction files that are not there."""
        return [path for method in self.methods for path in self.files(method).values() if not path.is_file()]

    def check_finished(self) -> None:
        """
        Raises:
            FileNotFoundError: naming the prediction files that are missing.
        """
        if missing := self.missing():
            names = ", ".join(str(path.relative_to(self.folder)) for path in missing)
            raise FileNotFoundError(f"the run {self.folder} is not finished, it lacks {names}; start it again to go on")

    def predictions(self, method: str) -> Iterator[tuple[str, Stored]]:
        """The predictions of a method that are there, with their seed.

        Raises:
            ValueError: a file is damaged, of another method or seed, or has not the examples that the run has.
        """
        for seed, path in self.files(method).items():
            if path.is_file():
                yield seed, _read(path, method, seed, self.sizes, self.labelled)

    def selections(self) -> dict[str, Mapping[str, Any]]:
        """What each seed chose on validation data, where it has."""
        paths = {str(seed): self.folder / f"seed-{seed}" / "selection.json" for seed in self.seeds}
        return {seed: _json(path) for seed, path in paths.items() if path.is_file()}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


def _read(path: Path, method: str, seed: str, sizes: Mapping[str, int], labelled: list[str]) -> Stored:
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["json"])
            splits = {
                name: Split(*(file.get_tensor(f"{name}/{key}") for key in ("log_probs", *_SCORES, "labels")))
                for name in sizes
            }
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"the predictions {path} are damaged ({error}); remove the file and start the run again"
        ) from None
    lacking = [key for key in _TOLD if key not in told]
    lacking += [f"seconds of {name}" for name in sizes if name not in told.get("seconds", ())]
    if lacking:
        raise ValueError(f"the predictions {path} are damaged: no {', '.join(lacking)} in their metadata")
    found = "all" if told.get("seed") is None else str(told["seed"])
    if (told.get("method"), found) != (method, seed):
        raise ValueError(f"the predictions {path} are of method {told.get('method')}, seed {found}")
    for name, split in splits.items():
        _check(split, f"{name} in {path}", sizes[name], name in labelled)
    return Stored(path, splits, told)


def _check(split: Split, where: str, size: int, labelled: bool) -> None:
    shapes = [tuple(t.shape) for t in (split.entropy, split.mutual_information, split.labels)]
    if split.log_probs.ndim != 2 or any(shape != (len(split.log_probs),) for shape in shapes):
        raise ValueError(f"the predictions for {where} have shapes {tuple(split.log_probs.shape)} and {shapes}")
    if len(split.log_probs) != size:
        raise ValueError(f"the predictions for {where} are of {len(split.log_probs)} examples, the run has {size}")
    for key in ("log_probs", *_SCORES):
        wrong = getattr(split, key).isnan()
        if wrong.any():
            raise ValueError(f"{key} for {where} are NaN, first at example {int(torch.nonzero(wrong)[0, 0])}")
    if labelled and ((split.labels < 0) | (split.labels >= split.log_probs.shape[1])).any():
        raise ValueError(f"the labels for {where} are not all in [0, {split.log_probs.shape[1]})")
