"""The program that compute-sanitizer watches runs by itself, and its watcher passes on what it is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(program, **environment):
    command = [sys.executable, str(HERE / program)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_small_cases():
    pytest.importorskip("triton")
    result = run("small_cases.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "small cases on" in result.stdout and "by triton" in result.stdout


@pytest.fixture
def tool(tmp_path):
    """A compute-sanitizer that prints a line and exits with a status."""

    def made(says, status):
        path = tmp_path / "compute-sanitizer"
        path.write_text(
            f'#!/bin/sh\ntest "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 9\necho "{says}"\nexit {status}\n'
        )
        path.chmod(0o755)
        return run("memcheck.py", PATH=f"{tmp_path}:{os.environ['PATH']}")

    return made


@pytest.mark.parametrize(
    "says, status, expected, line",
    [
        ("ERROR SUMMARY: 0 errors", 0, 0, "0 errors"),
        ("Invalid __global__ read", 1, 1, "Invalid"),
        ("Device not supported", 1, 0, "memcheck skipped"),
    ],
)
def test_memcheck(tool, says, status, expected, line):
    result = tool(says, status)
    assert result.returncode == expected, result.stderr
    assert line in result.stdout


def test_memcheck_without_the_tool(tmp_path):
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("the tool is installed")
    result = run("memcheck.py", PATH=str(tmp_path), CUDA_HOME="")
    assert result.returncode == 0 and "memcheck skipped: no compute-sanitizer" in result.stdout
