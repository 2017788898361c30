"""sampled_lora over the shapes of LoRA layers, against ``torch.bmm`` and an in-place ``torch.baddbmm``."""

from __future__ import annotations

import itertools
import math
import time

import torch

from harness import Row, alternate, assert_as_accurate, compare, copy_bandwidth, limit, matmul_rate
from swag_kernels import sampled_lora
from swag_kernels.reference import sampled_lora as exact_lora

SCALING = 1e-3
BASELINE = "bmm + in-place baddbmm"
DTYPES = (torch.float32, torch.bfloat16)
SIZES = list(itertools.product((768, 4096), (8, 32), (1, 16, 128), (8, 16)))  # features = out, S, M, r


@torch.no_grad()
def rows_of(dtype: torch.dtype, features: int, samples: int, rows: int, rank: int, budget: float = 0.3) -> list[Row]:
    """The comparison and the physical limit of one shape, both within ``budget`` seconds or so."""
    x, base = (torch.randn(samples, rows, features).to(dtype) for _ in range(2))
    A, B = torch.randn(samples, rank, features).to(dtype), torch.randn(samples, features, rank).to(dtype)

    def ours():
        return sampled_lora(x, A, B, SCALING, base)

    def baseline(base=base):
        return torch.baddbmm(base, torch.bmm(x, A.mT), B.mT, alpha=SCALING, out=base)

    exact = exact_lora(x.double(), A.double(), B.double(), SCALING, base.double())
    assert_as_accurate(sampled_lora(x, A, B, SCALING, base.clone()), baseline(base.clone()), exact, "sampled_lora")

    start = time.perf_counter()
    baseline()
    rounds = min(max(int(budget / 2 / (time.perf_counter() - start)), 9), 301)
    seconds = alternate({"sampled_lora": ours, BASELINE: baseline}, rounds=rounds, warmup=3)
    case = f"sampled_lora {str(dtype)[6:]} {features}→{features} S={samples} M={rows} r={rank}"
    moved = sum(t.numel() * t.element_size() for t in (x, A, B, base, base))
    operations = 4 * samples * rows * features * rank
    bound = max(
        (moved / copy_bandwidth(), "bytes at copy bandwidth"),
        (operations / matmul_rate(dtype), "operations at matmul rate"),
    )
    return [
        *compare(case, seconds, "sampled_lora", {BASELINE: 0.95}),
        limit(case, bound[1], seconds["sampled_lora"], bound[0]),
    ]


def bench_sampled_lora(report, benchmark):
    table = [rows_of(dtype, *size) for dtype in DTYPES for size in SIZES]
    ratios = [comparison.ratio for comparison, _ in table]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    report([row for pair in table for row in pair])
    seconds = [sum(getattr(pair[0], side) for pair in table) for side in ("ours", "theirs")]
    report(
        [
            Row(
                f"sampled_lora, geometric mean of {len(ratios)} shapes",
                BASELINE,
                *seconds,
                mean,
                min(ratios),
                max(ratios),
                1.5,
            )
        ]
    )

    x, A, B, base = (torch.randn(8, *shape) for shape in ((16, 4096), (8, 4096), (4096, 8), (16, 4096)))
    benchmark.pedantic(lambda: sampled_lora(x, A, B, SCALING, base), rounds=20, warmup_rounds=2)
