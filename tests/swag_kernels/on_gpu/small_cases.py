"""Every op's kernels once, by every back end that serves the GPU, at small odd sizes: a program that compute-sanitizer can watch.

Tails of every tile, no deviations, one sample, each dtype. Results are compared loosely with the reference on the CPU; the
tests beside this file are the strict ones. Without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from swag_kernels import AverageState, arena_size, backend, bayes_average_, collect_, draw, reference, sampled_lora
from swag_kernels import segment_table as table
from swag_kernels.backend import choose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes bfloat16 arithmetic wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE.type == "cuda")
SCALING = 0.7


def close(what: str, outs: tuple[Tensor | None, ...], exact: tuple[Tensor | None, ...], dtype: torch.dtype) -> None:
    """Within 32 units in the last place of the largest element."""
    for out, truth in zip(outs, exact, strict=True):
        if out is None or truth is None:
            continue
        bound = 32 * torch.finfo(dtype).eps * truth.double().abs().max().clamp(min=1e-30)
        error = (out.cpu().double() - truth.double()).abs().max()
        if not error <= bound:
            raise AssertionError(f"{what}: off by {error:.3g}, allowed {bound:.3g}")


def moved(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(DEVICE, copy=True) for t in tensors]


def collect(rank: int) -> None:
    """Parameters of all dtypes in one call, sizes beside a block's, in a ring that wraps."""
    numels = [1, 31, 1025, 1024, 3]
    layout = table(numels)
    size = arena_size(layout)
    deviations = torch.zeros(rank, size) if rank else None
    exact = [torch.zeros(size), torch.zeros(size), deviations, torch.zeros((), dtype=torch.int64)]
    ours = moved(*exact)
    for step in range(rank + 1):
        params = [torch.randn(n).to(DTYPES[(i + step) % len(DTYPES)]) for i, n in enumerate(numels)]
        collect_([p.to(DEVICE) for p in params], *ours, layout)
        reference.collect_(params, *exact, layout)
    close(f"collect_ R={rank}", tuple(ours), tuple(exact), torch.float32)


def draws(rank: int, samples: int, antithetic: bool, dtype: torch.dtype) -> None:
    layout = table([1500, 3, 1025])
    size = arena_size(layout)
    state = torch.randn(size), torch.rand(size), torch.randn(rank, size) if rank else None
    settings = {"seed": 2**40 + 7, "first_sample": 3, "diag_scale": 0.7, "low_rank_scale": 0.3, "layout": layout}
    settings |= {"antithetic": antithetic, "dtype": dtype}
    exact = reference.draw(*state, samples, **settings)
    close(f"draw R={rank} S={samples} {dtype}", (draw(*moved(*state), samples, **settings),), (exact,), dtype)


def lora(S: int, M: int, features: int, out: int, rank: int, dtype: torch.dtype) -> None:
    """Forward into a base of its own and into a shared one; backward."""
    x, A = torch.randn(S, M, features), torch.randn(S, rank, features) / features**0.5
    B, base, grad = torch.randn(S, out, rank), torch.randn(S, M, out), torch.randn(S, M, out)
    x, A, B, base, grad = (t.to(dtype) for t in (x, A, B, base, grad))
    case = f"sampled_lora S={S} M={M} {features}→{out} r={rank} {dtype}"
    on_device = moved(x, A, B)
    for shared in (base, base[:1]):
        exact = reference.sampled_lora(x, A, B, SCALING, shared)
        close(case, (sampled_lora(*on_device, SCALING, *moved(shared)),), (exact,), dtype)
    exact = reference.sampled_lora_backward(grad, x, A, B, SCALING)
    backward = torch.ops.swag_kernels.sampled_lora_backward(*moved(grad), *on_device, SCALING)
    close(f"{case}, backward", backward, exact, dtype)


def average(S: int, batch: int, classes: int, antithetic: bool, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(2, S, batch, classes)).to(dtype)
    ours, exact = (AverageState(batch, classes, device, antithetic) for device in (DEVICE, "cpu"))
    for chunk in logits:
        bayes_average_(ours, chunk.to(DEVICE))
        with backend("reference"):
            bayes_average_(exact, chunk)
    fields = [(s.log_sum, s.m2.cpu().sqrt(), s.votes, s.mean_entropy, s.count) for s in (ours, exact)]
    close(f"bayes_average_ S={S} B={batch} C={classes} {dtype}", *fields, torch.float32)


def cases() -> list[tuple[Callable[..., None], tuple]]:
    found: list[tuple[Callable[..., None], tuple]] = [(collect, (0,)), (collect, (2,))]
    for dtype in DTYPES:
        found += [(draws, (0, 1, False, dtype)), (draws, (5, 3, True, dtype))]
        found += [(lora, (1, 1, 33, 17, 3, dtype)), (lora, (3, 5, 1100, 130, 8, dtype))]
        found += [(average, (1, 1, 3, False, dtype)), (average, (4, 3, 1030, True, dtype))]
    return [*found, (draws, (33, 2, False, torch.float32)), (average, (3, 2, 17_000, False, torch.float32))]


def back_ends() -> list[str]:
    served = []
    for name in ("triton", "cuda"):
        with backend(name):
            try:
                served.append(choose(DEVICE))
            except RuntimeError as reason:
                print(f"without {name}: {reason}")
    return served


def main() -> None:
    torch.manual_seed(0)
    found = cases()
    names = back_ends()
    for name in names:
        with backend(name):
            for case, sizes in found:
                case(*sizes)
    print(f"{len(found)} small cases on {DEVICE} by {' and '.join(names)}")


if __name__ == "__main__":
    sys.exit(main())
