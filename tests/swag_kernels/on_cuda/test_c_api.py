"""The C functions as a program without Python sees them: the library, its header, and what it says of bad arguments."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import swag_kernels

PACKAGE = Path(swag_kernels.__file__).parent
LIBRARY = PACKAGE / "libswag_kernels.so"
HEADERS = Path(__file__).resolve().parents[3] / "csrc" / "include"
EXAMPLE = Path(__file__).with_name("example")
ON_GPU = torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="libswag_kernels.so was not built: it needs nvcc")


def run(compiler, source, folder, *options):
    """What the program says and its exit status."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    program = folder / "program"
    link = ["-I", HEADERS, "-L", PACKAGE, "-lswag_kernels", "-Xlinker", f"-rpath={PACKAGE}"]
    compiled = subprocess.run(
        [compiler, *options, EXAMPLE / source, "-o", program, *link], capture_output=True, text=True, check=False
    )
    assert compiled.returncode == 0, compiled.stderr
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    return result.stdout, result.returncode


def test_bad_arguments_are_refused_before_any_launch(tmp_path):
    said, status = run("g++", "refusals.cpp", tmp_path, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-pthread")
    assert status == 0, "\n".join(line for line in said.splitlines() if "WRONG" in line)
    assert int(said.splitlines()[-1].split()[0]) > 120


def test_the_header_is_c(tmp_path):
    assert run("gcc", "header.c", tmp_path, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror") == ("", 0)


def test_valid_arguments_reach_the_launch(tmp_path):
    """On a GPU the whole example runs; without one every message names what could not be launched, and for what sizes."""
    said, status = run("nvcc", "example.cpp", tmp_path, "-std=c++17")
    if ON_GPU:
        assert status == 0, said
        return
    assert status == 2, said
    for function, kernel, sizes in (
        ("swag_collect", "collect", (2, 2048, 2)),
        ("swag_draw", "draw", (8, 2048, 2)),
        ("swag_sampled_lora", "sampled_lora", (8, 3, 64, 32, 4)),
        ("swag_bayes_average", "bayes_average", (8, 3, 32)),
    ):
        message = re.search(f"^{function}: 2 ({kernel}.*)$", said, re.M)
        assert message, said
        named = re.findall(r"\d+", re.search(r"\((.*?)\) could not be launched: ", message[1])[1])
        assert sorted(map(int, named)) == sorted(sizes), message[1]


def test_the_library_needs_no_driver_and_shows_nothing_else():
    """Neither CUDA's runtime nor the driver is loaded with it, and torch's own runtime cannot take the place of its own."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    for path in (LIBRARY, next(PACKAGE.glob("_C.*.so"))):
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "libc.so" in needed and not re.search("libcud|libnv|torch", needed), needed
        symbols = subprocess.run(
            ["readelf", "-sW", "--dyn-syms", path], capture_output=True, text=True, check=True
        ).stdout
        shown = [line.split()[-1] for line in symbols.splitlines() if re.search(r"(GLOBAL|WEAK) +DEFAULT +\d+ ", line)]
        assert "swag_collect" in shown and not [name for name in shown if re.match("cuda|cu[A-Z]|__cuda", name)]


@pytest.mark.skipif(ON_GPU, reason="the launch would succeed")
def test_a_failed_launch_is_an_exception_with_the_kernel_and_its_sizes():
    kernels = pytest.importorskip("swag_kernels._C")
    near = [0x10000 * i for i in range(1, 8)]
    with pytest.raises(RuntimeError, match=r"sampled_lora.*\(S=5, M=3, in=16, out=8, r=4\) could not be launched"):
        kernels.cuda_sampled_lora(*near[:5], 5, 3, 16, 8, 4, 48, 64, 32, 24, 1.0, 1, 1, 0)
    with pytest.raises(RuntimeError, match=r"bayes_average.*\(S=4, B=3, C=10\) could not be launched"):
        kernels.cuda_bayes_average(near[0], 0, 4, 3, 10, *near[1:6], 2, near[6], 0)


def test_a_refusal_is_a_value_error():
    kernels = pytest.importorskip("swag_kernels._C")
    with pytest.raises(ValueError, match=r"swag_draw: mean is 0x4, no multiple of 16 bytes"):
        kernels.cuda_draw(4, 16, 0, 0, 1024, 0, 0, 32, 0, 1, 0, 0, 1.0, 1.0, False, 0)
    with pytest.raises(ValueError, match="swag_collect: rank is -1"):
        kernels.cuda_collect(0, 0, 0, 0, 0, 0, 0, 0, -1, 8, 0)
    assert kernels.cuda_bayes_average_workspace(0, -1, 3, 10, 1) == 0
