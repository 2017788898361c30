"""Every kernel as the library has it for every architecture: registers that suffice, and instructions as wide as memory is."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import swag_kernels

LIBRARY = Path(swag_kernels.__file__).with_name("libswag_kernels.so")
CSRC = Path(__file__).resolve().parents[3] / "csrc"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")

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
def kernels(request, tmp_path):
    """The resources and the instructions of each kernel for one architecture."""
    if not LIBRARY.exists():
        pytest.skip("libswag_kernels.so was not built: it needs nvcc")
    extractor, disassembler = find("cuobjdump"), find("nvdisasm")
    if extractor is None or disassembler is None:
        pytest.skip("needs cuobjdump and nvdisasm, of the CUDA toolkit or of Triton")
    said([extractor, "-xelf", f".{request.param}.", LIBRARY], cwd=tmp_path)
    found = {}
    for cubin in tmp_path.iterdir():
        resources = dict(re.findall(r"Function (\w+):\n\s*(.*)", said([extractor, "-res-usage", cubin])))
        bodies = instructions(said([disassembler, "-c", cubin])) if resources else {}
        assert resources.keys() == bodies.keys()
        found |= {name: (resources[name], bodies[name]) for name in resources}
    names = said(["c++filt"], input="\n".join(found)).splitlines()
    short = [re.sub(r"swag::cuda::|\(anonymous namespace\)::", "", name) for name in names]
    return dict(zip(short, found.values(), strict=True))


def said(command, **settings):
    return subprocess.run(command, capture_output=True, text=True, check=True, **settings).stdout


def test_nothing_spills_and_memory_is_accessed_in_wide_words(kernels):
    for pattern in WIDE:
        assert any(re.search(pattern, kernel) for kernel in kernels), pattern
    for kernel, (resources, counts) in kernels.items():
        usage = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", resources)}
        assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 255, (kernel, usage)
        check(kernel, counts)


def test_nothing_is_warned_of(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    quickly = ["-Xcicc", "-O0", "-ptx", "-odir", tmp_path]
    flags = ["-std=c++17", "-arch=sm_90a", "-Werror", "all-warnings", "-I", CSRC]
    command = ["nvcc", *flags, *quickly, *sorted((CSRC / "cuda").glob("*.cu"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def find(tool):
    """Of the CUDA toolkit, or of Triton's package."""
    try:
        import triton
    except ImportError:
        return shutil.which(tool)
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return shutil.which(tool) or (str(bundled) if bundled.exists() else None)


def instructions(listing):
    """How often each kernel has each instruction."""
    bodies = re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", listing, re.M | re.S)
    pattern = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", re.M)
    return {name: Counter(pattern.findall(body)) for name, body in bodies}


def check(kernel, counts):
    def number(pattern):
        return sum(count for name, count in counts.items() if re.match(pattern, name))

    assert not number(r"LDL|STL"), kernel  # local memory
    [(loads, stores, width)] = [least for pattern, least in WIDE.items() if re.search(pattern, kernel)]
    assert number(r"(LDG|LDGSTS)\b.*\.128") >= loads, (kernel, counts)
    assert number(rf"STG\b.*\.{8 * width}") >= stores, (kernel, counts)
    assert bool(number("HMMA")) == (ON_TENSOR_CORES in kernel), kernel
