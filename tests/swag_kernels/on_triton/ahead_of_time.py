"""Compiles every kernel for one target, without a device, at the ranks and sizes listed here; prints one JSON line for
each. Run as a program, because a process in which Triton interprets cannot compile."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swag_kernels.layout import BLOCK
from swag_kernels.triton import launch

# By name, because the package's attributes of the same names are the ops.
collect, draw, sampled_lora, bayes_average = (
    import_module(f"swag_kernels.triton.{name}") for name in ("collect", "draw", "sampled_lora", "bayes_average")
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"fp32": (4, tl.float32), "bf16": (2, tl.bfloat16)}  # fp16 is compiled as bf16 is


@dataclass
class Case:
    """A kernel with its arguments: types by name, values of constants, and which pointers and numbers 16 divides."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: str
    options: dict[str, Any]  # of launch.options()


def cases() -> Iterator[Case]:
    yield from collect_cases()
    yield from draw_cases()
    yield from average_cases()
    yield from lora_cases()


def collect_cases() -> Iterator[Case]:
    types = types_of(
        "p_addresses *i64, p_blocks *i32, p_mean *fp32, p_m2 *fp32, p_deviations *fp32, p_count *i64, size i32, rank i32"
    )
    for (name, dtype), aligned, kept in product(
        {"fp32": 0, "bf16": 1, "fp16": 2, "mixed": collect.MIXED}.items(), (True, False), (True, False)
    ):
        constants = {"DTYPE": dtype, "ALIGNED": aligned, "HAS_DEVIATIONS": kept, "B_N": BLOCK}
        title = f"collect {name}{' aligned' if aligned else ''}{' deviations' if kept else ''}"
        divisible = "p_addresses p_blocks p_mean p_m2 p_deviations size"
        yield Case(title, collect.collect_kernel, types, constants, divisible, {"num_warps": 4, "exact": True})


def draw_cases() -> Iterator[Case]:
    types = types_of(
        "p_mean *fp32, p_std *fp32, p_deviations *fp32, p_z *fp32, p_blocks *i32, size i32, seed_low i32, seed_high i32, "
        "first i32, draws i32, num_samples i32, odd i32, diag_scale fp32, scale fp32"
    )
    options = {"num_warps": 4, "exact": True, "registers": 255}
    yield Case("draw: z", draw.z_kernel, types, {"STRIDE": 20, "B_D": draw.Z_DRAWS}, "p_z", options)
    for (name, (itemsize, _)), antithetic, rank in product(TYPES.items(), (False, True), (0, 5, 20, 32, 33)):
        tile = draw.tile_of(rank, itemsize)
        constants = {
            "RANK": rank, "HELD": tile["HELD"], "STRIDE": -(-rank // 4) * 4, "ANTITHETIC": antithetic,
            "B_N": tile["B_N"], "BLOCK": BLOCK,
        }  # fmt: skip
        title = f"draw {name} R={rank}{' antithetic' if antithetic else ''}"
        divisible = "p_mean p_std p_deviations p_z p_blocks p_out size"
        yield Case(title, draw.draw_kernel, types | {"p_out": f"*{name}"}, constants, divisible, options)


def average_cases() -> Iterator[Case]:
    types = types_of(
        "p_log_sum *fp32, p_m2 *fp32, p_votes *fp32, p_entropy *fp32, p_count *i64, p_scans *fp32, p_rows *fp32, "
        "p_flags *i32, samples i32, batch i32, classes i32"
    )
    for name, group, parts, even in product(TYPES, (1, 2), (1, 8, 16), (True, False)):
        tile = bayes_average.tile_of(16 if even else 1)
        constants = {key: tile[key] for key in ("B_C", "UNROLL")} | {
            "GROUP": group, "PART": bayes_average.PART, "PARTS": parts, "B_S": bayes_average.ROWS, "B_P": parts,
        }  # fmt: skip
        constants["UNROLL"] //= group
        title = f"bayes_average {name} groups of {group}, {parts} parts{' aligned' if even else ''}"
        divisible = f"p_logits p_log_sum p_m2 p_votes{' classes' if even else ''}"
        options = {"num_warps": tile["num_warps"], "registers": 128}
        yield Case(title, bayes_average.average_kernel, types | {"p_logits": f"*{name}"}, constants, divisible, options)


def lora_cases() -> Iterator[Case]:
    types = types_of(
        "p_h *fp32, rows i32, features i32, out i32, samples i32, stride_x i32, stride_a i32, stride_a_rank i32, "
        "stride_a_feature i32, stride_b i32, stride_b_out i32, stride_b_rank i32, stride_base i32, stride_g_rank i32, "
        "stride_g_feature i32, scaling fp32"
    )
    ranks = (8, 16, 32, 64)
    assert ranks[-1] == sampled_lora.MAX_RANK
    for (name, (itemsize, dtype)), rows, rank in product(TYPES.items(), (1, 128), ranks):
        tile = sampled_lora.tile_of(rows, rank, itemsize)
        tensors = {key: f"*{name}" for key in ("p_x", "p_a", "p_b", "p_base", "p_y", "p_g")}
        common = {"RANK": rank, "B_M": tile["B_M"], "B_R": tile["B_R"]}
        options = {"num_warps": tile["num_warps"], "registers": 255}
        title = f"{name} r={rank} {'decode' if rows == 1 else 'prefill'}"
        for parts in (1, 4):
            constants = common | {
                "PARTS": parts, "CHUNK": sampled_lora.CHUNK, "TYPE": dtype, "B_K": tile["B_K"], "stride_a_feature": 1,
            }  # fmt: skip
            divisible = "p_x p_a p_h features stride_x stride_a stride_a_rank"
            yield Case(
                f"shrink {title} {parts} parts",
                sampled_lora.shrink_kernel,
                types | tensors,
                constants,
                divisible,
                options,
            )
        for packed, has_base in ((True, True), (False, False)):
            constants = common | {
                "PARTS": 4, "PACKED": packed, "HAS_BASE": has_base, "B_N": sampled_lora.COLUMNS, "samples": 1,
            }  # fmt: skip
            divisible = "p_h p_b p_base p_y out stride_b stride_base" + (" stride_b_rank" if not packed else "")
            constants |= {} if packed else {"stride_b_out": 1}
            suffix = "" if packed else " of a gradient"
            yield Case(
                f"expand {title}{suffix}", sampled_lora.expand_kernel, types | tensors, constants, divisible, options
            )
        constants = common | {
            "PARTS": 4, "TYPE": dtype, "B_M": min(tile["B_M"], sampled_lora.OUTER_ROWS), "B_N": sampled_lora.COLUMNS,
            "stride_g_feature": 1,
        }  # fmt: skip
        divisible = "p_h p_x p_g features stride_x stride_g_rank"
        yield Case(f"outer {title}", sampled_lora.outer_kernel, types | tensors, constants, divisible, options)


def types_of(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.split(", "))


def compile_case(case: Case, target: str) -> dict[str, Any]:
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible.split()}
    source = ASTSource(case.kernel, signature, constants, hints)
    amd = TARGETS[target].backend == "hip"
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options(**case.options, amd=amd))
    found = report_amd(compiled) if amd else report_nvidia(compiled, target)
    return {"case": case.name, "shared": compiled.metadata.shared, **found}


def report_nvidia(compiled: Any, target: str) -> dict[str, Any]:
    """What ptxas says, and how wide the loads and stores are: bytes of an access, and their number."""
    text = compiled.asm["ptx"]
    widths: dict[str, dict[str, int]] = {"ld": {}, "st": {}}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bu](\d+)", text):
        width = str(int(vector or 1) * int(bits) // 8)
        widths[kind][width] = widths[kind].get(width, 0) + 1
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        arch = {"sm_90": "sm_90a", "sm_100": "sm_100a"}.get(target, target)
        command = [assembler(text), "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", output))
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", output))
    return {"registers": registers, "spilled": spilled, "widths": widths}


def assembler(text: str) -> str:
    """The ptxas that reads this version of PTX: two come with Triton."""
    for tool in (triton.knobs.nvidia.ptxas, triton.knobs.nvidia.ptxas_blackwell):
        version = re.search(r"\.version (\d+)\.(\d+)", text)
        assert version
        if tuple(int(part) for part in version.groups()) <= readable(tool.version):
            return tool.path
    raise RuntimeError(f"no ptxas reads PTX {version.group()}")


def readable(release: str) -> tuple[int, int]:
    """CUDA 12.x reads PTX 8.x, CUDA 13.x reads 9.x."""
    major, minor = (int(part) for part in release.split(".")[:2])
    return major - 4, minor


def report_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    numbers = {
        key: max(int(number) for number in re.findall(rf"\.{key}:\s+(\d+)", text))
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    spilled = numbers["vgpr_spill_count"] + numbers["private_segment_fixed_size"]
    return {"registers": numbers["vgpr_count"], "spilled": spilled}


if __name__ == "__main__":
    for one in cases():
        print(json.dumps(compile_case(one, sys.argv[1])), flush=True)
