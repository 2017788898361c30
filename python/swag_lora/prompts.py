"""Prompt templates: files that say how an example becomes the text a model reads.

A template is plain text with the fields of `FIELDS` in braces, as Python's `str.format` has them; `{{` and `}}` are the
braces themselves. White space at its end is cut off. `{choices}` are lines "A. first choice", `{letters}` is "A, B, C".
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Formatter, ascii_uppercase

from .examples import Example

FIELDS = {
    "classification": (("text",), ("text_pair",)),
    "scores": (("question", "choice"), ()),
    "letters": (("question", "choices"), ("letters",)),
}
"""Of each kind of task the fields that its template must have, and those that it may have."""


def default(kind: str) -> str | None:
    """The template that comes with the package; None for the kinds that need none."""
    if kind != "letters":
        return None
    file = resources.files("swag_lora") / "templates" / "letters.txt"
    return check(file.read_text(encoding="utf-8"), kind, file.name)


def read(path: str | Path, kind: str) -> str:
    """The template of a file, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what `check` finds; the message names the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt template {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before the text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text: {error}") from None
    return check(text, kind, str(path))


def check(text: str, kind: str, where: str) -> str:
    """The template without the white space at its end.

    Raises:
        ValueError: a field that this kind of task does not have, or lacks one that it needs; stray braces.
    """
    text = text.rstrip()
    needed, allowed = FIELDS[kind]
    known = ", ".join(f"{{{name}}}" for name in (*needed, *allowed))
    lines = text.split("\n")
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            fields = [part[1:] for part in Formatter().parse(line) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{where}:{number}: {error} (write {{{{ and }}}} for braces)") from None
        for name, spec, conversion in fields:
            if name not in (*needed, *allowed):
                raise ValueError(f"{where}:{number}: unknown field {{{name}}}; a template for {kind} has {known}")
            if spec or conversion:
                raise ValueError(f"{where}:{number}: the field {{{name}}} takes no format")
            seen.add(str(name))
    for name in needed:
        if name not in seen:
            raise ValueError(
                f"{where}:{len(lines)}: ends without the field {{{name}}}; a template for {kind} has {known}"
            )
    return text


def check_pairs(template: str, examples: Sequence[Example], where: str) -> None:
    """Refuse a classification template that drops the second sentence of pairs, or asks for one that is not there.

    Raises:
        ValueError: naming the template's file and line.
    """
    paired = any(example.text_pair is not None for example in examples)
    lines = template.split("\n")
    asking = [i for i, line in enumerate(lines, 1) if any(part[1] == "text_pair" for part in Formatter().parse(line))]
    if paired and not asking:
        raise ValueError(
            f"{where}:{len(lines)}: ends without the field {{text_pair}}, and the data are pairs of sentences"
        )
    if asking and not paired:
        raise ValueError(f"{where}:{asking[0]}: the field {{text_pair}}, and the data are no pairs of sentences")


def fill(template: str, kind: str, example: Example) -> list[str]:
    """The example's texts: one, or with scores one for each choice."""
    if kind == "classification":
        return [template.format(text=example.text, text_pair=example.text_pair)]
    if kind == "scores":
        return [template.format(question=example.text, choice=choice) for choice in example.choices]
    letters = ascii_uppercase[: len(example.choices)]
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, example.choices, strict=True))
    return [template.format(question=example.text, choices=choices, letters=", ".join(letters))]


def segments(template: str | None, kind: str, examples: Sequence[Example]) -> tuple[list[str], list[str] | None]:
    """The texts of all rows, and where they are pairs of segments the second ones."""
    if template is not None:
        return [text for example in examples for text in fill(template, kind, example)], None
    if kind == "scores":
        rows = [(example.text, choice) for example in examples for choice in example.choices]
        return [text for text, _ in rows], [choice for _, choice in rows]
    paired = any(example.text_pair is not None for example in examples)
    return [e.text for e in examples], [e.text_pair or "" for e in examples] if paired else None
