"""How long the host takes for a launch of each CUDA kernel, from addresses and sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_lora import lora_inputs
from gpu_timing import host_row
from harness import LORA_SIZES, Row
from swag_kernels import AverageState, arena_size, bayes_average_, collect_, cuda, draw, sampled_lora, segment_table
from swag_kernels.backend import choose


def launch_rows(
    device: torch.device, size: str = "Llama-3-8B r=16 all-linear", samples: int = 32, width: int = 4096
) -> Iterator[Row]:
    if choose(device) != "cuda":
        return
    params = [torch.randn(shape, device=device) for shape in LORA_SIZES[size]]
    layout = segment_table([p.numel() for p in params])
    mean, std, m2 = torch.ones(3, arena_size(layout), device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    state, logits = AverageState(32, 150, device=device), torch.randn(samples, 32, 150, device=device)
    x, A, B, base = lora_inputs(device, samples, 1, width, width, 8)
    scales = {"seed": 1, "diag_scale": 0.7, "low_rank_scale": 0.1}
    calls = {
        "collect_": (lambda: collect_(params, mean, m2, None, count, layout), 10e-6),
        "draw": (
            lambda: draw(
                mean, std, None, 1, first_sample=0, antithetic=False, layout=layout, dtype=torch.bfloat16, **scales
            ),
            5e-6,
        ),
        "sampled_lora": (lambda: sampled_lora(x, A, B, 0.5, base), 5e-6),
        "bayes_average_": (lambda: bayes_average_(state, logits), 5e-6),
    }
    for op, (call, target) in calls.items():
        for launch in recorded_launches(call):
            yield host_row(f"{op}: host time of a launch", launch, target, device)


def recorded_launches(call: Callable[[], object]) -> list[Callable[[], object]]:
    """The launches that a call makes of CUDA kernels, to be made again into the same result, which they keep."""
    launch, launches, results = cuda._launch, [], []

    def record(function: Callable[..., None], tensor: Tensor, *arguments: object) -> None:
        def again() -> object:
            launch(function, tensor, *arguments)
            return results

        launches.append(again)
        launch(function, tensor, *arguments)

    cuda._launch = record
    try:
        results.append(call())
    finally:
        cuda._launch = launch
    return launches
