"""Reading labelled text: folders of JSON lines and hub data sets.

A folder holds `train`, `val`, `test` and optionally `oos_test` (inputs from elsewhere), each as `.jsonl` or
`.jsonl.gz`, and optionally `labels.json`, the list of class names. What a line holds is in `examples`; labels of `oos_`
splits are ignored, by convention they are -1. The hub data sets that have a short name are in `hub`; any other is read
by its name, with the columns and splits of a folder.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import hub
from .examples import Example, Row, Source, UnknownLabelError, are_choices, build, hold_out, is_outside

SPLITS = ("train", "val", "test", "oos_test")

_WITHOUT_LABELS = "to read it without its labels, give it as --ood-unlabelled"


@dataclass(frozen=True)
class Dataset:
    """Splits of examples of one kind. `labels` are the class names, None for multiple choice, () where labels were ignored."""

    name: str
    splits: Mapping[str, list[Example]]
    labels: tuple[str, ...] | None

    @property
    def is_choice(self) -> bool:
        return self.labels is None

    @property
    def is_paired(self) -> bool:
        """Whether the inputs are pairs of sentences; those of `oos_` splits may differ."""
        return any(
            example.text_pair is not None
            for name, examples in self.splits.items()
            if not is_outside(name)
            for example in examples
        )

    def split(self, name: str) -> list[Example]:
        """The examples of a split that has to be there."""
        if name not in self.splits:
            raise ValueError(f"{self.name}: no {name} split; it has {', '.join(self.splits)}")
        return self.splits[name]

    def subset(self, sizes: Mapping[str, int], seed: int = 0) -> Dataset:
        """At most `sizes[split]` examples of each split, drawn at random; the others stay whole."""
        splits = {}
        for name, examples in self.splits.items():
            size = sizes.get(name, len(examples))
            if size < len(examples):
                examples = random.Random(f"{seed}/{name}").sample(examples, size)
            splits[name] = examples
        return replace(self, splits=splits)

    def fingerprint(self, split: str) -> str:
        """A hash of the split's examples in their order: 16 hexadecimal digits, the same on every machine.

        Equal for two data sets whose texts, choices and labels are equal, whatever their names.
        """
        digest = hashlib.sha256()
        for example in self.split(split):
            row = [example.text, example.text_pair, example.choices, example.label]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()[:16]


def load(
    source: str | Path,
    splits: Iterable[str] = SPLITS,
    labels: Iterable[str] | None = None,
    *,
    val_fraction: float | None = None,
) -> Dataset:
    """Read the splits that exist among `splits` from a folder, or else from the hub data set of that name.

    `labels` are the class names to read the labels with; by default those of the source: `labels.json`, the hub's
    class names, or without either the labels found in the training split. Where the source has no `val` split,
    `val_fraction` of the training examples are held out as one, by a hash of their text.

    Raises:
        FileNotFoundError: neither a folder nor the possible name of a hub data set, or no split in the folder.
        ValueError: an empty split, or a line that is not as described in `examples`, with its file and line number.
        ImportError: a hub data set without the `datasets` package.
    """
    wanted, known = tuple(splits), None if labels is None else tuple(labels)
    found = _source(source, wanted)
    if known is not None and found.labels is not None and found.labels != known:
        raise ValueError(f"{found.name} does not match the model: {_difference(found.labels, known)}")
    fraction = found.val_fraction if val_fraction is None else val_fraction
    holds_out = fraction is not None and "val" not in found.splits and "train" in found.splits
    read = [name for name in found.splits if name in wanted or (holds_out and name == "train" and "val" in wanted)]
    if not read:
        raise ValueError(f"{found.name} has none of the splits {', '.join(wanted)}; it has {', '.join(found.splits)}")
    examples, names = build(found.name, {name: found.splits[name]() for name in read}, found.labels or known)
    if holds_out and fraction is not None and "train" in examples:
        examples["train"], examples["val"] = hold_out(found.name, examples["train"], fraction)
    return Dataset(found.name, {name: examples[name] for name in wanted if name in examples}, names)


def load_outside(source: str | Path, labels: tuple[str, ...] | None = None, *, labelled: bool = True) -> Dataset:
    """Data from elsewhere, to predict with a model of another task: one split, named `test`.

    Read from a single `.jsonl` or `.jsonl.gz` file (with the `labels.json` beside it, if there is one), a folder, or a hub
    data set; of the latter two the split `test`, or `oos_test` where that is all there is. The labels are -1 without
    `labelled`, for an `oos_test` split, and where the data has none (no such column, or -1 throughout); else classes
    are read by the source's own names, or by `labels` where it declares none, and without both they are -1 too. See
    `check_shift`.
    """
    path = Path(source)
    if path.is_file():
        found = Source(str(path), {"test": partial(_read_rows, path)}, _labels_beside(path.parent))
    else:
        found = _source(source, ("test", "oos_test"))
    split = next((name for name in ("test", "oos_test") if name in found.splits), None)
    if split is None:
        raise ValueError(f"{found.name} has neither a test nor an oos_test split; it has {', '.join(found.splits)}")
    rows = found.splits[split]()
    labels = found.labels or labels
    labelled = labelled and split == "test" and any(_has_label(row) for _, row in rows)
    labelled = labelled and (labels is not None or are_choices(rows))
    try:
        examples, names = build(found.name, {"test": rows}, labels, labelled)
    except UnknownLabelError as error:
        raise ValueError(f"{error}; {_WITHOUT_LABELS} {source}") from None
    return Dataset(found.name, examples, names)


def check_shift(inside: Dataset, outside: Dataset) -> bool:
    """Whether metrics that need labels make sense for a model of `inside` on `outside`, as `load_outside` reads it.

    They do for the same classes and for multiple choice, not without labels.

    Raises:
        ValueError: other classes, multiple choice against classification, or labels of pairs of sentences against those of
            single texts; the message names both.
    """
    if inside.is_choice != outside.is_choice:
        kinds = {True: "multiple choice", False: "text classification"}
        raise ValueError(
            f"{outside.name} is {kinds[outside.is_choice]} and {inside.name} {kinds[inside.is_choice]}: a model of the "
            "one cannot predict the other"
        )
    if all(example.label == -1 for example in outside.split("test")):
        return False
    if inside.is_paired != outside.is_paired:
        forms = {True: "pairs of sentences", False: "single texts"}
        raise ValueError(
            f"{outside.name} has {forms[outside.is_paired]} and {inside.name} {forms[inside.is_paired]}, so their labels "
            f"cannot mean the same; {_WITHOUT_LABELS} {outside.name}"
        )
    if inside.labels is not None and outside.labels is not None and inside.labels != outside.labels:
        raise ValueError(
            f"{outside.name} has other classes than {inside.name} ({_difference(outside.labels, inside.labels)}), so "
            f"accuracy, NLL and calibration on it make no sense; {_WITHOUT_LABELS} {outside.name}"
        )
    return True


def _source(source: str | Path, splits: tuple[str, ...]) -> Source:
    path = Path(source)
    if path.is_dir():
        return _folder(path, splits)
    if path.exists():
        raise ValueError(f"{source} is a file; pass the folder that holds train.jsonl, val.jsonl and test.jsonl")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"no folder {source}")
    return hub.source(str(source))


def _folder(folder: Path, splits: tuple[str, ...]) -> Source:
    names = dict.fromkeys((*splits, *SPLITS))
    files = {name: path for name in names if (path := _split_file(folder, name)) is not None}
    if not files:
        wanted = ", ".join(f"{name}.jsonl" for name in splits)
        raise FileNotFoundError(f"{folder} has none of {wanted} (each may also end in .jsonl.gz)")
    return Source(
        str(folder), {name: partial(_read_rows, path) for name, path in files.items()}, _labels_beside(folder)
    )


def _has_label(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
    given = [row[name] for name in ("label", "answer") if name in row]
    return any(value is not None and value != -1 for value in given)


def _read_rows(path: Path) -> list[Row]:
    return list(_read_lines(path))


def _read_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{number + 1}: unreadable: {' '.join(str(error).split())}") from None


def _labels_beside(folder: Path) -> tuple[str, ...] | None:
    path = folder / "labels.json"
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a list of class names")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a class name is there twice")
    return tuple(names)


def _split_file(folder: Path, split: str) -> Path | None:
    paths = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    return next((path for path in paths if path.exists()), None)


def _difference(found: tuple[str, ...], expected: tuple[str, ...]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} classes against {len(expected)}"
    i = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"class {i} is {found[i]!r} against {expected[i]!r}"
