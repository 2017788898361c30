"""The options of a `Recipe` and of a `Task`, which `fit` and `reproduce` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from . import arguments
from .recipe import PRESETS, Recipe


def add(parser: argparse.ArgumentParser, preset: str, rank: Callable[[str], int | str]) -> None:
    """Options that are not given leave what the preset has; `rank` is what `--rank` may be."""
    parser.add_argument(
        "--recipe", choices=PRESETS, default=preset, help=f"what the options below start from ({preset})"
    )
    parser.add_argument("--epochs", type=arguments.count, help="of the point estimate")
    parser.add_argument(
        "--start",
        type=arguments.fraction,
        help="SWAG leaves after this fraction of them (default recipe: the best on val)",
    )
    parser.add_argument(
        "--restart-best", action=argparse.BooleanOptionalAction, help="from the best epoch on val up to --start"
    )
    parser.add_argument("--collections", type=arguments.at_least(2), help="how often SWAG collects")
    parser.add_argument("--every", type=arguments.count, metavar="STEPS", help="steps between collections (an epoch)")
    parser.add_argument("--rank", type=rank, metavar="R", help="deviations kept")
    parser.add_argument("--lr", type=arguments.positive, help="peak learning rate")
    parser.add_argument("--swag-lr", type=arguments.positive, help="rate while collecting (a tenth of --lr)")
    parser.add_argument(
        "--anneal-epochs", type=arguments.at_least(0), help="from the schedule's rate to it (0: at once)"
    )
    parser.add_argument("--max-grad-norm", type=arguments.non_negative, help="gradients are clipped to it (0: not)")
    parser.add_argument("--batch-size", type=arguments.count)
    parser.add_argument("--lora-rank", type=arguments.count)
    parser.add_argument("--lora-alpha", type=arguments.count, help="(twice the rank)")
    parser.add_argument("--lora-dropout", type=arguments.probability)
    parser.add_argument("--target-modules", type=arguments.names, help="such as query,value (what PEFT takes)")
    parser.add_argument(
        "--threads", type=arguments.count, help="for training on a CPU; part of the result, like the seed (1)"
    )


def add_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=arguments.count, default=128, help="tokens of an input (128)")
    parser.add_argument(
        "--task",
        choices=("classification", "scores", "letters"),
        help="multiple choice by one score a choice or by answer letters (letters for decoders)",
    )
    parser.add_argument("--template", type=Path, metavar="FILE", help="the prompt, with fields such as {question}")
    parser.add_argument(
        "--train-head", action="store_true", help="with letters: train their rows of the output head too"
    )


def recipe(options: argparse.Namespace, seed: int = 0) -> Recipe:
    """The preset with the options that were given; a rate and LoRA's alpha follow what they are a multiple of."""
    preset = PRESETS[options.recipe]
    known = (field.name for field in fields(Recipe) if field.name not in ("rank", "seed"))
    given = {name: value for name in known if (value := getattr(options, name, None)) is not None}
    if isinstance(options.rank, int):
        given["rank"] = options.rank
    if "lr" in given:
        given.setdefault("swag_lr", given["lr"] / round(preset.lr / preset.swag_lr, 6))
    if "lora_rank" in given:
        given.setdefault("lora_alpha", given["lora_rank"] * preset.lora_alpha // preset.lora_rank)
    return replace(preset, **given, seed=seed)
