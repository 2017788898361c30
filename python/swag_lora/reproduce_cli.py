"""The options of `swag-lora reproduce`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from . import arguments, recipe_arguments


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub name of a transformers model")
    parser.add_argument(
        "--data", required=True, help="task in distribution: folder with train, val and test, or hub data set"
    )
    parser.add_argument(
        "--ood", action="append", default=[], metavar="DATA", help="shifted task of the same classes; repeatable"
    )
    parser.add_argument(
        "--ood-unlabelled", action="append", default=[], metavar="DATA", help="inputs from elsewhere; repeatable"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; the same arguments continue it")
    parser.add_argument("--seeds", type=arguments.listed(arguments.at_least(0)), default=(0, 1, 2), help="(0,1,2)")
    parser.add_argument("--samples", type=arguments.at_least(2), default=32, metavar="K", help="of each posterior (32)")
    parser.add_argument("--scale", type=_auto(arguments.non_negative), default="auto", help="a number, or auto (auto)")
    parser.add_argument("--methods", type=arguments.names, help="such as map-last,swag,multiswag (all)")
    parser.add_argument(
        "--limit", type=_limits, default={}, metavar="train=N,val=N,test=N,ood=N", help="at most so many examples"
    )
    parser.add_argument(
        "--val-fraction", type=arguments.fraction, help="of train, held out where there is no val split"
    )
    parser.add_argument(
        "--predict-batch", type=arguments.count, default=32, metavar="B", help="examples of a pass (32)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the memory it needs")
    parser.add_argument("--figures", action=argparse.BooleanOptionalAction, help="(where matplotlib is installed)")
    recipe_arguments.add_task(parser)
    recipe_arguments.add(parser, "swag-lora", rank=_auto(arguments.at_least(2)))
    parser.add_argument("--json", metavar="FILE", help="write the results there too, - for standard output")


def run_reproduce(options: argparse.Namespace) -> None:
    from . import tables
    from .experiment import dry_run, run, table
    from .experiment.settings import Settings

    arguments.check_parent(options.json, "--json")
    arguments.check_parent(options.output, "--output")
    settings = Settings(
        model=options.model,
        data=options.data,
        ood=tuple(options.ood),
        ood_unlabelled=tuple(options.ood_unlabelled),
        seeds=options.seeds,
        recipe=recipe_arguments.recipe(options),
        samples=options.samples,
        scale=options.scale,
        choose_rank=options.rank == "auto",
        methods=options.methods,
        limits=options.limit,
        val_fraction=options.val_fraction,
        max_length=options.max_length,
        batch_size=options.predict_batch,
        kind=options.task,
        template=None if options.template is None else str(options.template),
        train_head=options.train_head,
    )
    if options.dry_run:
        dry_run.show(options.output, settings)
        return
    results = run.reproduce(options.output, settings, show=True, figures=options.figures)
    console = Console(stderr=options.json == "-", highlight=False)
    for one in table.terminal(results):
        console.print(one)
    print(f"report in {options.output}: results.json, table.md, figures", file=sys.stderr)
    tables.write_json(results, options.json)


def _auto(number: Any) -> Any:
    def parse(text: str) -> Any:
        return text if text == "auto" else number(text)

    return parse


def _limits(text: str) -> dict[str, int]:
    limits = {}
    for part in arguments.names(text):
        name, _, number = part.partition("=")
        limits[name.strip()] = arguments.count(number)
    return limits
