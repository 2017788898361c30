"""The command `swag-lora`: demo, fit, evaluate, reproduce, compare, export, import, bench, info."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

from . import bench_cli, compare_cli, recipe_arguments, reproduce_cli, transfer_cli
from .arguments import at_least, check_parent, count, fraction, non_negative
from .drawing import Method


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; bad input ends in one line on the standard error and the exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        _quiet()
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"swag-lora: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("swag-lora: interrupted", file=sys.stderr)
        return 130
    return 0


def _demo(arguments: argparse.Namespace) -> None:
    from . import demo, tables

    check_parent(arguments.json, "--json")
    result = demo.run(
        arguments.output,
        data=arguments.data,
        samples=arguments.samples,
        seed=arguments.seed,
        threads=arguments.threads,
        show=True,
    )
    tables.show(result, demo.title(result), demo.caption(result), arguments.json)


def _fit(arguments: argparse.Namespace) -> None:
    from . import data, fit, tables
    from .tasks import Task

    check_parent(arguments.json, "--json")
    recipe = recipe_arguments.recipe(arguments, arguments.seed)
    dataset = data.load(arguments.data, ("train", "val"))
    if arguments.train_examples:
        dataset = dataset.subset({"train": arguments.train_examples}, arguments.seed)
    how = arguments.task, arguments.template, arguments.train_head
    task = Task.of(arguments.model, dataset, arguments.max_length, recipe.seed, *how)
    history = fit.fit(arguments.output, arguments.model, dataset, recipe, arguments.max_length, show=True, task=task)
    tables.write_json(history, arguments.json)
    print(
        f"posterior of {recipe.collections} collections in {arguments.output}; "
        f"next: swag-lora evaluate {arguments.output} --data {arguments.data}",
        file=sys.stderr,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from . import data, evaluate, launch, tables
    from .evaluator import Passes, Sampling
    from .tasks import Task

    check_parent(arguments.json, "--json")
    task = Task.load(arguments.folder)
    dataset = data.load(arguments.data, ("test", "oos_test"), task.labels)
    task.check(dataset)
    with launch.ranks(arguments.data_ranks) as mesh:
        first = mesh is None or not any(mesh.get_coordinate() or ())
        evaluator, posterior = evaluate.load_folder(arguments.folder, arguments.model, arguments.batch_size, show=first)
        passes = Passes(arguments.memory, mesh, arguments.resume)
        evaluator = replace(evaluator, passes=passes)
        scale = task.scale if arguments.scale is None else arguments.scale
        sampling = Sampling(arguments.samples, arguments.seed, scale, arguments.method, arguments.tolerance)
        rows, computed = evaluate.rows(arguments.folder, evaluator, posterior, dataset, sampling)
        if not first:
            return
    counts = {name: len(examples) for name, examples in dataset.splits.items()}
    result = {
        "data": dataset.name,
        "examples": counts,
        "samples": sampling.samples,
        "scale": scale,
        "seed": sampling.seed,
        "method": sampling.resolved_method,
        "rows": rows,
    }
    if sampling.tolerance is not None:
        result["tolerance"] = sampling.tolerance
    caption = f"{counts['test']} test examples, {result['method']} samples at scale {scale:g}"
    tables.show(result, f"{arguments.folder} on {dataset.name}", caption, arguments.json)
    if arguments.verbose:
        tables.show_rows(computed)


def _bench(arguments: argparse.Namespace) -> None:
    check_parent(arguments.json, "--json")
    bench_cli.run(arguments)


def _info(arguments: argparse.Namespace) -> None:
    if arguments.folder is None:
        from swag_kernels import info

        for package in ("swag-kernels", "torch", "transformers", "peft", "accelerate", "safetensors"):
            print(f"{package:14}{_version(package)}")
        info()
        return
    from .describe import describe

    for key, value in describe(arguments.folder).items():
        print(f"{key:16}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="swag-lora", description="Bayesian averaging over LoRA weights with SWAG.")
    parser.add_argument("--version", action="version", version=_version("swag-kernels"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser("demo", help="fine-tune a small encoder, collect a posterior, compare and time")
    demo.add_argument("--data", help="folder or hub data set, instead of a set made on the spot")
    demo.add_argument("--output", type=Path, default=Path("swag-lora-demo"), help="where the posterior is kept")
    _sampling(demo)
    _common(demo)
    demo.set_defaults(run=_demo)

    fit = commands.add_parser("fit", help="fine-tune with LoRA and collect a posterior")
    fit.add_argument("model", help="folder or hub name of a transformers model")
    fit.add_argument("--data", required=True, help="folder with train and val as .jsonl or .jsonl.gz, or hub data set")
    fit.add_argument("--output", type=Path, required=True, help="folder for the posterior")
    recipe_arguments.add_task(fit)
    fit.add_argument("--train-examples", type=count, help="at most so many, drawn at random")
    recipe_arguments.add(fit, "default", at_least(2))
    _seed_and_json(fit)
    fit.set_defaults(run=_fit)

    evaluate = commands.add_parser("evaluate", help="compare point estimates with the posterior on test data")
    evaluate.add_argument("folder", help="a folder that `swag-lora fit` or `demo` wrote")
    evaluate.add_argument("--data", required=True, help="folder with test and maybe oos_test, or hub data set")
    evaluate.add_argument("--model", help="the base model, if it is no longer where it was")
    evaluate.add_argument("--scale", type=non_negative, help="of the covariance (what fit chose on validation data)")
    evaluate.add_argument("--method", choices=get_args(Method), help="(antithetic for even --samples)")
    evaluate.add_argument("--batch-size", type=count, default=32)
    evaluate.add_argument("--tolerance", type=fraction, help="stop at this standard error, --samples at the most")
    evaluate.add_argument("--memory", help="for weights and activations, such as 4GiB (chunks of a fixed size)")
    evaluate.add_argument("--resume", type=Path, metavar="FOLDER", help="keep what is averaged there, go on from it")
    evaluate.add_argument(
        "--data-ranks", type=count, default=1, help="under torchrun: ranks that share the examples (1)"
    )
    evaluate.add_argument("--verbose", action="store_true", help="print the rows that each layer computed")
    _sampling(evaluate)
    _seed_and_json(evaluate)
    evaluate.set_defaults(run=_evaluate)

    bench = commands.add_parser("bench", help="time each way to average K samples, over K, batch and sequence length")
    bench_cli.arguments(bench)
    _seed_and_json(bench)
    bench.set_defaults(run=_bench)

    reproduce = commands.add_parser(
        "reproduce", help="the paper's experiment: every baseline, over seeds, with a report"
    )
    reproduce_cli.reproduce_arguments(reproduce)
    reproduce.set_defaults(run=reproduce_cli.run_reproduce)

    compare = commands.add_parser("compare", help="runs of reproduce side by side, with paired bootstrap intervals")
    compare_cli.compare_arguments(compare)
    compare.set_defaults(run=compare_cli.run_compare)

    export = commands.add_parser("export", help="samples as ordinary PEFT adapters, or merged into whole models")
    transfer_cli.export_arguments(export)
    export.set_defaults(run=transfer_cli.run_export)

    imported = commands.add_parser("import", help="a run of the published SWAG-LoRA code as a posterior folder")
    transfer_cli.import_arguments(imported)
    imported.set_defaults(run=transfer_cli.run_import)

    info = commands.add_parser("info", help="what is installed, or what a posterior folder holds")
    info.add_argument("folder", nargs="?")
    info.set_defaults(run=_info)
    return parser


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=count, default=32, metavar="K", help="weight samples averaged (32)")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=count, default=1, help="for training on a CPU; part of the result, like the seed (1)"
    )
    _seed_and_json(parser)


def _seed_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result there, - for standard output")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _quiet() -> None:
    """Only our own lines on the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _one_line(error: BaseException) -> str:
    # str() of an OSError with a file name has the errno in front, which helps nobody.
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
