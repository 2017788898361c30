import pytest
from rich.console import Console, RenderableType
from rich.table import Table

import harness

_rows = pytest.StashKey[list[harness.Row]]()
_notes = pytest.StashKey[list[RenderableType]]()


def pytest_configure(config):
    config.stash[_rows] = []
    config.stash[_notes] = []


@pytest.fixture
def report(request, benchmark):
    """``report(rows)`` adds rows to the table of this run, and to pytest-benchmark's record of this benchmark; a note, a
    line or a table of its own, comes below."""

    def add(rows: list[harness.Row], note: RenderableType | None = None) -> None:
        request.config.stash[_rows].extend(rows)
        if note:
            request.config.stash[_notes].append(note)
        for row in rows:
            benchmark.extra_info[f"{row.case} / {row.baseline}"] = round(row.ratio, 3)

    return add


def pytest_terminal_summary(terminalreporter, config):
    rows, notes = config.stash[_rows], config.stash[_notes]
    if not rows and not notes:
        return
    console = Console(width=170, file=terminalreporter._tw._file)
    if rows:
        console.print(_ratios(rows))
    for note in notes:
        console.print(note)
    console.print(harness.machine())


def _ratios(rows):
    table = Table(
        title="ratios: median (20 % – 80 %) of one alternating run; seconds are medians", title_justify="left"
    )
    for name in ("case", "against", "ours", "theirs or limit", "ratio", "target"):
        table.add_column(name, justify="left" if name in ("case", "against") else "right")
    for row in rows:
        table.add_row(
            row.case,
            row.baseline,
            _quantity(row.ours, row.unit),
            _quantity(row.theirs, row.unit),
            f"{row.ratio:.2f} ({row.low:.2f} – {row.high:.2f})",
            row.verdict,
        )
    return table


def _quantity(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.3g} {unit}"
    for name, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {name}"
    return f"{value * 1e9:.3g} ns"
