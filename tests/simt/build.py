"""Compiles csrc/cuda for the CPU: the very kernels, each thread of a GPU a fiber (``simt.h``).

``python tests/simt/build.py FOLDER`` prints the path of the module ``_simt``, which has what ``swag_kernels.cuda`` calls on a
GPU and takes addresses of CPU tensors, and besides::

    schedule("forward" | "reversed" | "random", seed)    the order in which threads and blocks run, from now on
    imitate(major, multiprocessors)                      the GPU that the launches find: compute capability 9 and 4 of them
    launches()                                           how many kernels have run

``--sanitize`` compiles it for AddressSanitizer: the process that imports it needs ``LD_PRELOAD`` of what ``sanitizer()``
names and ``ASAN_OPTIONS=detect_leaks=0``. A single source: ``g++ -x c++`` with ``FLAGS`` and ``-fsyntax-only``.

A fault in a kernel (threads of a block in different barriers, a deadlock, a misaligned copy, …) comes back as the launch's
error, with the kernel's name, the block and the thread. What was compiled before is kept in the folder by its contents.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SHIM = [path for path in sorted(HERE.glob("*.cpp")) if path.name != "module.cpp"]

# No contraction: nvcc is told the same. This folder comes first, for its cuda_runtime.h and its cuda/ptx.h.
FLAGS = [
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=off", "-fno-math-errno",
    f"-I{HERE}", f"-I{CSRC}",
]  # fmt: skip
# Of the kernels alone: misaligned accesses, arrays with a wrong index, overflow. undefined.cpp hears of them.
CHECKS = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
# Few cases run so: what counts is the compiler's time.
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O0"]
JOBS = 2
KEPT = 24 * 3600
"""Seconds for which the folder keeps what no build uses any more."""


@cache
def compiler() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "g++", "c++"]))), None)


def sanitizer() -> str | None:
    """The library of AddressSanitizer, which has to be loaded before any other."""
    path = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else None


def module(folder: Path, sanitize: bool = False) -> Path:
    """The compiled module, whose name for the import is ``_simt``."""
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("cuda/*.cpp")), HERE / "module.cpp"]
    return library(folder, sources, "_simt", includes, sanitize)


def library(
    folder: Path, sources: Iterable[Path], name: str, flags: Iterable[str] = (), sanitize: bool = False
) -> Path:
    """A shared library of the sources and the shim, in a folder that several processes may share."""
    flags = [*FLAGS, *flags, *(SANITIZE if sanitize else [])]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shared = _digest([*sorted(HERE.rglob("*.h")), *sorted(CSRC.rglob("*.h"))], *flags, *CHECKS, _version())
        objects = list(pool.map(lambda source: _compile(source, folder, flags, shared), [*SHIM, *sources]))
        path = folder / f"{name}-{_digest(objects, name)}.so"
        if not path.exists():
            _run([compiler(), "-shared", *flags, *objects, "-o"], path)
        for used in (*objects, path):
            used.touch()
        for old in folder.iterdir():
            if old.stat().st_mtime < time.time() - KEPT and old.name != "lock":
                old.unlink()
    return path


def _compile(source: Path, folder: Path, flags: list[str], shared: str) -> Path:
    path = folder / f"{source.stem}-{_digest([source], str(source), shared)}.o"
    if not path.exists():
        own = CHECKS if source.suffix == ".cu" else ["-O3"] if source in SHIM else []
        _run([compiler(), *flags, *own, "-x", "c++", "-c", source, "-o"], path)
    return path


def _run(command: list, output: Path) -> None:
    """What is half done does not bear the output's name."""
    unfinished = output.with_suffix(".tmp")
    result = subprocess.run([*command, unfinished], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stderr}")
    unfinished.rename(output)


@cache
def _version() -> str:
    return subprocess.run([compiler(), "-v"], capture_output=True, text=True).stderr


def _digest(files: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256(repr(texts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", action="store_true")
    arguments = parser.parse_args()
    print(module(arguments.folder, arguments.sanitize))


if __name__ == "__main__":
    sys.exit(main())
