"""draw over LoRA-sized posteriors with 20 deviations, per sample, against the published sampler and batched torch."""

from __future__ import annotations

import math

import pytest
import torch

from harness import LORA_SIZES, alternate, compare, copy_bandwidth, limit
from swag_kernels import arena_size, draw, reference, segment_table
from swag_lora.published import PublishedSwag

RANK, SCALE = 20, 0.5
DIAG, LOW_RANK = SCALE**0.5, (SCALE / (RANK - 1)) ** 0.5
TARGETS = {"published sample_fullrank": 40.0, "batched torch (randn, addmm, addcmul)": 10.0}

CASES = [
    ("RoBERTa-base r=8 q,v", 32, "iid", torch.float32),
    ("Llama-2-7B r=8 q,v", 32, "iid", torch.float32),
    ("Llama-2-7B r=8 q,v", 32, "antithetic", torch.float32),
    ("Llama-2-7B r=8 q,v", 32, "iid", torch.bfloat16),
    ("Llama-2-7B r=8 q,v", 1, "iid", torch.float32),
    ("Llama-3-8B r=16 all-linear", 8, "iid", torch.float32),  # 1.3 GB of samples; 32 of them would not fit everywhere
]


@pytest.mark.parametrize("size, samples, method, dtype", CASES, ids=lambda v: str(v).split(" ")[0])
def bench_draw(size, samples, method, dtype, report, benchmark):
    shapes = LORA_SIZES[size]
    layout = segment_table([math.prod(shape) for shape in shapes])
    number = arena_size(layout)
    mean, std, deviations = torch.randn(number), torch.rand(number), torch.randn(RANK, number)
    settings = {
        "seed": 1, "diag_scale": DIAG, "low_rank_scale": LOW_RANK, "antithetic": method == "antithetic", "layout": layout,
        "dtype": dtype,
    }  # fmt: skip

    def ours():
        return draw(mean, std, deviations, samples, first_sample=0, **settings)

    def batched():
        z = torch.randn(samples, RANK) * LOW_RANK
        out = torch.addmm(mean, z, deviations)
        return out.addcmul_(torch.randn(samples, number), std, value=DIAG).to(dtype)

    published = PublishedSwag([torch.empty(0)], RANK)
    segments = [slice(offset, offset + numel) for offset, numel, _ in layout.tolist()]
    published.mean = [mean[s].view(shape) for s, shape in zip(segments, shapes, strict=True)]
    published.sq_mean = [(std[s] ** 2 + mean[s] ** 2).view(shape) for s, shape in zip(segments, shapes, strict=True)]
    published.cov_mat_sqrt = [deviations[:, s].contiguous() for s in segments]

    exact = reference.draw(mean, std, deviations, 1, first_sample=samples - 1, **settings | {"dtype": torch.float32})
    torch.testing.assert_close(ours()[-1].float(), exact[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    whole = torch.cat([mean[s] for s in segments])
    spread = (exact[0] - mean).std()
    for baseline in (torch.cat([t.flatten() for t in published.sample_fullrank(SCALE)]), batched()[0].float()):
        torch.testing.assert_close((baseline - whole).std(), spread, rtol=0.5, atol=0)

    targeted = size.startswith("Llama-2") and samples == 32 and method == "iid" and dtype == torch.float32
    case = f"draw a sample, {size}, R={RANK}, S={samples}, {method}, {str(dtype).removeprefix('torch.')}"
    floor = ((2 + RANK) * 4 / samples + dtype.itemsize) * number / copy_bandwidth()
    baselines = {
        "published sample_fullrank": (lambda: published.sample_fullrank(SCALE), 1),
        "batched torch (randn, addmm, addcmul)": (batched, samples),
    }
    for name, (baseline, number_drawn) in baselines.items():  # in pairs, as the batched one takes a second
        seconds = alternate({"draw": ours, name: baseline}, rounds=5 if number > 1e7 else 11)
        per_sample = {
            "draw": [t / samples for t in seconds["draw"]],
            name: [t / number_drawn for t in seconds[name]],
        }
        report(compare(case, per_sample, "draw", TARGETS if targeted else {}))
    report([limit(case, "state and samples once at copy bandwidth", per_sample["draw"], floor)])
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
