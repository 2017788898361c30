"""Compiles every configuration of every kernel for one target, without a device; prints one JSON line for each. Run as a
program, because a process in which Triton interprets cannot compile.

Those of float16 are compiled for sm_90 alone where there is the same one of bfloat16, which every target gets."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stdout
from typing import Any

import triton
from configurations import Configuration, configurations
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swag_kernels.triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def report(one: Configuration, target: GPUTarget) -> dict[str, Any]:
    amd = target.backend == "hip"
    constants = dict(one.constants)
    names = one.kernel.arg_names
    signature = {name: "constexpr" if name in constants else dict(one.types)[name] for name in names}
    source = ASTSource(one.kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    with redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=dict(one.options))
    found = report_amd(compiled.asm["amdgcn"]) if amd else report_nvidia(compiled.asm["ptx"], log.getvalue())
    kernel = one.kernel.__name__.removesuffix("_kernel")
    types = {name.removeprefix("p_"): kind.removeprefix("*") for name, kind in one.types}
    return {"kernel": kernel, "types": types, "constants": constants, "shared": compiled.metadata.shared, **found}


def report_nvidia(ptx: str, log: str) -> dict[str, Any]:
    """What the assembler says, and how wide loads, stores and copies to shared memory are: bytes of one, and their number."""
    widths: dict[str, dict[str, int]] = {"ld": {}, "st": {}, "copy": {}}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](\d+)", ptx):
        width = str(int(vector or 1) * int(bits) // 8)
        widths[kind][width] = widths[kind].get(width, 0) + 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x\w+|\d+)", ptx):
        width = str(int(size, 0))
        widths["copy"][width] = widths["copy"].get(width, 0) + 1
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", log))
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))
    return {"registers": registers, "spilled": spilled, "widths": widths, "on_tensor_cores": "mma" in ptx}


def report_amd(text: str) -> dict[str, Any]:
    registers, spilled, private = (
        max(int(number) for number in re.findall(rf"\.{key}:\s+(\d+)", text))
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return {"registers": registers, "spilled": spilled + private, "on_tensor_cores": "mfma" in text}


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    name = sys.argv[1]
    launch.ON_AMD = TARGETS[name].backend == "hip"
    for one in configurations(wide=name in ("sm_90", "sm_100"), both_halves=name == "sm_90"):
        print(json.dumps(report(one, TARGETS[name])), flush=True)
