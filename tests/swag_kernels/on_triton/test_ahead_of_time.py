"""Every configuration in which the ops launch a kernel compiles for every target into what the target has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
REGISTERS = {"gfx942": 512}


@pytest.mark.parametrize("target", SHARED)
def test_every_configuration(target, tmp_path):
    reports = compiled(target, tmp_path)
    assert len(reports) > 200
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["registers"] <= REGISTERS.get(target, 255), report
        assert report["shared"] <= SHARED[target], report
        if report["kernel"] in ("shrink", "expand", "outer", "sampled_lora_linear"):
            wide = report["types"].get("x", report["types"].get("b")) == "fp32"
            assert report["on_tensor_cores"] or wide, report
        if target != "gfx942":
            check_widths(report)


def compiled(target, folder):
    """A report on each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    program = Path(__file__).with_name("ahead_of_time.py")
    command = [sys.executable, str(program), target]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_widths(report):
    """16 bytes at once, but for scalars, what lies at no multiple of 16, the elements of a tensor's last block, parts of a
    row that only a rank known in advance has, and draws with more deviations than a thread holds for eight elements."""
    constants, (loads, stores, copies) = report["constants"], (report["widths"][kind] for kind in ("ld", "st", "copy"))
    if report["kernel"] == "draw":
        narrow = constants["HELD"] > 20 and report["types"]["out"] != "fp32"
        assert set(stores) == {"8" if narrow else "16"}, report
        assert loads["16"] >= 2 + constants["HELD"], report
    if not constants.get("ALIGNED", report["kernel"] == "sampled_lora_linear"):
        return
    if report["kernel"] == "collect":
        assert set(stores) == {"16"}, report
        assert loads["16"] >= 4 + (constants["DTYPE"] >= 0), report
    elif report["kernel"] == "average":
        assert loads["16"] >= 7 and stores["16"] >= 6, report
    elif report["kernel"] == "expand":
        assert set(stores) == {"16"}, report
        if constants["RANK"] or constants["TRANSPOSED"]:
            assert set(loads) <= {"8", "16"}, report
    elif report["kernel"] == "sampled_lora_linear":  # a thread has 4 or 8 elements of A's tile
        assert set(stores) == {"16"} and set(copies) <= {"8", "16"} and copies["16"] >= 24, report
    elif constants["RANK"] or not constants["TRANSPOSED"]:
        if report["kernel"] == "shrink":
            assert set(copies) == {"16"}, report
        else:
            assert set(stores) == {"16"} and copies["16"] >= 2, report
