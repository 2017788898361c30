"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import sync


@contextmanager
def whole_folder(path: str | os.PathLike[str], check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """A new folder beside `path` to fill, which takes the place of `path` when the block ends without an exception.

    All is synced first. A folder that exists and holds something is handed to `check` before the block and again before
    it is replaced: `check` raises where something in it is not to be lost. It is moved away, the new one is moved in, and
    then it is deleted; a process killed between leaves one of them under ``.NAME.….partial`` beside.

    Raises:
        ValueError: `path` is a file, or a folder that holds something and there is no `check`.
    """
    path = Path(path).absolute()
    _check(path, check)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial") for _ in range(2))
    staging.mkdir()
    try:
        yield staging
        for folder, _, names in os.walk(staging):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        _check(path, check)
        if path.exists():
            os.rename(path, old)
        os.rename(staging, path)
        sync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _check(path: Path, check: Callable[[Path], object] | None) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is a file or a link: name a folder")
    if path.is_dir() and any(path.iterdir()):
        if check is None:
            raise ValueError(f"{path} is not empty: name a folder that does not exist")
        check(path)
