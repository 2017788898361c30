"""Labelled examples, and how rows of a file or a hub data set become them.

A row is a mapping with the columns

    {"text": "...", "label": 3}                       label: a class index, or a class name
    {"text": "...", "text_pair": "...", "label": 3}   a pair of sentences
    {"question": "...", "choices": ["...", "..."], "answer": 0}   answer: an index into choices, or its letter A, B, ...

Every error names the row: the file and the line, or the hub data set, its split and the row's number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from string import ascii_uppercase
from typing import Any


class UnknownLabelError(ValueError):
    """A row's label is none of the classes."""


Row = tuple[str, Any]
"""Where a row stands, for messages, and its columns."""

_TEXT_FORM = '{"text": string, "label": ...}'
_CHOICE_FORM = '{"question": string, "choices": [string, string, ...], "answer": index or letter}'


@dataclass(frozen=True)
class Example:
    """One labelled input. `label` is a class index or the index of the right choice, -1 where there is none.

    `text_pair` is the second sentence of a pair, None where there is one text.
    """

    text: str
    label: int
    choices: tuple[str, ...] = ()
    text_pair: str | None = None


@dataclass(frozen=True)
class Source:
    """Where a data set's rows come from: how to read each split that is there, and the class names it declares.

    Without a `val` split, `val_fraction` of `train` is held out as such.
    """

    name: str
    splits: Mapping[str, Callable[[], list[Row]]]
    labels: tuple[str, ...] | None
    val_fraction: float | None = None


def build(
    name: str, rows: Mapping[str, list[Row]], labels: tuple[str, ...] | None, labelled: bool = True
) -> tuple[dict[str, list[Example]], tuple[str, ...] | None]:
    """Examples of each split, and the class names: None for multiple choice, none at all where labels are ignored.

    `labels` None takes the classes that occur in the `train` split. Labels of splits `oos_*` are ignored, and without
    `labelled` those of all.

    Raises:
        ValueError: an empty split, or a row that does not fit; see the module.
    """
    for split, lines in rows.items():
        if not lines:
            raise ValueError(f"{name}: the {split} split is empty")
    if are_choices(next(iter(rows.values()))):
        return {
            split: [_choice(where, row, labelled and not is_outside(split)) for where, row in lines]
            for split, lines in rows.items()
        }, None
    classes = _classes(name, rows, labels) if labelled else _Classes((), {}, numbers=True)
    paired: dict[bool, bool] = {}
    splits = {}
    for split, lines in rows.items():
        outside = is_outside(split)
        like = paired.setdefault(outside, _has_pair(lines[0][1]))
        splits[split] = [_text(where, row, classes if labelled and not outside else None, like) for where, row in lines]
    return splits, classes.names


def hold_out(name: str, examples: list[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """What stays, and about `fraction` of the examples: those whose text has a small hash, equal texts on one side.

    Raises:
        ValueError: a fraction outside of (0, 1), or so few examples that a side is empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of training examples held out must lie between 0 and 1, got {fraction}")
    limit = fraction * 2**64
    stay: list[Example] = []
    held: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(json.dumps([example.text, example.text_pair]).encode()).digest()
        (held if int.from_bytes(digest[:8], "big") < limit else stay).append(example)
    if not held or not stay:
        raise ValueError(
            f"{name}: holding out {fraction:g} of {len(examples)} training examples leaves a split empty: give a val split"
        )
    return stay, held


def are_choices(rows: list[Row]) -> bool:
    """Whether the first row is a question with choices."""
    return bool(rows) and isinstance(rows[0][1], dict) and not {"question", "choices"}.isdisjoint(rows[0][1])


@dataclass(frozen=True)
class _Classes:
    """Class names with their indices; `numbers`: whether a label may be the index itself."""

    names: tuple[str, ...]
    index: Mapping[str, int]
    numbers: bool

    def of(self, where: str, label: object) -> int:
        if isinstance(label, str) and label in self.index:
            return self.index[label]
        if type(label) is int and 0 <= label < len(self.names) and self.numbers:
            return label
        if self.numbers:
            known = f"it must be in 0..{len(self.names) - 1} or a class name"
        else:
            known = f"the train split has {', '.join(self.names[:8])}{', ...' if len(self.names) > 8 else ''}"
        raise UnknownLabelError(f"{where}: unknown label {label!r}; {known}")


def _classes(name: str, rows: Mapping[str, list[Row]], labels: tuple[str, ...] | None) -> _Classes:
    """The classes given, or those of the training split: all names, or all numbers."""
    numbers = True
    if labels is None:
        if "train" not in rows:
            raise ValueError(f"{name}: the class names are unknown without labels.json or a train split")
        found = [(where, row["label"]) for where, row in rows["train"] if isinstance(row, dict) and "label" in row]
        numbers = not found or not isinstance(found[0][1], str)
        for where, label in found:
            if isinstance(label, str) == numbers and isinstance(label, (str, int)):
                raise ValueError(
                    f"{where}: the label {label!r} is a {'name' if numbers else 'number'}, the first of the train "
                    f"split ({found[0][0]}) a {'number' if numbers else 'name'}: use one of both, or add labels.json"
                )
        if numbers:
            where, largest = max(((w, x) for w, x in found if type(x) is int), key=itemgetter(1), default=("", 0))
            if largest >= len(rows["train"]):
                raise ValueError(
                    f"{where}: the label {largest} makes {largest + 1} classes, more than the train split has examples "
                    f"({len(rows['train'])}): number the classes from 0, or name all of them in labels.json"
                )
            labels = tuple(str(i) for i in range(1 + largest))
        else:
            labels = tuple(sorted({label for _, label in found if isinstance(label, str)}))
    return _Classes(labels, {label: i for i, label in enumerate(labels)}, numbers)


def _text(where: str, row: Any, classes: _Classes | None, paired: bool) -> Example:
    text = _column(where, row, "text", _TEXT_FORM)
    if _has_pair(row) != paired:
        there = "no column" if paired else "a column"
        raise ValueError(f'{where}: {there} "text_pair", unlike the rows before it: all rows have it, or none')
    pair = _column(where, row, "text_pair", _TEXT_FORM) if paired else None
    if classes is None:
        return Example(text, -1, text_pair=pair)
    if "label" not in row:
        raise ValueError(f'{where}: expected {_TEXT_FORM}: no column "label"')
    return Example(text, classes.of(where, row["label"]), text_pair=pair)


def _choice(where: str, row: Any, labelled: bool) -> Example:
    question = _column(where, row, "question", _CHOICE_FORM)
    choices = row.get("choices")
    if "choices" not in row:
        raise ValueError(f'{where}: expected {_CHOICE_FORM}: no column "choices"')
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f'{where}: expected {_CHOICE_FORM}: "choices" is no list of two or more strings')
    for choice in choices:
        _check_characters(where, "choices", choice)
    if not labelled:
        return Example(question, -1, tuple(choices))
    if "answer" not in row:
        raise ValueError(f'{where}: expected {_CHOICE_FORM}: no column "answer"')
    answer = row["answer"]
    letters = ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        answer = letters.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        known = f"0..{len(choices) - 1}" + (f" or {letters[0]}..{letters[-1]}" if len(choices) <= 26 else "")
        raise ValueError(f"{where}: unknown answer {answer!r}; it must be in {known}")
    return Example(question, answer, tuple(choices))


def _column(where: str, row: Any, column: str, form: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected {form}")
    if column not in row:
        raise ValueError(f'{where}: expected {form}: no column "{column}"')
    if not isinstance(row[column], str):
        raise ValueError(f'{where}: expected {form}: "{column}" is no string')
    _check_characters(where, column, row[column])
    return row[column]


def _check_characters(where: str, column: str, text: str) -> None:
    """JSON can say half of a surrogate pair, which is no character; a tokenizer raises a TypeError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where}: "{column}" has {ascii(text[error.start])} as character {error.start + 1}, half of a surrogate '
            "pair, which no tokenizer reads: write the whole character, or leave it out"
        ) from None


def _has_pair(row: Any) -> bool:
    return isinstance(row, dict) and row.get("text_pair") is not None


def is_outside(split: str) -> bool:
    """Whether a split holds inputs from elsewhere, whose labels are ignored."""
    return split.startswith("oos")
