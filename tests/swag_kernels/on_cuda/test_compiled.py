"""Every kernel as nvcc compiles it for every architecture: registers that suffice, and instructions as wide as memory is."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
WITHOUT_KERNELS = {"bayes_average.cu", "sampled_lora.cu"}  # they choose one of another file

# Kernels by name, with the least number of loads of 16 bytes that each must have, of wide stores, and how wide those are.
WIDE = {
    r"collect_kernel<": (3, 3, 16),
    r"draw_kernel<float, ": (2, 1, 16),
    r"draw_kernel<b?float16, ": (2, 1, 8),  # a thread has four elements of a sample
    r"average_large_kernel<.*, true>": (7, 2, 16),
    r"average_large_kernel<.*, false>": (0, 0, 16),
    r"average_small_kernel<": (1, 0, 16),  # a few rows, which a warp has in its registers
    r"lora_kernel<LoraShape<b?float16, \d+, true,": (8, 8, 16),
    r"lora_kernel<LoraShape<b?float16, \d+, false,": (0, 0, 16),
    r"float32_kernel<true>": (2, 0, 16),
    r"float32_kernel<false>": (0, 0, 16),
}
ON_TENSOR_CORES = "lora_kernel<"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(params=SOURCES, ids=lambda path: path.name)
def compiled(request, architecture, tmp_path):
    """A source's name, its cubin, and what ptxas said of it."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path / "kernels.cubin"
    flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = ["nvcc", *flags, "-I", CSRC, "-cubin", "-o", cubin, request.param]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return request.param.name, cubin, result.stderr


def test_nothing_spills_and_memory_is_accessed_in_wide_words(compiled):
    source, cubin, report = compiled
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    assert bool(names) != (source in WITHOUT_KERNELS)
    frames = re.findall(r"Function properties for (\w+)\n\s*(.*)", report)
    assert {name for name, _ in frames} >= set(names)
    for name, frame in frames:
        assert frame == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", name
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(names) and max(registers, default=0) <= 255
    if names and (disassembler := find("nvdisasm")):
        listing = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
        kernels = instructions(listing)
        assert len(kernels) == len(names)
        for kernel, counts in kernels.items():
            check(kernel, counts)


def find(tool):
    """Of the CUDA toolkit, or of Triton's package."""
    try:
        import triton
    except ImportError:
        return shutil.which(tool)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return shutil.which(tool) or (str(bundled) if bundled.exists() else None)


def instructions(listing):
    """How often each kernel has each instruction, by the kernel's name without its namespace."""
    bodies = re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", listing, re.M | re.S)
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(name for name, _ in bodies), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        re.sub(r"swag::cuda::|\(anonymous namespace\)::", "", name): Counter(
            re.findall(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", body, re.M)
        )
        for name, (_, body) in zip(demangled, bodies, strict=True)
    }


def check(kernel, counts):
    def number(pattern):
        return sum(count for name, count in counts.items() if re.match(pattern, name))

    assert not number(r"LDL|STL"), kernel  # local memory
    [(loads, stores, width)] = [least for pattern, least in WIDE.items() if re.search(pattern, kernel)]
    assert number(r"(LDG|LDGSTS)\b.*\.128") >= loads, (kernel, counts)
    assert number(rf"STG\b.*\.{8 * width}") >= stores, (kernel, counts)
    assert bool(number("HMMA")) == (ON_TENSOR_CORES in kernel), kernel
