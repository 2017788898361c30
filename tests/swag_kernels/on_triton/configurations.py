"""Every configuration in which the ops launch their kernels: found by calling the ops over sizes that take every branch of
their host code, with the launch recorded in place of being made, and nothing computed where an op launches no kernel of its
own. Used where Triton compiles, not where it interprets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from swag_kernels import segment_table

# By name, because the package's attributes of the same names are the ops.
bayes_average, collect, draw, sampled_lora, sampled_lora_backward, sampled_lora_linear = (
    import_module(f"swag_kernels.triton.{name}")
    for name in ("bayes_average", "collect", "draw", "sampled_lora", "sampled_lora_backward", "sampled_lora_linear")
)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A kernel, the types of its arguments by name, the values of its constants, and the compiler's options."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def title(self) -> str:
        pointers = {name[2:]: kind[1:] for name, kind in self.types if kind.startswith("*")}
        return f"{self.kernel.__name__} {pointers | dict(self.constants)}"

    @property
    def of_either_half(self) -> Configuration:
        """With bfloat16 in the place of float16: the same for two that differ in that alone."""
        kinds = [kind for _, kind in self.types]
        if "*bf16" in kinds:
            return self
        return replace(self, types=tuple((name, kind.replace("*fp16", "*bf16")) for name, kind in self.types))


def configurations(wide: bool, both_halves: bool) -> list[Configuration]:
    """``wide``: for the targets that take the wide tiles of sampled_lora_linear. Unless ``both_halves``, without the float16
    ones that a bfloat16 one stands for: registers differ by a few, shared memory and the widths of accesses do not."""
    found: dict[Configuration, None] = {}
    with recorded(found):
        for calls in (collect_calls, draw_calls, average_calls, lora_calls):
            calls()
        linear_calls(sampled_lora_linear.WIDE_TILES if wide else sampled_lora_linear.TILES)
    doubled = [] if both_halves else [one for one in found if one.of_either_half != one and one.of_either_half in found]
    return sorted(found.keys() - doubled, key=lambda one: one.title)


@contextmanager
def recorded(found: dict[Configuration, None]) -> Iterator[None]:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | given
        types, constants = [], []
        for parameter in self.params:
            value = values.pop(parameter.name)
            if parameter.is_constexpr:
                constants.append((parameter.name, value))
                continue
            # Else Triton would compile once more for a 1, for multiples of 16 and for aligned addresses.
            assert parameter.do_not_specialize and parameter.do_not_specialize_on_alignment, parameter.name
            if isinstance(value, torch.Tensor):
                types.append((parameter.name, f"*{TYPES[value.dtype]}"))
            else:
                assert parameter.annotation_type, f"{parameter.name} would be typed by its value"
                types.append((parameter.name, parameter.annotation_type))
        found[Configuration(self, tuple(types), tuple(constants), tuple(sorted(values.items())))] = None

    with (
        patch.object(JITFunction, "run", run),
        patch.object(sampled_lora.products, "update"),
        patch.object(sampled_lora_backward.reference, "sampled_lora_backward"),
    ):
        yield


def shifted(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    """At a multiple of 16 bytes, or not."""
    numel = torch.Size(shape).numel()
    return torch.empty(numel + 8, dtype=dtype)[0 if aligned else 1 :][:numel].view(shape)


def collect_calls() -> None:
    numels = [1500, 40]
    layout = segment_table(numels)
    count = torch.zeros((), dtype=torch.int64)
    for dtypes, aligned, rank in product((*((d, d) for d in DTYPES), HALVES), (True, False), (0, 3)):
        params = [shifted((n,), dtype, aligned) for n, dtype in zip(numels, dtypes, strict=True)]
        deviations = torch.empty(rank, 3072) if rank else None
        collect.collect_(params, torch.empty(3072), torch.empty(3072), deviations, count, layout)


def draw_calls() -> None:
    layout = segment_table([2000])
    settings = {"seed": 1, "diag_scale": 1.0, "low_rank_scale": 1.0, "layout": layout}
    for rank, dtype, samples, antithetic in product(range(40), DTYPES, (1, 5, 64), (False, True)):
        deviations = torch.empty(rank, 2048) if rank else None
        draw.draw(
            torch.empty(2048), torch.empty(2048), deviations, samples, first_sample=3, antithetic=antithetic,
            dtype=dtype, **settings,
        )  # fmt: skip


def average_calls() -> None:
    sizes = [1, 2, 15, 16, 1000, 1024, 16_384, 16_385, 50_257, 128_256, 262_144, 262_145, 600_000]
    for classes, dtype, group, aligned in product(sizes, DTYPES, (1, 2), (True, False)):
        logits = shifted((2, 1, classes), dtype, aligned)
        state = [torch.empty(1, classes) for _ in range(3)]
        bayes_average.bayes_average_(*state, torch.empty(1), torch.zeros((), dtype=torch.int64), logits, group)


def lora_calls() -> None:
    ranks = (*range(1, 34), 48, 63, 64)
    for dtype, rank, (samples, rows) in product(DTYPES, ranks, ((2, 1), (2, 16), (2, 17), (2, 300), (300, 70))):
        for (features, out), base_dtype in product(((32, 48), (32, 33), (33, 48), (2048, 16)), DTYPES):
            if samples > 2 and (rank % 8 and rank > 1):
                continue
            x, A = torch.empty(samples, rows, features, dtype=dtype), torch.empty(samples, rank, features, dtype=dtype)
            B, base = torch.empty(samples, out, rank, dtype=dtype), torch.empty(samples, rows, out, dtype=base_dtype)
            sampled_lora.sampled_lora_(x, A, B, 1.0, base)
            if base_dtype == dtype:
                sampled_lora_backward.sampled_lora_backward(base, x, A, B, 1.0)


def linear_calls(tiles: tuple[tuple[int, int], ...]) -> None:
    for dtype, rank, has_bias, tile in product(HALVES, (1, 16, 17, 32), (True, False), tiles):
        x, weight, A = (torch.empty(shape, dtype=dtype) for shape in ((2, 70, 128), (48, 128), (2, rank, 128)))
        bias = torch.empty(48, dtype=dtype) if has_bias else None
        sampled_lora_linear.fused(x, weight, bias, A, torch.empty(2, 48, rank, dtype=dtype), 1.0, tile)
