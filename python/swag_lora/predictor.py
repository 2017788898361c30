"""Predictions for many batches: samples in chunks, examples in parts, until there are enough."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import plan
from .drawing import check_counts, check_samples_per_pass, resolve_method
from .forward import Forward
from .memory import parse as parse_memory
from .patch import SampledModel
from .plan import Costs, Plan
from .prediction import Average, Chunk, Prediction
from .progress import Part, Progress
from .ranks import Ranks
from .sample_axis import leading
from .stopping import check_tolerance, draws_at_least, is_sure

_MOST = 1024
KEPT_SHARE = 4


class Posterior(Protocol):
    """Anything that draws weights: sample k is a function of (posterior, seed, k) alone, whatever else is drawn."""

    def draw(self, num_samples: int, *, seed: int, first: int, scale: float, method: str) -> Mapping[str, Tensor]: ...


class Predictor:
    """`predict` for many batches: ``predictor(batch)``.

    Arguments as in `predict`. Where the weights of all samples fit into a quarter of the memory they are drawn once, with
    the first batch, and later collections into the posterior and later training of the random parameters do not reach
    it; else they are drawn anew for each batch. The model's other parameters are shared, not copied.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        first: int = 0,
        scale: float = 0.5,
        method: str | None = None,
        samples_per_pass: int | None = None,
        examples_per_pass: int | None = None,
        memory: int | str | None = None,
        tolerance: float | None = None,
        max_samples: int | None = None,
        mesh: DeviceMesh | None = None,
        resume: str | os.PathLike[str] | None = None,
        save_every: int = 8,
        keep_weights: bool = True,
        forward: Forward | None = None,
    ) -> None:
        self.tolerance = None if tolerance is None else check_tolerance(tolerance)
        if max_samples is not None and (tolerance is None or num_samples is not None):
            raise ValueError("max_samples goes with tolerance, in place of num_samples")
        if num_samples is None:
            num_samples = 32 if tolerance is None else _MOST if max_samples is None else max_samples
        self.num_samples = num_samples
        self.method = resolve_method(num_samples, first, scale, method)
        self.antithetic = self.method != "iid"
        self._group = 2 if self.antithetic else 1
        if samples_per_pass is not None:
            check_samples_per_pass(samples_per_pass, self.method)
        if examples_per_pass is not None and examples_per_pass < 1:
            raise ValueError(f"examples_per_pass must be at least 1, got {examples_per_pass}")
        self._model, self._posterior = model, posterior
        self._seed, self._first, self._scale = seed, first, scale
        self._samples_per_pass, self._examples_per_pass = samples_per_pass, examples_per_pass
        self._memory = None if memory is None else parse_memory(memory)
        self._ranks = Ranks.of(mesh)
        told = (num_samples, self.method, seed, first, scale, tolerance, samples_per_pass, examples_per_pass)
        drawn = {} if mesh is None and resume is None else self._draw(0, self._group)
        self._ranks.check(num_samples // self._group, drawn, told)
        self._progress = Progress(resume, save_every, self._ranks, drawn, told)
        self._keeps: bool | None = None if keep_weights else False
        self._forward = Forward() if forward is None else forward
        self._kept: dict[int, Mapping[str, Tensor]] = {}
        self._sampled: SampledModel | None = None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Prediction:
        """The averaged prediction for one batch: the model's keyword arguments, labels being ignored."""
        inputs = _inputs(batch)
        chosen = self.plan(inputs)
        places = self._places(inputs, chosen)
        parts = {}
        for i in self._ranks.share(len(places)):
            few = self._forward.select(inputs, places[i])
            parts[i] = self._progress.part(few, chosen, self._examples)
        return Prediction.cat(self._ranks.join(parts, len(places)))

    @torch.no_grad()
    def at(self, batch: Mapping[str, Any], counts: Sequence[int]) -> list[Prediction]:
        """The predictions after each of ``counts`` samples (ascending, even for pairs), at the price of the last alone.

        Entry i averages samples ``first … first + counts[i] - 1``: what a `Predictor` of that many samples gives, up to
        rounding. The samples of a pass end at every count; where those ends were ends already, bits are the same too.

        Raises:
            ValueError: counts out of order, above num_samples or odd for pairs; a tolerance, a mesh or a resume file.
        """
        if self.tolerance is not None or self._ranks.mesh is not None or self._progress.path is not None:
            raise ValueError(
                "predictions after several counts are made by one process for a fixed number of samples: build the "
                "Predictor without tolerance, mesh and resume"
            )
        counts = check_counts(counts, self.num_samples, self._group)
        inputs = _inputs(batch)
        chosen, parts = self.plan(inputs), []
        edges = self._edges(chosen, counts)
        for place in self._places(inputs, chosen):
            average, found = Average(self.antithetic), []
            for edge, chunk in zip(
                edges[1:], self._chunks(self._forward.select(inputs, place), 0, edges, average), strict=True
            ):
                average.merge(chunk)
                if edge in counts:
                    found.append(average.prediction())
            parts.append(found)
        return [Prediction.cat(column) for column in zip(*parts, strict=True)]

    def _places(self, inputs: dict[str, Any], chosen: Plan) -> list[slice]:
        """The examples of each pass."""
        size, step = self._forward.size(inputs), chosen.examples
        return [slice(start, start + step) for start in range(0, size, step)]

    def _edges(self, chosen: Plan, counts: Sequence[int] = ()) -> list[int]:
        """Where a chunk of samples ends and the next begins: wherever the plan has it, and at each of `counts`."""
        last = counts[-1] if counts else self.num_samples
        return sorted({*range(0, last, chosen.samples), *counts, last})

    @property
    def rows_computed(self) -> dict[str, int]:
        """Rows that have gone through each module, see `SampledModel.rows_computed`."""
        return {} if self._sampled is None else self._sampled.rows_computed

    def plan(self, batch: Mapping[str, Any]) -> Plan:
        """How many samples and examples of such a batch go through the model at a time.

        What `samples_per_pass` and `examples_per_pass` say. Without them, all at once where that is little; else what a
        pass takes in memory and time is measured, once for batches of about this size.
        """
        inputs = _inputs(batch)
        size, length = self._forward.size(inputs), plan.tokens(inputs)
        key = f"{size} examples of up to {1 << length.bit_length()} tokens"
        if key not in self._progress.plans:
            self._progress.plans[key] = self._ranks.smallest(self._make_plan(inputs, size, length))
        return self._progress.plans[key]

    @torch.no_grad()
    def _make_plan(self, inputs: dict[str, Any], size: int, length: int) -> Plan:
        group = self._group
        samples = -(-self.num_samples // group // self._ranks.samples) * group
        if self.tolerance is not None:
            samples = min(samples, group * max(2, math.ceil(draws_at_least(self.tolerance, self._scale) / 2)))
        samples = self._samples_per_pass or samples
        examples = self._examples_per_pass or -(-size // self._ranks.data)
        device = leading((), inputs).device
        if self._memory is None and (self._samples_per_pass or plan.small(device, samples * examples * length)):
            return Plan(samples, examples)
        budget, one = plan.budget(device, self._memory), self._forward.select(inputs, slice(0, 1))
        weights = _nbytes(self._draw(0, 1))
        self._forward.logits(self._bind(self._draw(0, group)), one)
        peak = plan.peak_bytes(device, lambda: self._forward.logits(self._bind(self._draw(0, group)), one))
        costs = Costs(weights, max(1, -(-peak // group) - weights))

        def seconds(number: int, few: int) -> float:
            sampled, part = self._bind(self._draw(0, number)), self._forward.select(inputs, slice(0, few))
            return plan.seconds(device, lambda: self._forward.logits(sampled, part))

        start = self._samples_per_pass or plan.first_try(examples * length)
        return plan.make_plan(samples, examples, group, budget, costs, seconds, start)

    def _examples(self, inputs: dict[str, Any], chosen: Plan, part: Part) -> Prediction:
        """The prediction for the examples of one pass."""
        average = Average(self.antithetic)
        if self.tolerance is not None:
            return self._until_sure(inputs, chosen, average, self.tolerance)
        done = part.restore(average)
        for found in self._chunks(inputs, done, self._edges(chosen), average):
            average.merge(found)
            done += 1
            part.save(average, done)
        return average.prediction()

    def _until_sure(self, inputs: dict[str, Any], chosen: Plan, average: Average, tolerance: float) -> Prediction:
        """Examples leave as soon as all their probabilities are sure, or all samples are drawn."""
        places = torch.arange(self._forward.size(inputs), device=leading((), inputs).device)
        found: list[tuple[Tensor, Prediction]] = []
        edges, chunk = self._edges(chosen), 0
        while len(places):
            with closing(self._chunks(inputs, chunk, edges, average)) as chunks:
                for one in chunks:
                    average.merge(one)
                    chunk += 1
                    now = average.prediction(guarded=self._scale)
                    sure = is_sure(now.std_error, tolerance) | (chunk == len(edges) - 1)
                    if bool(sure.any()):
                        break
            counts = torch.full((int(sure.sum()),), int(now.num_samples), device=places.device)
            found.append((places[sure], replace(now.select(sure), num_samples=counts)))
            stay = (~sure).nonzero()[:, 0]
            inputs, places = self._forward.select(inputs, stay), places[stay]
            average.keep(stay)
        order = torch.cat([rows for rows, _ in found]).argsort()
        return Prediction.cat([part for _, part in found]).select(order)

    def _chunks(
        self, inputs: dict[str, Any], chunk: int, edges: Sequence[int], average: Average
    ) -> Generator[Chunk, None, None]:
        """The average over one chunk of samples after the other, from number `chunk` on; see `_edges`."""
        last, opened = len(edges) - 1, False
        with ExitStack() as stack:
            for first in range(chunk, last, self._ranks.samples):
                found, mine = None, first + self._ranks.sample_rank
                if mine < last:
                    sampled = self._bind(self._weights(edges[mine], edges[mine + 1] - edges[mine]))
                    if not opened:
                        stack.enter_context(sampled.same_batch())
                        opened = True
                    logits = self._forward.logits(sampled, inputs)
                    found = average.chunk(logits)
                yield from self._ranks.gather(found, min(self._ranks.samples, last - first))

    def _bind(self, weights: Mapping[str, Tensor]) -> SampledModel:
        if self._sampled is None:
            self._sampled = SampledModel(self._model, weights).eval()
        elif self._sampled.weights is not weights:
            self._sampled.set_weights(weights)
        return self._sampled

    def _draw(self, start: int, number: int) -> Mapping[str, Tensor]:
        first = self._first + start
        return self._posterior.draw(number, seed=self._seed, first=first, scale=self._scale, method=self.method)

    def _weights(self, start: int, number: int) -> Mapping[str, Tensor]:
        if start in self._kept and len(next(iter(self._kept[start].values()))) == number:
            return self._kept[start]
        if self._sampled is not None and not self._kept:
            self._sampled.release_weights()
        weights = self._draw(start, number)
        if self._keeps is None:
            needed, device = _nbytes(weights) / number * self.num_samples, next(iter(weights.values())).device
            self._keeps = needed * KEPT_SHARE <= plan.budget(device, self._memory)
        if self._keeps:
            self._kept[start] = weights
        return weights


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must map the model's arguments to tensors, got {type(batch).__name__}")
    return {name: value for name, value in batch.items() if name != "labels"}


def _nbytes(weights: Mapping[str, Tensor]) -> int:
    """Of the buffers behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights.values()}.values())
