"""How many samples and how many rows of a batch one forward pass takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import memory

# Of more tokens a pass is no faster: a CPU's caches overflow, a GPU is full. Constants, not shares of what is free, so
# that the same call does the same arithmetic everywhere.
_TOKENS = {"cpu": 4096, "cuda": 65_536}
_SHARE_OF_FREE = 0.8
_GAIN = 0.95
_WARM_TOKENS = 256


@dataclass(frozen=True)
class Plan:
    """One forward pass takes at most so many samples of at most so many examples."""

    samples: int
    examples: int


@dataclass(frozen=True)
class Costs:
    """What a pass needs in memory, measured on this machine with this model.

    sample      bytes of one sample's weights, with what the pass makes of them
    example     bytes of one example's activations under one sample
    """

    sample: int
    example: int

    def bytes(self, samples: int, examples: int) -> int:
        return samples * (self.sample + examples * self.example)


def make_plan(
    wanted: int, examples: int, group: int, budget: int, costs: Costs, seconds: Callable[[int, int], float], start: int
) -> Plan:
    """The plan of highest throughput within `budget` bytes.

    As many examples as fit go together. The number of samples begins at `start` and doubles while a pass takes less time
    for each sample, up to what fits and what is wanted.

    Args:
        wanted: samples in all.
        examples: of the batch.
        group: samples that cannot be parted, 2 for antithetic pairs.
        budget: bytes for weights and activations.
        costs: of a pass.
        seconds: of a pass of so many samples over so many examples.
        start: samples of the first measured pass.

    Raises:
        ValueError: not even one draw of one example fits.
    """
    if costs.bytes(group, 1) > budget:
        raise ValueError(
            f"a budget of {memory.text(budget)} is less than one draw needs: {memory.text(group * costs.sample)} for "
            f"the weights of {group} sample{'s' * (group > 1)} and {memory.text(group * costs.example)} for the "
            "activations of one example; raise memory=, or shorten the texts"
        )
    fit = int((budget / group - costs.sample) // costs.example)
    examples = max(1, min(examples, fit))
    most = budget // (costs.sample + examples * costs.example) // group * group
    most = max(group, min(most, -(-wanted // group) * group))
    samples = min(most, max(group, start // group * group))
    best = seconds(samples, examples) / samples
    while samples < most:
        more = min(2 * samples, most)
        time_each = seconds(more, examples) / more
        if time_each > _GAIN * best:
            break
        samples, best = more, time_each
    return Plan(samples, examples)


def tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of one example, or what corresponds to them: elements of the first batch-leading integer or mask tensor."""
    tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim() > 1]
    return max((math.prod(v.shape[1:]) for v in tensors if not v.is_floating_point()), default=1)


def small(device: torch.device, num_tokens: int) -> bool:
    """Whether a pass over so many tokens of all samples needs no thought."""
    return num_tokens <= _most_tokens(device)


def samples_at_once(device: torch.device, num_tokens: int, group: int) -> int:
    """How many samples of so many tokens each make a pass that is not too large, in groups that cannot be parted."""
    return max(group, _most_tokens(device) // num_tokens // group * group)


def first_try(num_tokens: int) -> int:
    """Samples of the first measured pass over so many tokens."""
    return max(1, _WARM_TOKENS // num_tokens)


def budget(device: torch.device, given: int | None) -> int:
    """`given`, or most of what the device has free."""
    return int(_SHARE_OF_FREE * memory.available(device)) if given is None else given


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Bytes that a call has alive at most, over what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with memory.PeakBytes() as made:
        call()
    return made.peak


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of a call, with what it leaves to do on the device."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _most_tokens(device: torch.device) -> int:
    return _TOKENS.get(device.type, _TOKENS["cpu"])
