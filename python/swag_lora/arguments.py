"""Types of command-line options, and what is refused before hours of work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of a whole number that is `minimum` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"takes whole numbers, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


count = at_least(1)


def positive(text: str) -> float:
    return _number(text, lambda x: x > 0, "a number above 0")


def non_negative(text: str) -> float:
    return _number(text, lambda x: x >= 0, "a number, at least 0")


def fraction(text: str) -> float:
    return _number(text, lambda x: 0 < x <= 1, "a fraction, above 0 and at most 1")


def probability(text: str) -> float:
    return _number(text, lambda x: 0 <= x < 1, "a probability, at least 0 and below 1")


def listed(one: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    """The type of one or more values of type `one`, separated by commas."""

    def parse(text: str) -> tuple[_T, ...]:
        values = tuple(one(part.strip()) for part in text.split(",") if part.strip())
        if not values:
            raise argparse.ArgumentTypeError("must name at least one, separated by commas")
        return values

    return parse


names = listed(str)


def check_parent(target: str | Path | None, option: str) -> None:
    """Refuse a file to be written where there is no folder for it; `option` names it in the error.

    Raises:
        FileNotFoundError: no such folder.
    """
    if target is not None and not (parent := Path(target).resolve().parent).is_dir():
        raise FileNotFoundError(f"no folder {parent} for {option}")


def _number(text: str, accepted: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and accepted(value)):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
    return value
