"""small_cases.py under compute-sanitizer's memcheck, or a line that says why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("small_cases.py")
SECONDS = 180


def sanitizer() -> str | None:
    toolkits = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(toolkit, "bin") for toolkit in toolkits if toolkit)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def main() -> str | int:
    """0 if nothing was found or nothing could be asked, else what was found."""
    tool = sanitizer()
    if tool is None:
        print("memcheck skipped: no compute-sanitizer on PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin")
        return 0
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, str(PROGRAM)]
    # Without the allocator's cache every tensor is an allocation, so that an access beyond a tensor's end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        result = subprocess.run(command, env=environment, timeout=SECONDS, check=False, **pipes)
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        print((output if isinstance(output, str) else output.decode(errors="replace"))[-4000:])
        return f"memcheck: not done after {SECONDS} s"
    print(result.stdout[-4000:], end="")
    if "Device not supported" in result.stdout:
        print("memcheck skipped: compute-sanitizer does not support this device or driver")
        return 0
    return f"memcheck failed with status {result.returncode}" if result.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
