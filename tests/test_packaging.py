import re
import subprocess
import sys
from pathlib import Path

import pytest

import swag_lora

ROOT = Path(__file__).resolve().parents[1]


def test_compiled_code_includes_no_torch_header():
    sources = [path for pattern in ("*.h", "*.cpp") for path in (ROOT / "csrc").rglob(pattern)]
    assert sources
    for path in sources:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path):
    build = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path),
    ]
    result = subprocess.run(build, cwd=ROOT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "No C++17 compiler found" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_public_names_load():
    for name in swag_lora.__all__:
        assert getattr(swag_lora, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'SWAAG'"):
        swag_lora.SWAAG  # noqa: B018


def test_kernel_package_imports_nothing_above_it():
    code = "import sys, swag_kernels; print([m for m in ('transformers', 'peft', 'swag_lora') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
