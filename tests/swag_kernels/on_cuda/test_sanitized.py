"""No kernel touches what is not its own: small cases of every op under AddressSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("sanitized_cases.py")


def test_small_cases(build, folder, sanitized):
    module = build.module(folder, sanitize=True)
    command = [sys.executable, str(PROGRAM), str(module), "forward"]
    result = subprocess.run(command, env=os.environ | sanitized, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[0]) > 50
