"""The compiled CPU kernels (csrc/cpu) behind the ops' signatures. Arguments were checked by :mod:`swag_kernels.ops`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from swag_kernels.rows import rows_and_stride

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def _load() -> ModuleType | str:
    """The extension, or the reason why there is none."""
    try:
        kernels = import_module("swag_kernels._C")
    except ImportError as error:
        return (
            f"the compiled extension could not be imported ({error}); install a C++17 compiler (g++ or clang++) and "
            f"reinstall with 'pip install --force-reinstall --no-deps swag-kernels'"
        )
    if name := os.environ.get("SWAG_KERNELS_ISA"):
        kernels.select_isa(name)
    return kernels


def missing() -> str | None:
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@cache
def _kernels() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def isa() -> str:
    """Instruction set in use: ``avx512``, ``avx2`` or ``portable``."""
    return _kernels().isa()


def supported_isas() -> list[str]:
    """Instruction sets that this build and processor have, best first."""
    return _kernels().supported_isas()


def openmp() -> bool:
    """Whether the kernels were built with threads."""
    return _kernels().openmp_enabled()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set inside the block; the variable ``SWAG_KERNELS_ISA`` does so for a process."""
    before = isa()
    _kernels().select_isa(name)
    try:
        yield
    finally:
        _kernels().select_isa(before)


def describer() -> Callable[[list[Tensor]], bytes | None]:
    """What the extension can tell of tensors, for :mod:`swag_kernels.describe`; without the extension nothing.

    It reads them by DLPack's exchange API, which torch has from 2.10, and which says nothing of what a subclass means.
    """
    if missing():
        return lambda tensors: None
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return partial(_kernels().describe, exchange, (Tensor, torch.nn.Parameter))


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    contiguous = [p if p.is_contiguous() else p.contiguous() for p in params]
    seen = int(count)
    slot = 0
    if deviations is not None and len(deviations):
        slot = deviations.data_ptr() + (seen % len(deviations)) * deviations.stride(0) * 4
    _kernels().collect(
        [p.data_ptr() for p in contiguous],
        [_DTYPES[p.dtype] for p in contiguous],
        layout.contiguous().data_ptr(),
        mean.data_ptr(),
        m2.data_ptr(),
        slot,
        seen,
        torch.get_num_threads(),
    )
    count += 1


def draw(
    mean: Tensor,
    std: Tensor,
    deviations: Tensor | None,
    num_samples: int,
    *,
    seed: int,
    first_sample: int,
    diag_scale: float,
    low_rank_scale: float,
    antithetic: bool,
    layout: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(num_samples, mean.numel(), dtype=dtype)
    rank = 0 if deviations is None else len(deviations)
    table = layout.contiguous()
    _kernels().draw(
        mean.data_ptr(),
        std.data_ptr(),
        deviations.data_ptr() if deviations is not None and rank else 0,
        rank,
        mean.numel(),
        table.data_ptr(),
        len(table),
        out.data_ptr(),
        _DTYPES[dtype],
        num_samples,
        seed & 0xFFFF_FFFF_FFFF_FFFF,
        first_sample,
        diag_scale,
        low_rank_scale,
        antithetic,
        torch.get_num_threads(),
    )
    return out


def _sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor, y: Tensor) -> None:
    samples, rank, features = A.shape
    _, rows, out = base.shape
    (x, stride_x), (A, stride_A) = rows_and_stride(x), rows_and_stride(A)
    (B, stride_B), (base, stride_base) = rows_and_stride(B), rows_and_stride(base)
    _kernels().sampled_lora(
        x.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        base.data_ptr(),
        y.data_ptr(),
        samples,
        rows,
        features,
        out,
        rank,
        stride_x,
        stride_A,
        stride_B,
        stride_base,
        scaling,
        _DTYPES[x.dtype],
        _DTYPES[base.dtype],
        torch.get_num_threads(),
    )


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    y = torch.empty(len(A), *base.shape[1:], dtype=base.dtype)
    _sampled_lora(x, A, B, scaling, base, y)
    return y


def sampled_lora_(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    if base.is_contiguous():
        _sampled_lora(x, A, B, scaling, base, base)
    else:
        base.copy_(sampled_lora(x, A, B, scaling, base))


def sampled_lora_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    samples, rank, features = A.shape
    _, rows, out = grad.shape
    dx, dA, dB = (torch.empty(t.shape, dtype=torch.float32) for t in (x, A, B))
    if (
        x.shape[0] > 1 and x.stride(0) == 0
    ):  # an expanded x has a gradient for every sample, which stride 0 would add up
        x = x.contiguous()
    grad = grad.contiguous()
    (x, stride_x), (A, stride_A), (B, stride_B) = rows_and_stride(x), rows_and_stride(A), rows_and_stride(B)
    if not samples:
        dx.zero_()
    _kernels().sampled_lora_backward(
        grad.data_ptr(),
        x.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        dx.data_ptr(),
        dA.data_ptr(),
        dB.data_ptr(),
        samples,
        rows,
        features,
        out,
        rank,
        stride_x,
        stride_A,
        stride_B,
        scaling,
        _DTYPES[x.dtype],
        _DTYPES[grad.dtype],
        torch.get_num_threads(),
    )
    return dx.to(x.dtype), dA.to(A.dtype), dB.to(B.dtype)


def bayes_average_(
    log_sum: Tensor, m2: Tensor, votes: Tensor, entropy: Tensor, count: Tensor, logits: Tensor, group: int
) -> None:
    logits = logits.contiguous()
    samples, batch, classes = logits.shape
    _kernels().bayes_average(
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        samples,
        batch,
        classes,
        log_sum.data_ptr(),
        m2.data_ptr(),
        votes.data_ptr(),
        entropy.data_ptr(),
        int(count),
        group,
        torch.get_num_threads(),
    )
    count += samples
