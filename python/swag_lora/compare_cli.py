"""The options of `swag-lora compare`, and what it does with them."""

from __future__ import annotations

import argparse

from .arguments import at_least, check_parent, names


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; methods are checked against the runs."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run that `swag-lora reproduce` wrote")
    parser.add_argument("--methods", type=names, metavar="A,B", help="such as map-last,swag (all that every run has)")
    parser.add_argument(
        "--reference",
        default="map-last",
        metavar="METHOD",
        help="of the first RUN, compared with all others (map-last)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the resampling (0)")
    parser.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")


def run_compare(options: argparse.Namespace) -> None:
    """Compare, and print the table."""
    check_parent(options.json, "--json")
    from rich.console import Console

    from . import tables
    from .experiment import compare

    comparison = compare.compare(options.runs, options.methods, options.reference, options.seed)
    console = Console(stderr=options.json == "-", highlight=False, markup=False)
    console.print(compare.table(comparison))
    console.print(compare.caption(comparison), soft_wrap=True)
    tables.write_json(comparison, options.json)
