"""Bytes that each Triton kernel moves at the LoRA sizes, against the least possible: the same on every machine.

The count is a program of its own, because Triton has to be imported with TRITON_INTERPRET=1 in the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.table import Table

PROGRAM = Path(__file__).with_name("bytes_moved.py")
NOTE = """least: every operand once. first: addresses that a launch loads for the first time, and those that it stores.
again: what it moves beyond that, from the cache as far as that holds it. float16 stands for bfloat16."""


def count() -> list[dict]:
    command = [sys.executable, str(PROGRAM)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}  # of many small products
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout)


@pytest.mark.skipif(find_spec("triton") is None, reason="counts in Triton's interpreter: pip install triton")
def bench_bytes(report, benchmark):
    rows = benchmark.pedantic(count, rounds=1)
    table = Table(title="MB moved by each Triton kernel", title_justify="left", caption=NOTE, caption_justify="left")
    for name in ("size", "kernel or op", "case", "least", "first", "first / least", "again", "all / least"):
        table.add_column(name, justify="left" if name in ("size", "kernel or op", "case") else "right")
    for row in rows:
        size, kernel, case, least, first, total = row.values()
        ratios = [f"{moved / least:.3f}" if least else "scratch" for moved in (first, total)]
        table.add_row(size, kernel, case, _mb(least), _mb(first), ratios[0], _mb(total - first), ratios[1])
        if least:
            benchmark.extra_info[f"{size} / {kernel}, {case}"] = round(first / least, 4)
    report([], note=table)


def _mb(value: int) -> str:
    return f"{value / 1e6:,.3f}"
