"""``python sanitized_cases.py MODULE SCHEDULE``: small cases of every op, by the kernels that were compiled for the CPU.

What reads or writes beyond a tensor, or beyond a block's shared memory, ends the process if the module was compiled for
AddressSanitizer.
"""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(FOLDER), str(FOLDER / "on_gpu")]

import pytest  # noqa: E402
import small_cases  # noqa: E402
import torch  # noqa: E402
from gpu_fixtures import load, served_by_cuda  # noqa: E402


def main(path: str, schedule: str) -> None:
    simt = load("_simt", path)
    small_cases.DTYPES = [torch.float32, torch.bfloat16, torch.float16]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, served_by_cuda(lambda: simt, patch, schedule, seed=1):
        for major, multiprocessors in ((9, 1000), (8, 1)):
            simt.imitate(major, multiprocessors)
            for case, sizes in small_cases.cases():
                case(*sizes)
    print(f"{simt.launches()} launches")


if __name__ == "__main__":
    main(*sys.argv[1:])
