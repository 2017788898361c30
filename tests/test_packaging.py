import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import swag_lora

ROOT = Path(__file__).resolve().parents[1]


def test_compiled_code_includes_no_torch_header():
    sources = [path for pattern in ("*.h", "*.cpp", "*.cu") for path in (ROOT / "csrc").rglob(pattern)]
    assert {path.suffix for path in sources} == {".h", ".cpp", ".cu"}
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


@pytest.fixture
def configure(tmp_path):
    """Has CMake configure a build for which there is no nvcc."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    pybind11 = pytest.importorskip("pybind11")

    def run(cuda):
        options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        command = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options, f"-DSWAG_KERNELS_CUDA={cuda}"]
        environment = {**os.environ, "CUDACXX": str(tmp_path / "nvcc")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("cuda", ["AUTO", "OFF"])
def test_without_nvcc_the_rest_is_built(configure, tmp_path, cuda):
    result = configure(cuda)
    assert result.returncode == 0, result.stderr
    build = (tmp_path / "build.ninja").read_text()
    assert "csrc/bind.cpp" in build and "csrc/cuda" not in build


def test_without_nvcc_a_demand_for_cuda_says_what_is_missing(configure):
    result = configure("ON")
    assert result.returncode != 0
    assert "no nvcc of CUDA 11.8 or later was found" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("asked", "message"),
    [("yes", "SWAG_KERNELS_CUDA is 'yes'; 1 demands the CUDA kernels"), ("1", "and there is no C++17 compiler")],
)
def test_a_wish_for_cuda_that_cannot_be_met_is_refused(tmp_path, asked, message):
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path]
    environment = {"PATH": str(tmp_path), "SWAG_KERNELS_CUDA": asked}
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0 and message in result.stderr


def test_the_sdist_holds_every_source(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    listed = set(next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().split("\n"))
    for suffix in (".h", ".cpp", ".cu"):
        held = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}")}
        assert held and held <= listed, held - listed


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
