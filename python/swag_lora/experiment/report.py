"""The report of a run: `results.json`, `table.md` and the figures, in its folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import tables
from ..files import write_text
from . import figures, style, table
from .results import summarise
from .stored import Run


def write(
    run_folder: str | Path,
    draw: bool | None = None,
    partial: bool = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Write the report of a run and return its results (see `results.summarise`).

    Args:
        run_folder: the run; gets ``results.json``, ``table.md`` and ``figures/*.png``.
        draw: the figures too; None draws them where matplotlib is installed and else says what to install.
        partial: of what is there, where the run is not finished.
        say: gets that line.

    Raises:
        ImportError: `draw` is True and matplotlib is not installed.
        FileNotFoundError, ValueError: as `results.summarise`.
    """
    if draw:
        style.check()
    folder = Path(run_folder)
    results = summarise(folder, partial)
    tables.write_json(results, str(folder / "results.json"))
    write_text(folder / "table.md", table.markdown(results))
    if draw or (draw is None and style.available()):
        figures.draw(Run.open(folder), results, folder / "figures")
    elif draw is None:
        say("no figures without matplotlib: pip install 'swag-kernels[plots]', then start the run again")
    return results
