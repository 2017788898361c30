"""Reading labelled text: folders of JSON lines and hub data sets.

A folder holds `train`, `val`, `test` and optionally `oos_test` (inputs from elsewhere), each as `.jsonl` or
`.jsonl.gz`, and optionally `labels.json`, the list of class names. A line is either

    {"text": "...", "label": 3}                                   label: a class index, or a name of labels.json
    {"question": "...", "choices": ["...", "..."], "answer": 0}   answer: an index into choices

Labels of `oos_` splits are ignored; by convention they are -1. Every error names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test", "oos_test")
_HUB_NAMES = {"val": ("validation", "val", "dev"), "oos_test": ("oos_test",)}


@dataclass(frozen=True)
class Example:
    """One labelled input. `label` is a class index or the index of the right choice, -1 where there is none."""

    text: str
    label: int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Splits of examples of one kind. `labels` are the class names, None for multiple choice."""

    name: str
    splits: Mapping[str, list[Example]]
    labels: tuple[str, ...] | None

    @property
    def is_choice(self) -> bool:
        return self.labels is None

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
        return Dataset(self.name, splits, self.labels)


def load(source: str | Path, splits: Iterable[str] = SPLITS, labels: Iterable[str] | None = None) -> Dataset:
    """Read the splits that exist among `splits` from a folder, or else from the hub data set of that name.

    `labels` are the class names to read the labels with; by default those of the source: `labels.json`, the hub's
    class names, or without either the labels found in the training split.

    Raises:
        FileNotFoundError: neither a folder nor the possible name of a hub data set, or no split in the folder.
        ValueError: an empty split, or a line that is not as described above, with its file and line number.
        ImportError: a hub data set without the `datasets` package.
    """
    known = None if labels is None else tuple(labels)
    if Path(source).is_dir():
        return _load_folder(Path(source), tuple(splits), known)
    if Path(source).exists():
        raise ValueError(f"{source} is a file; pass the folder that holds train.jsonl, val.jsonl and test.jsonl")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"no folder {source}")
    return _load_hub(str(source), tuple(splits), known)


def _load_folder(folder: Path, splits: tuple[str, ...], labels: tuple[str, ...] | None) -> Dataset:
    files = {name: path for name in splits if (path := _split_file(folder, name)) is not None}
    if not files:
        wanted = ", ".join(f"{name}.jsonl" for name in splits)
        raise FileNotFoundError(f"{folder} has none of {wanted} (each may also end in .jsonl.gz)")
    if (folder / "labels.json").exists():
        names = _read_labels(folder / "labels.json")
        if labels is not None and names != labels:
            raise ValueError(f"{folder / 'labels.json'} does not match the model: {_difference(names, labels)}")
        labels = names
    rows = {name: list(_read_lines(path)) for name, path in files.items()}
    return _build(str(folder), rows, labels)


def _load_hub(name: str, splits: tuple[str, ...], labels: tuple[str, ...] | None) -> Dataset:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"no folder {name}; to read it as a hub data set, install `datasets`: pip install 'swag-kernels[data]'"
        ) from None
    try:
        source = datasets.load_dataset(name)
    except Exception as error:
        raise ValueError(f"no folder {name}, and no hub data set either: {_one_line(error)}") from None
    rows: dict[str, list[tuple[str, Any]]] = {}
    for split in splits:
        found = next((alias for alias in _HUB_NAMES.get(split, (split,)) if alias in source), None)
        if found is None:
            continue
        rows[split] = [(f"{name}[{found}] row {i}", row) for i, row in enumerate(source[found])]
        names = getattr(source[found].features.get("label"), "names", None)
        if names and labels is not None and tuple(names) != labels:
            raise ValueError(f"{name} does not match the model: {_difference(tuple(names), labels)}")
        labels = tuple(names) if names else labels
    if not rows:
        raise ValueError(f"{name} has none of the splits {', '.join(splits)}; it has {', '.join(source)}")
    return _build(name, rows, labels)


def _build(name: str, rows: dict[str, list[tuple[str, Any]]], labels: tuple[str, ...] | None) -> Dataset:
    for split, lines in rows.items():
        if not lines:
            raise ValueError(f"{name}: the {split} split is empty")
    first = next(iter(rows.values()))[0][1]
    if isinstance(first, dict) and "choices" in first:
        splits = {
            split: [_choice(where, row, outside=split.startswith("oos")) for where, row in lines]
            for split, lines in rows.items()
        }
        return Dataset(name, splits, None)
    if labels is None:
        labels = _labels_found(name, rows)
    index = {label: i for i, label in enumerate(labels)}
    splits = {
        split: [_text(where, row, index, outside=split.startswith("oos")) for where, row in lines]
        for split, lines in rows.items()
    }
    return Dataset(name, splits, labels)


def _text(where: str, row: Any, index: dict[str, int], outside: bool) -> Example:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where}: expected {{"text": string, "label": ...}}')
    if outside:
        return Example(row["text"], -1)
    label = row.get("label")
    if isinstance(label, str) and label in index:
        label = index[label]
    if type(label) is not int or not 0 <= label < len(index):
        raise ValueError(f"{where}: unknown label {label!r}; it must be in 0..{len(index) - 1} or a class name")
    return Example(row["text"], label)


def _choice(where: str, row: Any, outside: bool) -> Example:
    form = '{"question": string, "choices": [string, string, ...], "answer": index}'
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise ValueError(f"{where}: expected {form}")
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"{where}: expected {form}")
    if outside:
        return Example(row["question"], -1, tuple(choices))
    answer = row.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: unknown answer {answer!r}; it must be in 0..{len(choices) - 1}")
    return Example(row["question"], answer, tuple(choices))


def _labels_found(name: str, rows: dict[str, list[tuple[str, Any]]]) -> tuple[str, ...]:
    lines = rows.get("train")
    if lines is None:
        raise ValueError(f"{name}: the class names are unknown without labels.json or a train split")
    found = [row.get("label") for _, row in lines if isinstance(row, dict)]
    names = [label for label in found if isinstance(label, str)]
    if len(names) == len(found):
        return tuple(sorted(set(names)))
    return tuple(str(i) for i in range(1 + max((x for x in found if type(x) is int), default=0)))


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{number + 1}: unreadable: {_one_line(error)}") from None


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {_one_line(error)}") from None
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
