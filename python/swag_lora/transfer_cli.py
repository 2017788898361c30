"""The options of `swag-lora export` and `swag-lora import`, and what they do with them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import Any, get_args

from .arguments import at_least, non_negative
from .drawing import Method

_DTYPES = ("float32", "bfloat16", "float16")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a posterior that `swag-lora fit` or SwagPosterior.save_pretrained wrote")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the adapters, one folder each")
    parser.add_argument("--num-samples", type=at_least(0), default=8, metavar="K", help="how many; 0 with --mean (8)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--first", type=at_least(0), default=0, metavar="K", help="number of the first sample (0)")
    parser.add_argument("--scale", type=non_negative, help="of the covariance (what fit chose, else 0.5)")
    parser.add_argument("--method", choices=get_args(Method), default="antithetic", help="(antithetic)")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the adapters (that of the weights in training)")
    parser.add_argument("--mean", action="store_true", help="write the mean too")
    parser.add_argument("--merge", action="store_true", help="write whole models, which need no PEFT")
    parser.add_argument("--model", help="the base model, if it is no longer where it was")


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run of the published SWAG-LoRA code, with base_model/ and swag_model.pt")
    parser.add_argument("output", help="folder for the posterior")
    parser.add_argument(
        "--max-num-models",
        type=at_least(2),
        metavar="R",
        help="as the run was configured (the deviations that it held)",
    )


def run_export(arguments: argparse.Namespace) -> None:
    """Write the adapters or models, and say what they are."""
    import torch

    from .export import MANIFEST_NAME, export_samples

    manifest = _warned(
        lambda: export_samples(
            arguments.folder,
            arguments.output,
            arguments.num_samples,
            seed=arguments.seed,
            first=arguments.first,
            scale=arguments.scale,
            method=arguments.method,
            dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
            mean=arguments.mean,
            merge=arguments.merge,
            model=arguments.model,
        )
    )
    names = [entry["name"] for entry in manifest["adapters"]]
    listed = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    kind = "model" if arguments.merge else "adapter"
    plural = "" if len(names) == 1 else "s"
    _say(f"{len(names)} {kind}{plural} of {manifest['base_model']} in {arguments.output}: {listed}")
    _say(f"how they are averaged: {arguments.output}/{MANIFEST_NAME}")


def run_import(arguments: argparse.Namespace) -> None:
    """Write the posterior, and say what it holds."""
    from .imported import import_run

    found = _warned(lambda: import_run(arguments.run, arguments.output, arguments.max_num_models))
    _say(
        f"posterior of {found['collections']} collections, {found['deviations']} deviations of {found['weights']:,} "
        f"weights, in {arguments.output}; base model: {found['base_model']}"
    )
    for note in found["notes"]:
        _say(f"note: {note}")


def _warned(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, its own warnings as lines on the standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message="vLLM does not serve|.* is not the adapter that")
        result = work()
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        _say(f"warning: {line}")
    return result


def _say(line: str) -> None:
    print(line, file=sys.stderr)
