"""Builds csrc with CMake; all metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NO_COMPILER = (
    "\n*** No C++17 compiler found (looked for $CXX, c++, g++, clang++): swag-kernels is installed without its compiled "
    "kernels and will use the slow pure-torch back end. Install g++ or clang++ and reinstall to get them. ***\n"
)
CUDA = {"": "AUTO", "0": "OFF", "1": "ON"}  # what SWAG_KERNELS_CUDA asks for
C_LIBRARY = ("libswag_kernels.so", "include/swag_kernels.h")  # beside the extension, if it was built with CUDA


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        asked = os.environ.get("SWAG_KERNELS_CUDA", "")
        if asked not in CUDA:
            raise SystemExit(f"SWAG_KERNELS_CUDA is '{asked}'; 1 demands the CUDA kernels, 0 leaves them out")
        if find_compiler() is None:
            if asked == "1":
                raise SystemExit(
                    "SWAG_KERNELS_CUDA=1 demands the CUDA kernels, and there is no C++17 compiler; install g++"
                )
            print(NO_COMPILER, file=sys.stderr)
            return
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSWAG_KERNELS_CUDA={CUDA[asked]}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        for name in C_LIBRARY:
            (target.parent / name).unlink(missing_ok=True)  # of an earlier build with CUDA
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", target.parent.parent], check=True)

    def get_outputs(self) -> list[str]:
        library = [os.path.join(self.build_lib, "swag_kernels", name) for name in C_LIBRARY]
        return [path for path in [*super().get_outputs(), *library] if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if find_compiler() is not None:
            super().copy_extensions_to_source()
        library = Path(self.build_lib, "swag_kernels", C_LIBRARY[0])
        if library.exists():
            self.copy_file(library, Path(__file__).resolve().parent / "swag_kernels")


setup(ext_modules=[Extension("swag_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
