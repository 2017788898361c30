"""The kernels compile for every target, in the configurations of ahead_of_time.py, into what the target has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = {"gfx942": 512}


@pytest.fixture(scope="module", params=SHARED)
def target(request, tmp_path_factory):
    """The target's name and a report on each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    program = Path(__file__).with_name("ahead_of_time.py")
    result = subprocess.run(
        [sys.executable, str(program), request.param], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return request.param, [json.loads(line) for line in result.stdout.splitlines()]


def test_nothing_spills_and_everything_fits(target):
    name, reports = target
    assert len(reports) > 80
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["registers"] <= REGISTERS.get(name, 255), report
        assert report["shared"] <= SHARED[name], report


def test_loads_and_stores_of_arenas_and_logits_are_16_bytes_wide(target):
    """But for a thread's scalars, the elements of a tensor's last block, what lies at no multiple of 16, and draws of
    bfloat16 with more deviations than a thread can hold for eight elements."""
    name, reports = target
    if name == "gfx942":
        pytest.skip("reads PTX")
    for report in reports:
        case, widths = report["case"], report.get("widths")
        if case.startswith("draw") and not case.endswith("z"):
            assert set(widths["st"]) == {"8" if "bf16 R=3" in case else "16"}, report
            assert widths["ld"]["16"] >= 2, report
        if case.startswith("collect") and "aligned" in case:
            assert set(widths["st"]) == {"16"}, report
            assert widths["ld"]["16"] >= 4 + ("mixed" not in case), report
        if case.startswith("bayes_average") and "aligned" in case:
            assert widths["ld"]["16"] >= 8 and widths["st"]["16"] >= 6, report
        if case.startswith("expand") and "gradient" not in case:
            assert set(widths["st"]) == {"16"}, report
