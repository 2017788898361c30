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


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))), None)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if find_compiler() is None:
            print(NO_COMPILER, file=sys.stderr)
            return
        import pybind11

        source = Path(__file__).resolve().parent
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        configure = [
            "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if find_compiler() is not None:
            super().copy_extensions_to_source()


setup(ext_modules=[Extension("swag_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
