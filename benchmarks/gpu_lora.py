"""sampled_lora on a GPU: alone against two matrix products, call after call, and together with its base layer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from gpu_timing import alternate, back_to_back, by_others
from harness import Row, assert_as_accurate, compare
from swag_kernels import reference, sampled_lora, sampled_lora_linear
from swag_kernels.triton.sampled_lora_linear import fused, tiles

DTYPE = torch.bfloat16  # of the layers


def lora_rows(device: torch.device) -> Iterator[Row]:
    kinds = {"decode": ((32, 1), (256, 1), (8, 16)), "prefill": ((8, 512), (32, 256))}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, sizes in kinds.items():
        for samples, rows in sizes:
            for features, out in ((4096, 4096), (4096, 11008)):
                for rank in (8, 16, 64):
                    found = lora_case(device, kind, samples, rows, features, out, rank)
                    ratios[kind].append(found[0].ratio)
                    yield from found
    for kind, target in (("decode", 1.5), ("prefill", 1.05)):
        mean = statistics.geometric_mean(ratios[kind])
        low, high = min(ratios[kind]), max(ratios[kind])
        yield Row(f"sampled_lora {kind}, geometric mean", "bmm + in-place baddbmm", 0.0, 0.0, mean, low, high, target)


def lora_inputs(device: torch.device, samples: int, rows: int, features: int, out: int, rank: int) -> list[Tensor]:
    shapes = (samples, rows, features), (samples, rank, features), (samples, out, rank), (samples, rows, out)
    return [torch.randn(shape, device=device).to(DTYPE) / shape[-1] ** 0.5 for shape in shapes]


def lora_case(
    device: torch.device, kind: str, samples: int, rows: int, features: int, out: int, rank: int
) -> list[Row]:
    x, A, B, base = lora_inputs(device, samples, rows, features, out, rank)

    def theirs(y: Tensor) -> Tensor:
        return y.baddbmm_(torch.bmm(x, A.mT), B.mT, alpha=0.5)

    exact = torch.baddbmm(base.float(), torch.bmm(x.float(), A.float().mT), B.float().mT, alpha=0.5)
    ours = {"sampled_lora": lambda: sampled_lora(x, A, B, 0.5, base.clone())}
    for name, function in (ours | by_others(ours["sampled_lora"], "sampled_lora", device)).items():
        assert_as_accurate(function(), theirs(base.clone()), exact, name)
    y, z = base.clone(), base.clone()
    functions = {
        "sampled_lora": lambda: sampled_lora(x, A, B, 0.5, y),
        "bmm + in-place baddbmm": lambda: theirs(z),
        **by_others(lambda: sampled_lora(x, A, B, 0.5, y), "sampled_lora", device),
    }
    case = f"sampled_lora {kind} {features}→{out} S={samples} M={rows} r={rank}"
    return compare(case, alternate(functions, device), "sampled_lora", {"bmm + in-place baddbmm": 1.0})


def plain_launch_rows(device: torch.device, samples: int = 32, width: int = 4096, rank: int = 8) -> Iterator[Row]:
    """A small decode, call after call without a graph, where launching takes longer than computing; `lora_rows` has checked
    the same case."""
    x, A, B, y = lora_inputs(device, samples, 1, width, width, rank)
    functions = {"sampled_lora": lambda: sampled_lora(x, A, B, 0.0, y)}
    others = by_others(functions["sampled_lora"], "sampled_lora", device)
    functions |= {"bmm + in-place baddbmm": lambda: y.baddbmm_(torch.bmm(x, A.mT), B.mT, alpha=0.0), **others}
    case = f"sampled_lora {width}→{width} S={samples} M=1 r={rank}, calls one after another"
    yield from compare(case, back_to_back(functions, device), "sampled_lora", dict.fromkeys(others, 1.3))


def extra_rows(device: torch.device, samples: int = 8, rows: int = 1024, width: int = 4096) -> Iterator[Row]:
    """A base layer with its update, by the choice of the library and by every other way, against the base layer alone: at
    most 8 % more is a ratio of at least 1 / 1.08."""
    for out, rank, target in ((width, 16, 1 / 1.08), (width // 4, 16, None), (width, 8, None)):
        x, A, B, _ = lora_inputs(device, samples, rows, width, out, rank)
        given = x, torch.randn(out, width, device=device).to(DTYPE) / width**0.5, None, A, B, 0.5
        ways = {"sampled_lora_linear": lambda given=given: sampled_lora_linear(*given)}
        ways["layer, then sampled_lora"] = lambda given=given: layer_and_sampled_lora(*given)
        for tile in tiles(device):
            ways[f"fused, {tile[0]} × {tile[1]}"] = lambda given=given, tile=tile: fused(*given, tile)
        exact = reference.sampled_lora_linear(*(t.float() if isinstance(t, Tensor) else t for t in given))
        plain = layer_and_products(*given)
        for way, function in ways.items():
            assert_as_accurate(function(), plain, exact, way)
        ways["layer, then bmm + in-place baddbmm"] = lambda given=given: layer_and_products(*given)
        ways["base layer alone"] = lambda given=given: linear(*given[:2])
        case = f"sampled_lora_linear, prefill {width}→{out} S={samples} M={rows} r={rank}"
        yield from compare(case, alternate(ways, device), "sampled_lora_linear", {"base layer alone": target})


def layer_and_sampled_lora(x: Tensor, weight: Tensor, bias: None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return sampled_lora(x, A, B, scaling, linear(x, weight, bias))


def layer_and_products(x: Tensor, weight: Tensor, bias: None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return linear(x, weight, bias).baddbmm_(torch.bmm(x, A.mT), B.mT, alpha=scaling)
