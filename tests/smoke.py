"""Run outside the source tree against an installed wheel: the import, the compiled kernels, and one op."""

from pathlib import Path

import torch

import swag_kernels
import swag_lora
from swag_kernels import native

assert "site-packages" in Path(swag_kernels.__file__).parts, "the source tree was imported, not the wheel"
assert native.missing() is None, native.missing()

x, A, B = torch.randn(1, 3, 16), torch.randn(4, 2, 16), torch.randn(4, 8, 2)
base = torch.randn(1, 3, 8)
with swag_kernels.backend("reference"):
    expected = swag_kernels.sampled_lora(x, A, B, 0.5, base)
torch.testing.assert_close(swag_kernels.sampled_lora(x, A, B, 0.5, base), expected)
print(f"wheel works: swag_kernels {swag_kernels.__version__}, {native.isa()}, {swag_lora.__name__}")
