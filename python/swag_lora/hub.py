"""Public data sets of the hub by short names, with our columns and splits, read through `datasets`.

    openbookqa                      arc-easy, arc-challenge         commonsense_qa
    mmlu:SUBJECT                    mmlu:computer_science           mmlu:law
    winogrande, winogrande:SIZE     boolq                           glue:TASK

`winogrande` is its size `xl`. MMLU has a test split only; `computer_science` and `law` join the subjects in `MMLU`,
which is how the published SWAG-LoRA experiments group them. BoolQ and all of GLUE but STS-B, which is a regression, are
classification, of sentence pairs where the set has two texts.

Sets whose test labels are not public (CommonsenseQA, WinoGrande, BoolQ, and GLUE but for MRPC) have their validation
split as `test` (MNLI the matched one), and a fifth of their training split is held out as `val`, by a hash of the text.
A fifth is the published `val_split_size`; the published code draws it anew with each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from .examples import Row, Source

HELD_OUT = 0.2
"""The share of the training split that is `val` where validation data takes the place of the test split."""

MMLU = {
    "computer_science": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "law": ("international_law", "jurisprudence", "professional_law"),
}

_GLUE = {
    "cola": ("sentence", None),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
_WINOGRANDE = ("xs", "s", "m", "l", "xl", "debiased")
_OWN = {"train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",), "oos_test": ("oos_test",)}
_ALL = {"train": "train", "val": "validation", "test": "test"}
_HIDDEN_TEST = {"train": "train", "test": "validation"}
_GLUE_SPLITS = {"mrpc": _ALL, "mnli": {"train": "train", "test": "validation_matched"}}

Columns = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class _Named:
    """Where a named set lies, our splits by its own names, and how a row gives our columns."""

    path: str
    configs: tuple[str | None, ...]
    splits: Mapping[str, str]
    columns: Columns
    labels: tuple[str, ...] | None = None


def source(name: str) -> Source:
    """The hub data set of a short name, or else the one that has this name on the hub.

    Raises:
        ValueError: an unknown part of a known set, no such data set, or splits that disagree about the class names.
        ImportError: without the `datasets` package.
    """
    named = _named(name)
    if named is None:
        return _plain(name)
    parts = [_download(name, named.path, config) for config in named.configs]
    for split in named.splits.values():
        if any(split not in part for part in parts):
            raise ValueError(f"{name}: the hub's {named.path} has no {split} split; it has {', '.join(parts[0])}")

    def read(split: str) -> list[Row]:
        rows = []
        for part, config in zip(parts, named.configs, strict=True):
            place = f"{named.path}{f'/{config}' if config else ''}[{split}]"
            rows += [(f"{place} row {i}", _columns(named, place, i, row)) for i, row in enumerate(part[split])]
        return rows

    labels = named.labels or _class_names(name, parts[0], named.splits.values())
    readers = {ours: partial(read, theirs) for ours, theirs in named.splits.items()}
    return Source(name, readers, labels, None if "val" in readers else HELD_OUT)


def _named(name: str) -> _Named | None:
    base, colon, part = name.partition(":")
    if name == "openbookqa":
        return _Named("allenai/openbookqa", ("main",), _ALL, partial(_question, "question_stem"))
    if name == "commonsense_qa":
        return _Named("tau/commonsense_qa", (None,), _HIDDEN_TEST, partial(_question, "question"))
    if name in ("arc-easy", "arc-challenge"):
        config = "ARC-Easy" if name == "arc-easy" else "ARC-Challenge"
        return _Named("allenai/ai2_arc", (config,), _ALL, partial(_question, "question"))
    if name == "boolq":
        return _Named("google/boolq", (None,), _HIDDEN_TEST, _boolq, ("no", "yes"))
    if base == "mmlu" and part:
        return _Named("cais/mmlu", MMLU.get(part, (part,)), {"test": "test"}, _mmlu)
    if base == "winogrande" and (not colon or part in _WINOGRANDE):
        return _Named("allenai/winogrande", (f"winogrande_{part or 'xl'}",), _HIDDEN_TEST, _winogrande)
    if base == "glue" and part in _GLUE:
        splits = _GLUE_SPLITS.get(part, _HIDDEN_TEST)
        return _Named("nyu-mll/glue", (part,), splits, partial(_glue, *_GLUE[part]))
    if base == "mmlu":
        raise ValueError(f"{name}: name a subject, as mmlu:astronomy, or one of mmlu:{', mmlu:'.join(MMLU)}")
    if base == "winogrande":
        raise ValueError(f"{name}: the sizes of winogrande are {', '.join(_WINOGRANDE)}")
    if base == "glue":
        raise ValueError(f"{name}: the tasks are glue:{', glue:'.join(_GLUE)}")
    return None


def _question(column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Choices with labels of their own: A, B, ... or 1, 2, ..."""
    choices = row["choices"]
    labels = list(choices["label"])
    answer = labels.index(row["answerKey"]) if row["answerKey"] in labels else row["answerKey"]
    return {"question": row[column], "choices": list(choices["text"]), "answer": answer}


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "choices": list(row["choices"]), "answer": row["answer"]}


def _winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    answer = {"1": 0, "2": 1}.get(row["answer"], row["answer"])
    return {"question": row["sentence"], "choices": [row["option1"], row["option2"]], "answer": answer}


def _boolq(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": row["question"], "text_pair": row["passage"], "label": "yes" if row["answer"] else "no"}


def _glue(first: str, second: str | None, row: Mapping[str, Any]) -> dict[str, Any]:
    pair = {} if second is None else {"text_pair": row[second]}
    return {"text": row[first], **pair, "label": row["label"]}


def _columns(named: _Named, place: str, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return named.columns(row)
    except KeyError as error:
        raise ValueError(f"{place} row {number}: no column {error}; it has {', '.join(row)}") from None


def _plain(name: str) -> Source:
    found = _download(name, name, None)
    theirs = {ours: next((alias for alias in aliases if alias in found), None) for ours, aliases in _OWN.items()}

    def read(split: str) -> list[Row]:
        return [(f"{name}[{split}] row {i}", dict(row)) for i, row in enumerate(found[split])]

    readers = {ours: partial(read, split) for ours, split in theirs.items() if split is not None}
    if not readers:
        raise ValueError(f"{name} has none of the splits {', '.join(_OWN)}; it has {', '.join(found)}")
    return Source(name, readers, _class_names(name, found, [split for split in theirs.values() if split is not None]))


def _class_names(name: str, found: Mapping[str, Any], splits: Any) -> tuple[str, ...] | None:
    """Those of the column `label`, on which all splits have to agree."""
    first: tuple[str, tuple[str, ...]] | None = None
    for split in splits:
        names = getattr(found[split].features.get("label"), "names", None)
        if not names:
            continue
        if first is not None and tuple(names) != first[1]:
            raise ValueError(f"{name}: the class names of its splits {first[0]} and {split} differ")
        first = split, tuple(names)
    return None if first is None else first[1]


def _download(name: str, path: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"no folder {name}; to read it as a hub data set, install `datasets`: pip install 'swag-kernels[data]'"
        ) from None
    try:
        return datasets.load_dataset(path) if config is None else datasets.load_dataset(path, config)
    except Exception as error:
        raise ValueError(
            f"no folder {name}, and no hub data set either: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
