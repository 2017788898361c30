"""The options of `swag-lora bench`, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from .arguments import check_parent, count, listed, names, positive

if TYPE_CHECKING:
    from .bench import Sweep

_SAMPLES = tuple(2**power for power in range(11))
_DTYPES = ("float32", "bfloat16", "float16")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those of the sweep are checked when it is built."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape", default="minilm", help="random weights in the shape of minilm, llama-2-7b, ... (minilm)"
    )
    model.add_argument("--model", metavar="FOLDER", help="a transformers model instead")
    parser.add_argument("--layers", type=count, help="only the first so many layers")
    parser.add_argument("--samples", type=listed(count), default=_SAMPLES, metavar="K,K", help="(1,2,4,...,1024)")
    parser.add_argument("--batch", type=listed(count), default=(1, 16), metavar="B,B", help="examples (1,16)")
    parser.add_argument("--seq", type=listed(count), default=(32,), metavar="T,T", help="tokens of an example (32)")
    parser.add_argument(
        "--strategies",
        type=names,
        help="of published,prebuilt,adapter-names,vmap,one-pass,late-axis (all)",
    )
    parser.add_argument("--lora-rank", type=count, default=8, help="(8)")
    parser.add_argument("--target-modules", type=names, help="such as query,value (what PEFT takes for the model)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where torch finds a GPU)")
    parser.add_argument("--dtype", choices=_DTYPES, help="(float32 on the CPU, bfloat16 on a GPU)")
    parser.add_argument(
        "--seconds-per-case", type=positive, default=2.0, help="a strategy is timed so long in a case (2)"
    )
    parser.add_argument(
        "--limit", type=positive, default=30.0, help="a strategy that would take longer is skipped (30)"
    )
    parser.add_argument("--csv", metavar="FILE", help="all rows, written anew after each case")
    parser.add_argument("--figure", metavar="FILE", help="throughput and error against K, as .png, .pdf or .svg")


def run(options: argparse.Namespace) -> None:
    """Sweep, and print what was measured, also where it was interrupted."""
    from . import bench_figure
    from .bench_report import write_csv

    if options.figure is not None:
        bench_figure.check(options.figure)
    check_parent(options.csv, "--csv")
    sweep = _sweep(options)
    try:
        for _ in sweep.cases():
            if options.csv is not None:
                write_csv(sweep.rows, options.csv)
        sweep.measure_errors()
        left_out = len(sweep.settings.samples) - len(sweep.errors)
        if left_out:
            sweep.say(f"no errors of the {left_out} largest K: they would take over {options.limit:g} s")
    finally:
        if sweep.rows:
            _show(sweep, options)


def _sweep(options: argparse.Namespace) -> Sweep:
    import torch

    from .bench import Sweep
    from .bench_plan import Settings
    from .bench_strategies import FAMILIES
    from .shapes import Shape

    shape = (
        Shape.named(options.shape, options.layers)
        if options.model is None
        else Shape.of_folder(options.model, options.layers)
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    settings = Settings(
        shape,
        options.samples,
        options.batch,
        options.seq,
        options.strategies or FAMILIES,
        options.lora_rank,
        options.target_modules,
        getattr(torch, dtype),
        torch.device(device),
        options.seconds_per_case,
        options.limit,
        options.seed,
    )
    return Sweep(settings, say=lambda line: print(line, file=sys.stderr, flush=True))


def _show(sweep: Sweep, options: argparse.Namespace) -> None:
    from rich.console import Console

    from . import bench_figure, tables
    from .bench_report import error_table, report, write_csv

    console = Console(stderr=options.json == "-", highlight=False, markup=False)
    console.print(report(sweep.rows))
    console.print(_CAPTION, soft_wrap=True)
    if sweep.errors:
        batch, length = sweep.settings.batches[0], sweep.settings.lengths[0]
        console.print(f"\nRMS error of the averaged probabilities, batch {batch} × {length} tokens", soft_wrap=True)
        console.print(error_table([asdict(point) for point in sweep.errors]))
        console.print(f"Against the average of {sweep.errors[-1].reference} other samples.", soft_wrap=True)
    console.print(f"{sweep.limits}\n{sweep.machine}", soft_wrap=True)
    if options.csv is not None:
        write_csv(sweep.rows, options.csv)
    tables.write_json(
        {
            "machine": sweep.machine,
            "limits": asdict(sweep.limits),
            "rows": [asdict(row) for row in sweep.rows],
            "errors": [asdict(point) for point in sweep.errors],
        },
        options.json,
    )
    if options.figure is not None:
        bench_figure.draw(sweep.rows, sweep.errors, options.figure)


_CAPTION = """\
Medians of one alternating run, each after a comparison with the prebuilt loop over the same weights, which were drawn
before; the published loop draws its own for every batch. × says how many times as fast, with 20 % and 80 % quantiles.
Late axis: LoRA on the last quarter of the layers. Limit: the fraction reached of what two operations a weight and token
at the rate of a matrix product allow, or weights and samples read once at the speed of a copy."""
