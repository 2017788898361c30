"""The throughput sweep: K, batch and sequence length, for each way to average K posterior samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import memory
from .bench_baselines import Run, Strategy, TooSlow, prebuilt
from .bench_case import RANK, Adapted, Case, lora_weights
from .bench_error import ErrorPoint, error_curve
from .bench_limits import Limits, machine, synchronize
from .bench_plan import Pace, Settings
from .bench_report import Row
from .bench_strategies import strategies
from .shapes import dtype_name

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 25
_FEW = 4  # samples that are compared where the loop over all of them would take too long

# How far averaged log-probabilities may lie from the loop's, RMS, as a fraction of the RMS spread between samples: several
# times what rounding gives. One wrong sample of K gives about 1 / K. The averages themselves round in float32.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Calm:
    """A model on a batch, one sample at a time: the RMS of log-probabilities about their mean, and a pass's seconds."""

    spread: float
    seconds: float


class Sweep:
    """Builds the model and runs the cases. `rows` and `errors` hold what is measured so far, whatever happens next.

    Raises:
        ValueError: the model does not fit into memory, or takes no LoRA there.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda line: None) -> None:
        self.settings, self.say = settings, say
        self.rows: list[Row] = []
        self.errors: list[ErrorPoint] = []
        shape, device, dtype = settings.shape, settings.device, settings.dtype
        self.strategies = strategies(settings.families, device, dtype)
        working = 4 * 3 * (RANK + 2) * lora_weights(shape, settings.lora_rank, settings.targets)
        size = shape.check_memory(dtype, device, working)
        self.machine = machine(device)
        self.limits = Limits.measure(device, dtype)
        say(f"{shape.name}, {shape.layers} layers, {memory.text(size)} of {dtype_name(dtype)} weights")
        base = shape.build(dtype, device, settings.seed)
        layers = {late: shape.layers if not late else max(1, shape.layers // 4) for late in self._kinds()}
        self.adapted = {
            late: Adapted.of(shape, base, settings.lora_rank, settings.targets, count) for late, count in layers.items()
        }
        self._pace = Pace()

    def _kinds(self) -> list[bool]:
        """False for the model with LoRA everywhere, which the errors need, True for LoRA on the last layers."""
        return sorted({False, *(strategy.late for strategy in self.strategies)})

    def cases(self) -> Iterator[list[Row]]:
        """Run every case, K growing on each batch; a case's rows are in `rows` when they are yielded."""
        for length in self.settings.lengths:
            for batch in self.settings.batches:
                inputs = self._inputs(batch, length)
                calm = {late: self._spread(adapted, inputs) for late, adapted in self.adapted.items()}
                for samples in self.settings.samples:
                    begin = time.perf_counter()
                    rows = self._case(samples, inputs, calm)
                    self.rows += rows
                    timed = sum(row.seconds is not None for row in rows)
                    self.say(
                        f"K={samples}, batch {batch} × {length}: {timed} of {len(rows)} strategies timed in "
                        f"{time.perf_counter() - begin:.0f} s"
                    )
                    yield rows

    def measure_errors(self) -> None:
        """Errors against K on the smallest batch, into `errors` and the rows of that batch."""
        settings = self.settings
        batch, length = settings.batches[0], settings.lengths[0]
        self.errors = error_curve(
            self.adapted[False], self._inputs(batch, length), settings.samples, settings.seed, settings.limit
        )
        for point in self.errors:
            for row in self.rows:
                if (row.samples, row.batch, row.seq) == (point.samples, batch, length):
                    row.error_iid, row.error_antithetic = point.iid, point.antithetic

    def _inputs(self, batch: int, length: int) -> dict[str, Any]:
        model = self.adapted[False].model.get_base_model()
        return self.settings.shape.batch(model, batch, length, self.settings.device, self.settings.seed)

    def _spread(self, adapted: Adapted, inputs: Mapping[str, Any]) -> Calm:
        parts, seconds = [], []
        for index in range(_FEW):
            run = prebuilt().prepare(Case(adapted, inputs, 1, self.settings.seed + index), float("inf"))
            output, taken = self._clocked(run)
            parts.append(output)
            seconds.append(taken)
        spread = torch.stack(parts).double().std(0).square().mean().sqrt().item()
        if not 0 < spread < float("inf"):
            raise ValueError(
                f"{self.settings.shape.name} in {dtype_name(self.settings.dtype)} gives no finite probabilities that "
                "differ between samples: take another --dtype or other --target-modules"
            )
        return Calm(spread, min(seconds))

    def _case(self, samples: int, inputs: Mapping[str, Any], calm: Mapping[bool, Calm]) -> list[Row]:
        cases = {late: Case(adapted, inputs, samples, self.settings.seed) for late, adapted in self.adapted.items()}
        references: dict[bool, Tensor] = {}
        rows, runs = [], []
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        for strategy in self.strategies:
            case = cases[strategy.late]
            row = self._row(strategy, case)
            rows.append(row)
            if reason := self._refusal(strategy, case, calm[strategy.late].seconds, row.limit_seconds or 0.0):
                row.status, row.reason = "skipped", reason
                continue
            try:
                run, call = self._prepared(strategy, case, row)
                self._check(strategy, case, row, run, calm[strategy.late], references)
            except TooSlow as error:
                row.status, row.reason = "skipped", f"over {self.settings.limit:g} s: {error}"
            except torch.OutOfMemoryError:
                needed = memory.text(self._needed(strategy, case))
                row.status, row.reason = "skipped", f"out of memory, {needed} estimated"
            except (RuntimeError, TypeError, NotImplementedError) as error:
                row.status, row.reason = "skipped", f"not possible: {' '.join(str(error).split())[:80]}"
            if row.status == "measured":
                runs.append((row, run, call))
        self._time(runs)
        return rows

    def _prepared(self, strategy: Strategy, case: Case, row: Row) -> tuple[Run, float]:
        """What is to be timed, after a first call, and the seconds of that."""
        begin = time.perf_counter()
        run = strategy.prepare(case, begin + self.settings.limit)
        row.setup_seconds = time.perf_counter() - begin
        _, call = self._clocked(run)
        self._pace.record(strategy.name, case.key, row.setup_seconds, call)
        return run, call

    def _check(
        self, strategy: Strategy, case: Case, row: Row, run: Run, calm: Calm, references: dict[bool, Tensor]
    ) -> None:
        """Compare with the prebuilt loop over the same weights; of many samples, where that takes long, the first few.

        `references` keeps what the loop gives, by whether the model is the late one.
        """
        if strategy.draws_own:
            output, row.checked_samples = run(), 0
            if len(output) != case.batch or not output.isfinite().all():
                row.status, row.reason = "wrong", "probabilities that are not finite, or not of this batch"
            return
        every = case.samples * calm.seconds * 4 <= self.settings.limit
        few = case if every else case.few(min(case.samples, _FEW))
        forever = float("inf")
        if strategy.late not in references:
            references[strategy.late] = prebuilt().prepare(few, forever)()
        output = run() if every else strategy.prepare(few, forever)()
        row.checked_samples = few.samples
        expected = references[strategy.late].double()
        row.error = _rms(output.double() - expected) / calm.spread
        rounding = 8 * torch.finfo(torch.float32).eps * _rms(expected) / calm.spread
        if not row.error <= _TOLERANCE[self.settings.dtype] + rounding:
            row.status, row.reason = "wrong", f"off by {row.error:.2g} of the spread between samples"

    def _row(self, strategy: Strategy, case: Case) -> Row:
        shape, settings = self.settings.shape, self.settings
        floor, by = self.limits.floor(case)
        batch, length = case.inputs["input_ids"].shape
        return Row(
            model=shape.name,
            layers=shape.layers,
            dtype=dtype_name(settings.dtype),
            device=settings.device.type,
            strategy=strategy.name,
            samples=case.samples,
            batch=batch,
            seq=length,
            machine=self.machine,
            samples_per_pass=strategy.per_pass(case),
            limit_seconds=floor,
            limit_by=by,
        )

    def _needed(self, strategy: Strategy, case: Case) -> int:
        """Bytes that a strategy needs beside what is allocated already."""
        own = strategy.draws_own or "weights" in vars(case)
        weights = 0 if own else case.samples * case.adapted.sample_bytes
        return weights + strategy.held_bytes(case) + strategy.passing_bytes(case)

    def _refusal(self, strategy: Strategy, case: Case, plain: float, floor: float) -> str:
        """Why a strategy is not run in a case; empty if it is."""
        needed, free = self._needed(strategy, case), memory.available(self.settings.device)
        if needed > free:
            return f"needs {memory.text(needed)}, {memory.text(free)} is free"
        one_at_a_time = strategy.per_pass(case) == 1 < case.samples
        guess = self._pace.estimate(strategy.name, case.key) or (0.0, max(floor, case.samples * plain * one_at_a_time))
        setup, call = guess
        estimate = setup + (1 + _FEWEST_ROUNDS) * call
        if estimate <= self.settings.limit:
            return ""
        return f"est. {estimate:.{0 if estimate >= 10 else 1}f} s > {self.settings.limit:g} s"

    def _time(self, runs: Sequence[tuple[Row, Run, float]]) -> None:
        """One alternating run, A B A B, of all that is right; as many rounds as there is time for."""
        total = sum(call for _, _, call in runs)
        rounds = int(self.settings.seconds * len(runs) / total) if runs else 0
        rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, rounds))
        seconds: dict[str, list[float]] = {row.strategy: [] for row, _, _ in runs}
        kept: dict[str, Tensor] = {}  # memory that lies free goes back to the system, and getting it again takes long
        for _ in range(rounds):
            for row, run, _ in runs:
                kept.pop(row.strategy, None)
                kept[row.strategy], taken = self._clocked(run)
                seconds[row.strategy].append(taken)
        for row, _, _ in runs:
            against = _LATE if row.strategy in _LATE.values() or row.strategy == "late axis" else _LOOPS
            others = {name: seconds[other] for name, other in against.items() if other in seconds}
            row.timed(seconds[row.strategy], {n: t for n, t in others.items() if t is not seconds[row.strategy]})
            self._pace.record(
                row.strategy, (row.samples, row.batch, row.seq), row.setup_seconds or 0.0, min(seconds[row.strategy])
            )

    def _clocked(self, run: Run) -> tuple[Tensor, float]:
        synchronize(self.settings.device)
        begin = time.perf_counter()
        output = run()
        synchronize(self.settings.device)
        return output, time.perf_counter() - begin


_LATE = {"x_start": "late axis, from start"}
_LOOPS = {"x_published": "published loop", "x_prebuilt": "prebuilt loop"}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
