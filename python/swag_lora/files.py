"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a new file beside `path`, sync it, and put it in the place of `path` in one step.

    Whoever reads `path` meets the old file or the new one, whole, also where the process is killed. The new file has the
    suffix of `path`, by which some writers choose the format. It is removed if `write` raises. Of a link the target is
    replaced; what is no regular file, as a pipe or /dev/stdout, is written to as it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        write(path)
        return
    path = path.resolve()
    fresh = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        write(fresh)
        sync(fresh)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomic(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
