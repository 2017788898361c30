"""The kernels of csrc/cuda behind the ops' signatures, for NVIDIA GPUs. Arguments were checked by :mod:`swag_kernels.ops`.

A launch takes the host a few microseconds. A layer together with its update, and gradients, are Triton's where that runs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from swag_kernels import native, products, reference
from swag_kernels.describe import describe
from swag_kernels.recollect import Collections, describe_buffers
from swag_kernels.rows import rows_and_stride

MAX_RANK = 64
FEW_ROWS = 16
RULE = f"kernels up to rank {MAX_RANK}, matrix products beyond and for more than {FEW_ROWS} rows of float32"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CAPABILITY = (8, 0)


@cache
def _kernels() -> ModuleType:
    return import_module("swag_kernels._C")


@cache
def missing() -> str | None:
    if reason := native.missing():
        return reason
    if not hasattr(_kernels(), "cuda_collect"):
        return (
            "the extension was built without CUDA; put nvcc of CUDA 11.8 or later on PATH and rebuild with "
            "'SWAG_KERNELS_CUDA=1 pip install --force-reinstall --no-deps swag-kernels'"
        )
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    for index in range(torch.cuda.device_count()):
        if (found := torch.cuda.get_device_capability(index)) < _CAPABILITY:
            return (
                f"cuda:{index} ({torch.cuda.get_device_name(index)}) has compute capability {found[0]}.{found[1]} and the "
                f"kernels need {_CAPABILITY[0]}.{_CAPABILITY[1]}; hide it with CUDA_VISIBLE_DEVICES to use the others"
            )
    return None


@cache
def _triton() -> ModuleType | None:
    kernels = import_module("swag_kernels.triton")
    return None if kernels.missing() else kernels


def server_of(op: str) -> str:
    """Name of the back end that serves an op when this one is asked for it."""
    if op == "sampled_lora_linear":
        return "triton" if _triton() else "cuda"
    if op == "sampled_lora_backward":
        return "triton" if _triton() else "reference"
    return "cuda"


def _launch(function: Callable[..., None], tensor: Tensor, *arguments: object) -> None:
    """On the tensor's device and the current stream there."""
    index = tensor.get_device()
    if index < 0:  # the kernels as the tests build them, for the CPU
        function(*arguments, 0)
        return
    # What torch.cuda.current_stream asks, without the time for an object around it.
    stream = torch._C._cuda_getCurrentRawStream(index)
    if index == torch.cuda.current_device():
        function(*arguments, stream)
    else:
        with torch.cuda.device(index):
            function(*arguments, stream)


@dataclass(frozen=True)
class _Collection:
    """Arguments of a collection, and the lists on the host to which some of them point."""

    arguments: tuple[int, ...]
    lists: tuple[array, ...]


_collections: Collections[_Collection] = Collections()


def collect_(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> None:
    contiguous = [p if p.is_contiguous() else p.contiguous() for p in params]
    arenas = [mean, m2] if deviations is None else [mean, m2, deviations]
    aligned = [*map(_aligned, arenas)]
    collection = _collection(contiguous, aligned, count, layout)
    _launch(_kernels().cuda_collect, mean, *collection.arguments)
    if all(arena is written for arena, written in zip(arenas, aligned, strict=True)):
        _collections.keep(describe(contiguous), describe_buffers(mean, m2, deviations, count), layout, collection)
    else:
        for arena, written in zip(arenas, aligned, strict=True):
            arena.copy_(written)


def recollect(
    params: list[Tensor], mean: Tensor, m2: Tensor, deviations: Tensor | None, count: Tensor, layout: Tensor
) -> bool:
    """Collects and is true if nothing but values changed since a collection of this layout, which was checked then."""
    collection = _collections.repeated(params, describe_buffers(mean, m2, deviations, count), layout)
    if collection is None:
        return False
    _launch(_kernels().cuda_collect, mean, *collection.arguments)
    return True


def _collection(params: list[Tensor], arenas: list[Tensor], count: Tensor, layout: Tensor) -> _Collection:
    addresses, dtypes = array("Q", [p.data_ptr() for p in params]), array("i", [_DTYPES[p.dtype] for p in params])
    rows = array("q", chain.from_iterable(layout.tolist()))
    mean, m2, *ring = arenas
    lists = addresses, dtypes, rows
    return _Collection(
        (
            *(values.buffer_info()[0] for values in lists),
            len(params),
            mean.numel(),
            mean.data_ptr(),
            m2.data_ptr(),
            ring[0].data_ptr() if ring else 0,
            len(ring[0]) if ring else 0,
            count.data_ptr(),
        ),
        lists,
    )


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


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
    out = torch.empty(num_samples, mean.numel(), dtype=dtype, device=mean.device)
    rank = 0 if deviations is None else len(deviations)
    mean, std, rows = _aligned(mean), _aligned(std), layout.contiguous()
    ring = _aligned(deviations) if deviations is not None else mean
    _launch(
        _kernels().cuda_draw,
        mean,
        mean.data_ptr(),
        std.data_ptr(),
        ring.data_ptr(),
        rank,
        mean.numel(),
        rows.data_ptr(),
        len(rows),
        out.data_ptr(),
        _DTYPES[dtype],
        num_samples,
        seed & 0xFFFF_FFFF_FFFF_FFFF,
        first_sample,
        diag_scale,
        low_rank_scale,
        antithetic,
    )
    return out


def sampled_lora(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> Tensor:
    y = torch.empty(len(A), *base.shape[1:], dtype=base.dtype, device=base.device)
    _forward(x, A, B, scaling, base, y)
    return y


def sampled_lora_(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor) -> None:
    if base.is_contiguous():
        _forward(x, A, B, scaling, base, base)
    else:
        base.copy_(sampled_lora(x, A, B, scaling, base))


def serves(dtype: torch.dtype, rows: int, features: int, rank: int) -> bool:
    """Whether the kernels, and not matrix products, make a low-rank update.

    The kernels move the fewest bytes: x and the base are read once, y is written once, and h = x Aᵀ stays on the chip,
    which the products write and read again, at the price of a second launch. So they win where bytes and launches are
    what takes the time. A row has 2 r (in + out) operations for (in + 2 out) elements: in 16 bits about 2r/3 operations
    a byte, at r = 64 some 43, where an H100 needs 200 to be kept busy by its tensor cores. In float32 it is half that,
    but without tensor cores 20 are enough, and then the vendor's matrix product is the better one; with few rows the
    reading of A and B is all, at rows/2 operations a byte. Beyond rank 64, h does not stay on the chip.
    """
    return 0 < rank <= MAX_RANK and features > 0 and (dtype != torch.float32 or rows <= FEW_ROWS)


def _forward(x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Tensor, y: Tensor) -> None:
    """Into y, which may be the base."""
    if not y.numel():
        return
    (samples, rank, features), (_, rows, out) = A.shape, y.shape
    if not serves(x.dtype, rows, features, rank):
        products.update(x, A, B, scaling, base, y)
        return
    (x, stride_x), (A, stride_a), (B, stride_b) = map(rows_and_stride, (x, A, B))
    base, stride_base = rows_and_stride(base)
    _launch(
        _kernels().cuda_sampled_lora,
        y,
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
        stride_a,
        stride_b,
        stride_base,
        scaling,
        _DTYPES[x.dtype],
        _DTYPES[y.dtype],
    )


def sampled_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor | None:
    """None where the layer and then `sampled_lora` are the way."""
    kernels = _triton()
    return None if kernels is None else kernels.sampled_lora_linear(x, weight, bias, A, B, scaling)


def sampled_lora_backward(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (_triton() or reference).sampled_lora_backward(grad, x, A, B, scaling)


def bayes_average_(
    log_sum: Tensor, m2: Tensor, votes: Tensor, entropy: Tensor, count: Tensor, logits: Tensor, group: int
) -> None:
    logits = _aligned(logits.contiguous())  # because sums go in another order where it is not
    (samples, batch, classes), dtype = logits.shape, _DTYPES[logits.dtype]
    needed = _kernels().cuda_bayes_average_workspace(dtype, samples, batch, classes, group)
    workspace = torch.empty(needed, dtype=torch.uint8, device=logits.device)
    _launch(
        _kernels().cuda_bayes_average,
        logits,
        logits.data_ptr(),
        dtype,
        samples,
        batch,
        classes,
        log_sum.data_ptr(),
        m2.data_ptr(),
        votes.data_ptr(),
        entropy.data_ptr(),
        count.data_ptr(),
        group,
        workspace.data_ptr(),
    )
