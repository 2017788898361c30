"""What has been averaged so far, in a file from which an interrupted call goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swag_kernels import AverageState

from .files import write_atomic
from .plan import Plan
from .prediction import Average, Prediction
from .ranks import Ranks, digest

KIND = "swag_lora.progress"
_STATE = ("log_sum", "m2", "votes", "mean_entropy", "count")


class Progress:
    """The parts of a call that are done, and the state of the one that is not.

    A part is the examples of one pass; of those that are done the file keeps the prediction, of the one in work the
    running average over some chunks of samples. It is replaced in one step, so that a process killed at any moment leaves
    the last state or the one before. Ranks along "data" keep a file each, ``<path>.<rank>``.

    Args:
        path: the file, or None to keep nothing.
        every: chunks between two writes.
        ranks: this process's place; the first rank along "samples" writes.
        drawn: the first samples of the posterior, by which the file knows it.
        told: the arguments it belongs to.

    Raises:
        ValueError: the file is of another posterior or other arguments, or is none of ours.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, every: int, ranks: Ranks, drawn: Mapping[str, Tensor], told: object
    ) -> None:
        if every < 1:
            raise ValueError(f"save_every must be at least 1, got {every}")
        self.every, self.ranks = every, ranks
        self.path = None if path is None else Path(f"{path}.{ranks.data_rank}" if ranks.data > 1 else path)
        self.plans: dict[str, Plan] = {}
        self._part = 0
        self._done: list[dict[str, Tensor]] = []
        self._inputs: list[str] = []
        self._running: dict[str, Tensor] = {}
        self._chunks = 0
        if self.path is None:
            return
        if not self.path.resolve().parent.is_dir():
            raise ValueError(f"no folder {self.path.resolve().parent} for the resume file {self.path}")
        self._owner = f"{digest(drawn)} {told!r} data {ranks.data}"
        loaded = ranks.first_s(self._load())
        if loaded is not None:
            self._done, self._inputs, self._running, self._chunks, self.plans = loaded

    def part(
        self, inputs: dict[str, Any], plan: Plan, compute: Callable[[dict[str, Any], Plan, Part], Prediction]
    ) -> Prediction:
        """The prediction for the next part: from the file, or computed and added to it.

        Raises:
            ValueError: the file has this part for other inputs or another plan.
        """
        if self.path is None:
            return compute(inputs, plan, Part(None, 0))
        index, self._part = self._part, self._part + 1
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        owner = f"{digest(tensors)} {plan.samples}"
        if index < len(self._inputs) and self._inputs[index] != owner:
            raise ValueError(
                f"{self.path} was written for other data or other samples_per_pass (part {index} differs): delete it to "
                "begin anew"
            )
        if index < len(self._done):
            device = next(iter(tensors.values())).device
            return _prediction(self._done[index]).to(device)
        if index == len(self._inputs):
            self._inputs.append(owner)
        prediction = compute(inputs, plan, Part(self, self._chunks))
        self._done.append(_tensors(prediction))
        self._running, self._chunks = {}, 0
        self._write()
        return prediction

    def save(self, average: Average, chunks: int) -> None:
        if chunks % self.every == 0 and average.state is not None:
            self._running = {name: getattr(average.state, name).cpu() for name in _STATE}
            self._running["shape"] = torch.tensor(average.shape)
            self._chunks = chunks
            self._write()

    def restore(self, average: Average) -> None:
        running = self._running
        if not running:
            return
        batch, classes = running["log_sum"].shape
        average.shape = torch.Size(running["shape"].tolist())
        state = average.state = AverageState(batch, classes, "cpu", average.antithetic, running["log_sum"].dtype)
        for name in _STATE:
            setattr(state, name, running[name])

    def _write(self) -> None:
        if self.path is None or self.ranks.sample_rank:
            return
        tensors = {f"done.{i}.{name}": value for i, part in enumerate(self._done) for name, value in part.items()}
        tensors |= {f"running.{name}": value for name, value in self._running.items()}
        plans = json.dumps({name: (plan.samples, plan.examples) for name, plan in self.plans.items()})
        said = {"kind": KIND, "owner": self._owner, "inputs": json.dumps(self._inputs), "chunks": str(self._chunks)}
        said["plans"] = plans  # measured, so another time they might be others
        copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_atomic(self.path, lambda fresh: save_file(copies, fresh, metadata=said))

    def _load(self) -> tuple[list[dict[str, Tensor]], list[str], dict[str, Tensor], int, dict[str, Plan]] | None:
        assert self.path is not None
        if self.ranks.sample_rank or not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is no resume file: {error}") from error
        if said.get("kind") != KIND:
            raise ValueError(f"{self.path} is no resume file: another program or command wrote it")
        if said["owner"] != self._owner:
            raise ValueError(
                f"{self.path} belongs to another posterior or to other arguments (samples, seed, scale, method, ranks): "
                "delete it to begin anew, or give the arguments it was begun with"
            )
        running = {name.removeprefix("running."): t for name, t in tensors.items() if name.startswith("running.")}
        done: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("done."):
                _, index, field = name.split(".", 2)
                done.setdefault(int(index), {})[field] = tensor
        plans = {name: Plan(*numbers) for name, numbers in json.loads(said["plans"]).items()}
        return [done[i] for i in range(len(done))], json.loads(said["inputs"]), running, int(said["chunks"]), plans


class Part:
    """The part in work, as the computation of its average sees it."""

    def __init__(self, progress: Progress | None, chunks: int) -> None:
        self._progress, self._chunks = progress, chunks

    def restore(self, average: Average) -> int:
        """Fill `average` with what the file has; returns how many chunks that is."""
        if self._progress is not None:
            self._progress.restore(average)
        return self._chunks

    def save(self, average: Average, chunks: int) -> None:
        """Write if it is time to."""
        if self._progress is not None:
            self._progress.save(average, chunks)


def _tensors(prediction: Prediction) -> dict[str, Tensor]:
    tensors = prediction.to("cpu").tensors()
    count = prediction.num_samples
    return tensors if isinstance(count, Tensor) else tensors | {"num_samples": torch.tensor(count)}


def _prediction(tensors: Mapping[str, Tensor]) -> Prediction:
    fields: dict[str, Any] = dict(tensors)
    count = tensors["num_samples"]
    return Prediction(**fields | {"num_samples": count if count.dim() else int(count)})
