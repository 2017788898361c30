"""The four ops and a whole model on a GPU: `make gpu` runs this after the tests and keeps the table in benchmarks/results.

Times of ops are the device's, between events, with cold caches: before each call 256 MiB are written. Functions take
turns, and each one's result was compared with the others' before.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench_bayes_average import plain_average
from bench_collect import ForeachSwag
from gpu_launch import launch_rows
from gpu_lora import extra_rows, lora_rows, plain_launch_rows
from gpu_model import LEAST_MEMORY, model_rows
from gpu_timing import alternate, by_others, copy_bandwidth, copy_of, host_row, machine, matmul_rate
from harness import LORA_SIZES, Row, compare, quantity
from swag_kernels import AverageState, arena_size, bayes_average_, collect_, draw, segment_table

RESULTS = Path(__file__).parent / "results"
LARGE = "Llama-3-8B r=16 all-linear"
RANK, SAMPLES = 20, 32

Part = Callable[[torch.device], Iterable[Row]]


def collect_rows(device: torch.device, size: str = LARGE) -> Iterator[Row]:
    for dtype, target in ((torch.float32, 0.85), (torch.bfloat16, 0.85)):
        params = [torch.randn(shape, device=device).to(dtype) for shape in LORA_SIZES[size]]
        layout = segment_table([p.numel() for p in params])
        number = arena_size(layout)
        mean, m2 = torch.zeros(2, number, device=device)
        deviations = torch.zeros(RANK, number, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)

        def ours(params=params, mean=mean, m2=m2, deviations=deviations, count=count, layout=layout):
            collect_(params, mean, m2, deviations, count, layout)

        functions = {"collect_": ours, **by_others(ours, "collect_", device)}
        if dtype == torch.float32:
            foreach = ForeachSwag(layout, device)
            for _ in range(3):
                ours()
                foreach.collect(params)
            torch.testing.assert_close(
                torch.cat(foreach.mean), torch.cat([mean[o : o + n] for o, n, _ in layout.tolist()])
            )
            functions["torch._foreach_*"] = lambda foreach=foreach, params=params: foreach.collect(params)
        copied = f"copy of {20 + dtype.itemsize} B a weight"
        weights = sum(p.numel() for p in params)
        functions[copied] = copy_of(weights * (20 + dtype.itemsize) // 4, device)
        case = f"collect_ {name_of(dtype)}, {size}, R={RANK}"
        yield from compare(case, alternate(functions, device), "collect_", {copied: target})
        yield host_row(f"{case}: host time", ours, 60e-6, device)


def draw_rows(device: torch.device, size: str = LARGE) -> Iterator[Row]:
    layout = segment_table([torch.Size(shape).numel() for shape in LORA_SIZES[size]])
    number = arena_size(layout)
    mean, std = torch.randn(number, device=device), torch.rand(number, device=device)
    deviations = torch.randn(RANK, number, device=device)
    settings = {"seed": 1, "diag_scale": 0.7, "low_rank_scale": 0.1, "layout": layout, "dtype": torch.bfloat16}

    def ours(rank: int = RANK, samples: int = SAMPLES, first: int = 0, antithetic: bool = False) -> Tensor:
        columns = deviations[:rank] if rank else None
        return draw(mean, std, columns, samples, first_sample=first, antithetic=antithetic, **settings)

    def theirs() -> Tensor:
        """One sample, which reads the whole state."""
        z = torch.randn(RANK, device=device)
        sample = torch.addcmul(mean, std, torch.randn_like(mean), value=0.7)
        return sample.addmv_(deviations.T, z, alpha=0.1).bfloat16()

    torch.testing.assert_close(ours(samples=2)[1:], ours(samples=1, first=1))
    for other in by_others(ours, "draw", device).values():
        torch.testing.assert_close(other(), ours())
    spread = (ours(samples=2)[0].float() - theirs().float()).std() / ours(samples=1).float().std()
    assert 0.3 < spread < 3, f"samples of another Gaussian: {spread}"
    for antithetic in (False, True):
        draws = SAMPLES // 2 if antithetic else SAMPLES
        copied, normals = "state once and samples at the speed of a copy", "as many normals by torch.randn"
        functions = {
            "draw": partial(ours, antithetic=antithetic),
            **by_others(partial(ours, antithetic=antithetic), "draw", device),
            "torch, a sample": theirs,
            copied: copy_of(number * (2 + RANK + SAMPLES // 2), device),
            normals: partial(torch.randn, draws, number, device=device, dtype=torch.bfloat16),
            "its own normals (R=0)": partial(ours, rank=0, antithetic=antithetic),
        }
        seconds = alternate(functions, device, rounds=7)
        seconds["torch, for each sample"] = [SAMPLES * s for s in seconds.pop("torch, a sample")]
        roofline = max(copied, normals, key=lambda name: statistics.median(seconds[name]))
        case = f"draw bfloat16, {size}, R={RANK}, S={SAMPLES}, {'antithetic' if antithetic else 'iid'}"
        yield from compare(case, seconds, "draw", {roofline: 0.8, "torch, for each sample": 10.0})


def average_rows(device: torch.device, batch: int = 8, classes: int = 128_256) -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(SAMPLES, batch, classes, device=device)).to(dtype)
        state = AverageState(batch, classes, device=device)
        bayes_average_(state, logits)
        probs = logits.float().softmax(-1)
        torch.testing.assert_close(state.probs(), probs.mean(0), rtol=1e-4, atol=1e-9)
        del probs
        once = "logits once at the speed of a copy"
        functions = {
            "bayes_average_": lambda state=state, logits=logits: bayes_average_(state, logits),
            **by_others(lambda state=state, logits=logits: bayes_average_(state, logits), "bayes_average_", device),
            "softmax, mean, entropies": lambda logits=logits: plain_average(logits.softmax(-1, dtype=torch.float32)),
            once: copy_of(logits.numel() * dtype.itemsize // 4, device),
        }
        case = f"bayes_average_ {name_of(dtype)} S={SAMPLES} B={batch} C={classes}"
        yield from compare(case, alternate(functions, device), "bayes_average_", {once: 0.8})


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def markdown(rows: list[Row], device: str, limits: str) -> str:
    lines = [
        f"# {device}",
        "",
        "Medians of one alternating run; the ratio is the other's time over ours (20 % – 80 %). Ops and decode steps with "
        "cold caches, in time on the device; evaluation in time of the clock.",
        "",
        "| case | against | ours | theirs or limit | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.low:.2f} – {row.high:.2f})"
        ours, theirs = quantity(row.ours), quantity(row.theirs)
        lines.append(f"| {row.case} | {row.baseline} | {ours} | {theirs} | {ratio} | {row.verdict} |")
    return "\n".join([*lines, "", f"Physical limits, measured: {limits}.", "", machine(), ""])


def write(rows: list[Row], device: torch.device) -> Path:
    """The JSON file and the table made from it; the path of both without its ending."""
    name = torch.cuda.get_device_name()
    limits = {"copy_bytes_per_s": copy_bandwidth(device), "bfloat16_matmul_flop_per_s": matmul_rate(device)}
    said = "copy {:.2f} TB/s read and written, bfloat16 matmul {:.0f} TFLOP/s".format(
        *(v / 1e12 for v in limits.values())
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    kept = [asdict(row) | {"verdict": row.verdict} for row in rows]
    result = {"device": name, "machine": machine(), "limits": limits, "rows": kept}
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(rows, name, said), encoding="utf-8")
    return file


def run(parts: Iterable[Part], device: torch.device) -> tuple[list[Row], list[str]]:
    """The rows of all parts, printed and written as they come, and the names of the parts that failed."""
    rows: list[Row] = []
    failed = []
    for part in parts:
        try:
            with torch.no_grad():
                for row in part(device):
                    rows.append(row)
                    print(f"{row.case} | {row.baseline}: {row.ratio:.2f} {row.verdict}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(part.__name__)
        torch.cuda.empty_cache()
        file = write(rows, device)
        print(f"{part.__name__}: written to {file}.json and .md", flush=True)
    return rows, failed


def main() -> None:
    """Every part; one that fails leaves the others' rows, and an exit status."""
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU")
    device = torch.device("cuda")
    parts: list[Part] = [
        collect_rows,
        draw_rows,
        lora_rows,
        plain_launch_rows,
        launch_rows,
        extra_rows,
        average_rows,
    ]
    if torch.cuda.get_device_properties(device).total_memory >= LEAST_MEMORY:
        parts.append(model_rows)
    else:
        print(f"no rows of a whole model: they need {LEAST_MEMORY >> 30} GiB of memory on the GPU")
    _, failed = run(parts, device)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
