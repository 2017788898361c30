"""Bytes that each Triton kernel moves at the three LoRA sizes, against the least possible: a program that prints JSON.

Counted in Triton's interpreter, see :mod:`bytes_counter`, which is too slow for 41.9 M weights. But a kernel moves some
bytes whatever its size, and as many again for each sample, for each block of the arena or tile of columns, and for each
sample of each of those: the counts with one and two of each give the count with any number, see :func:`extended`. A
test holds that against counts of the whole at sizes that the interpreter can do. Layers and logits have their real
widths. float16 stands for bfloat16, which the interpreter computes wrongly.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial

import torch

from bytes_counter import Moved, counting
from harness import LORA_SIZES
from swag_kernels import (
    AverageState,
    arena_size,
    backend,
    bayes_average_,
    collect_,
    draw,
    sampled_lora,
    sampled_lora_linear,
    segment_table,
)
from swag_kernels import triton as kernels
from swag_kernels.layout import BLOCK

RANK, SAMPLES = 20, 32
ROWS, COLUMNS = 64, 128  # of a tile of sampled_lora_linear
CLASSES = dict(zip(LORA_SIZES, (50_265, 32_000, 128_256), strict=True))  # of each model's vocabulary

Moves = dict[str, Moved]


@dataclass(frozen=True)
class Row:
    """Bytes. ``kernel`` is an op's name where it has two kernels; the scratch between those is not in ``least``."""

    size: str
    kernel: str
    case: str
    least: int
    first: int
    total: int


def extended(count: Callable[..., Moves], *numbers: int) -> Moves:
    """``count(*numbers)`` from its values at 1 and 2 in each argument, in each of which it is linear."""
    if not numbers:
        return count()
    number, *others = numbers
    one, two = (extended(lambda *rest, n=n: count(n, *rest), *others) for n in (1, 2))
    return {kernel: one[kernel] + (number - 1) * (two[kernel] - one[kernel]) for kernel in one}


def counted(function: Callable[..., object], *arguments: object, **settings: object) -> Moves:
    with backend("triton"), counting() as moved:
        function(*arguments, **settings)
    return dict(moved)


@cache
def count_collect(numels: tuple[int, ...], dtype: torch.dtype) -> Moves:
    layout = segment_table(numels)
    size = arena_size(layout)
    params = [torch.randn(n).to(dtype) for n in numels]
    state = torch.zeros(size), torch.zeros(size), torch.zeros(RANK, size), torch.zeros((), dtype=torch.int64)
    return counted(collect_, params, *state, layout)


@cache
def count_draw(numels: tuple[int, ...], samples: int, dtype: torch.dtype, antithetic: bool = False) -> Moves:
    layout = segment_table(numels)
    size = arena_size(layout)
    settings = {"seed": 1, "first_sample": 0, "diag_scale": 1.0, "low_rank_scale": 1.0, "antithetic": antithetic}
    state = torch.zeros(size), torch.zeros(size), torch.zeros(RANK, size)
    return counted(draw, *state, samples, **settings, layout=layout, dtype=dtype)


@cache
def count_sampled_lora(samples: int, features: int, out: int, rank: int, dtype: torch.dtype) -> Moves:
    """A decode step: one row a sample."""
    shapes = (samples, 1, features), (samples, rank, features), (samples, out, rank), (samples, 1, out)
    x, A, B, base = (torch.randn(shape).to(dtype) for shape in shapes)
    return counted(sampled_lora, x, A, B, 1.0, base)


@cache
def count_linear(samples: int, columns: int, features: int, rank: int) -> Moves:
    out = columns * COLUMNS
    shapes = (samples, ROWS, features), (out, features), (samples, rank, features), (samples, out, rank)
    x, weight, A, B = (torch.randn(shape).to(torch.float16) for shape in shapes)
    return counted(sampled_lora_linear, x, weight, None, A, B, 1.0)


@cache
def count_average(samples: int, batch: int, classes: int, dtype: torch.dtype) -> Moves:
    logits = torch.randn(samples, batch, classes).to(
        dtype
    )  # of any spread short of e^60, beyond which some are read again
    return counted(bayes_average_, AverageState(batch, classes), logits)


def arena_rows(size: str, dtype: torch.dtype) -> Iterator[Row]:
    """collect: parameter, mean and m2 in, mean, m2 and a deviation out. draw: mean, std, deviations in, samples out."""
    numels = [math.prod(shape) for shape in LORA_SIZES[size]]
    assert all(n % BLOCK == 0 for n in numels), "a block that is not full moves padding"
    weights = sum(numels)
    collect = extended(lambda n: count_collect((n * BLOCK,), dtype), weights // BLOCK)
    case = f"{type_name(dtype)} parameters"
    yield row(size, "collect_kernel", case, weights * (dtype.itemsize + 2 * 4 + 3 * 4), collect)
    draws = extended(lambda n, samples: count_draw((n * BLOCK,), samples, dtype), weights // BLOCK, SAMPLES)
    case = f"S={SAMPLES}, {type_name(dtype)} samples"
    yield row(size, "z_kernel", case, 0, draws)
    least = weights * ((2 + RANK) * 4 + SAMPLES * dtype.itemsize)
    yield row(size, "draw_kernel", case, least, draws)
    yield row(size, "draw", case, least, draws)


def layer_rows(size: str, dtype: torch.dtype) -> Iterator[Row]:
    """sampled_lora: x, A, B and base in, y out. sampled_lora_linear: the layer's weight in the base's place, once."""
    shapes = LORA_SIZES[size]
    modules = Counter((a[1], b[0], a[0]) for a, b in zip(shapes[::2], shapes[1::2], strict=True))
    decode = summed(
        (times, extended(partial(count_sampled_lora, features=features, out=out, rank=rank, dtype=dtype), SAMPLES))
        for (features, out, rank), times in modules.items()
    )
    case = f"S={SAMPLES}, M=1, {type_name(dtype)}"
    unit = SAMPLES * dtype.itemsize
    shrink = unit * sum(times * (features + rank * features) for (features, _, rank), times in modules.items())
    expand = unit * sum(times * (out * rank + 2 * out) for (_, out, rank), times in modules.items())
    yield row(size, "shrink_kernel", case, shrink, decode)
    yield row(size, "expand_kernel", case, expand, decode)
    yield row(size, "sampled_lora", case, shrink + expand, decode)
    if dtype.itemsize == 2:  # what the kernel serves
        fused = summed(
            (times, extended(partial(count_linear, features=features, rank=rank), SAMPLES, out // COLUMNS))
            for (features, out, rank), times in modules.items()
        )
        least = 2 * sum(
            times * (out * features + SAMPLES * (ROWS + rank) * (features + out))
            for (features, out, rank), times in modules.items()
        )
        yield row(size, "sampled_lora_linear_kernel", f"S={SAMPLES}, M={ROWS}, {type_name(dtype)}", least, fused)


def average_rows(size: str, dtype: torch.dtype) -> Iterator[Row]:
    """Logits in; log_sum, m2, votes of each class and the entropy of each row in and out."""
    classes = CLASSES[size]
    moved = extended(lambda samples: count_average(samples, 1, classes, dtype), SAMPLES)
    least = SAMPLES * classes * dtype.itemsize + 2 * 4 * (3 * classes + 1)
    yield row(size, "average_kernel", f"S={SAMPLES}, B=1, C={classes}, {type_name(dtype)}", least, moved)


def row(size: str, kernel: str, case: str, least: int, moves: Moves) -> Row:
    moved = moves.get(kernel) or sum(moves.values(), Moved())
    return Row(size, kernel, case, least, moved.first, moved.total)


def summed(parts: Iterable[tuple[int, Moves]]) -> Moves:
    total: Moves = {}
    for times, moves in parts:
        for kernel, moved in moves.items():
            total[kernel] = total.get(kernel, Moved()) + times * moved
    return total


def rows(size: str) -> Iterator[Row]:
    """float32 where the arena is read or written in it; layers and logits are float16."""
    yield from arena_rows(size, torch.float32)
    for part in (arena_rows, layer_rows, average_rows):
        yield from part(size, torch.float16)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> str | None:
    if not kernels.interpreted():
        return "set TRITON_INTERPRET=1, so that the kernels run in Triton's interpreter"
    if kernels.missing():
        return kernels.missing()
    print(json.dumps([asdict(r) for size in LORA_SIZES for r in rows(size)]))
    return None


if __name__ == "__main__":
    sys.exit(main())
