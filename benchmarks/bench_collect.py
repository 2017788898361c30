"""collect_ over LoRA-sized posteriors with 20 deviations, against the published algorithm and ``torch._foreach_*``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from harness import LORA_SIZES, Row, alternate, compare, peak_bytes
from swag_kernels import arena_size, collect_, segment_table
from swag_lora import SwagPosterior
from swag_lora.published import PublishedSwag

RANK = 20
PUBLISHED, FOREACH = "published algorithm", "torch._foreach_*"
COPY = "copy of 12 B a weight"  # what is read, parameter, mean and m2, and as much written, mean, m2 and one deviation
TARGETS = {"Llama-2-7B r=8 q,v": {PUBLISHED: 30.0, FOREACH: 5.0, COPY: 0.8}}


class ForeachSwag:
    """The same update on views of flat buffers, each step one fused call over all tensors; a ring of two slots is enough here."""

    def __init__(self, layout: Tensor, device: torch.device | str = "cpu") -> None:
        size = arena_size(layout)
        segments = [slice(offset, offset + numel) for offset, numel, _ in layout.tolist()]
        mean, m2, *deviations = torch.zeros(4, size, device=device)
        self.mean, self.m2 = [mean[s] for s in segments], [m2[s] for s in segments]
        self.slots = [[row[s] for s in segments] for row in deviations]
        self.count = 0

    @torch.no_grad()
    def collect(self, params: list[Tensor]) -> None:
        flat = [p.view(-1) for p in params]
        delta = torch._foreach_sub(flat, self.mean)
        torch._foreach_lerp_(self.mean, flat, 1 / (self.count + 1))
        deviation = torch._foreach_sub(flat, self.mean)
        torch._foreach_addcmul_(self.m2, delta, deviation)
        torch._foreach_copy_(self.slots[self.count % 2], deviation)
        self.count += 1


@pytest.mark.parametrize("size", LORA_SIZES)
def bench_collect(size, report, benchmark):
    shapes = LORA_SIZES[size]
    params = [torch.randn(shape) for shape in shapes]
    layout = segment_table([p.numel() for p in params])
    number = arena_size(layout)
    mean, m2, deviations = torch.zeros(number), torch.zeros(number), torch.zeros(RANK, number)
    count = torch.zeros((), dtype=torch.int64)
    published, foreach = PublishedSwag(params, RANK), ForeachSwag(layout)

    def ours():
        collect_(params, mean, m2, deviations, count, layout)

    for _ in range(RANK + 1):  # the ring wraps, so that the published form has a column to drop
        for param in params:
            param.add_(torch.randn(param.shape).mul_(0.1))
        ours()
        published.collect(params)
        foreach.collect(params)
    for index, (offset, numel, _) in enumerate(layout.tolist()):
        segment = slice(offset, offset + numel)
        torch.testing.assert_close(mean[segment], published.mean[index].flatten(), rtol=1e-5, atol=1e-5)
        variance = published.sq_mean[index] - published.mean[index] ** 2
        torch.testing.assert_close(m2[segment] / (RANK + 1), variance.flatten(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviations[0, segment], published.cov_mat_sqrt[index][-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(m2[segment], foreach.m2[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deviations[0, segment], foreach.slots[0][index], rtol=1e-4, atol=1e-5)

    weights = sum(math.prod(shape) for shape in shapes)
    source, target = torch.zeros(2, 3 * weights)
    functions = {
        "collect_": ours,
        PUBLISHED: lambda: published.collect(params),
        FOREACH: lambda: foreach.collect(params),
        COPY: lambda: target.copy_(source),
    }
    rounds = 7 if number > 1e7 else 21
    for calls, caches in ((4, "own caches"), (1, "cold caches")):
        seconds = alternate(functions, rounds=rounds, calls=calls)
        case = f"collect_, {size}: {weights / 1e6:.1f} M weights in {len(params)} tensors, R={RANK}, {caches}"
        report(compare(case, seconds, "collect_", TARGETS.get(size) if calls > 1 else None))
    benchmark.pedantic(ours, rounds=9, warmup_rounds=1)


def bench_memory(report, benchmark):
    """Bytes of a posterior's tensors against its buffers', and the most that one collection allocates, with its check."""
    shapes = LORA_SIZES["Llama-2-7B r=8 q,v"]
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape)) for shape in shapes)
    posterior = SwagPosterior(model, rank=RANK)
    posterior.collect()
    buffers = posterior.mean.nbytes + posterior.m2.nbytes + posterior.deviations.nbytes
    state = sum(
        {t.untyped_storage().data_ptr(): t.nbytes for t in vars(posterior).values() if torch.is_tensor(t)}.values()
    )
    peak = peak_bytes(posterior.collect)
    assert posterior.mean.numel() == arena_size(segment_table([math.prod(shape) for shape in shapes]))
    largest = 4 * max(math.prod(shape) for shape in shapes)
    assert peak <= 2 * largest, f"collect allocates {peak} bytes, the largest tensor has {largest}"
    arena = 4 * posterior.mean.numel()
    case = f"posterior, Llama-2-7B r=8 q,v, R={RANK}"
    fraction, share = buffers / state, arena / max(peak, 1)
    report(
        [
            Row(
                f"{case}: state", "mean, m2, deviations", state, buffers, fraction, fraction, fraction, 0.999, unit="B"
            ),
            Row(f"{case}: peak of collect", "one arena", peak, arena, share, share, share, unit="B"),
        ]
    )
    benchmark.pedantic(posterior.collect, rounds=9, warmup_rounds=1)
