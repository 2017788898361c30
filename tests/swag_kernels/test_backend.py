import subprocess
import sys

import pytest
import torch

import swag_kernels
from swag_kernels import backend, native, reference
from swag_kernels.backend import choose, select

CPU = torch.device("cpu")


def run(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_cpu_tensors_use_the_compiled_kernels():
    assert native.missing() is None, native.missing()
    assert select(CPU) is native


def test_float64_is_always_the_reference():
    with backend("cpu"):
        assert select(CPU, torch.float64) is reference


def test_override_is_undone_even_after_an_exception():
    with pytest.raises(KeyError), backend("reference"):
        assert choose(CPU) == "reference"
        raise KeyError
    assert choose(CPU) == "cpu"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known are: triton, cpu, reference"), backend("cudnn"):
        pass
    result = run("import swag_kernels, torch; swag_kernels.backend.__module__; from swag_kernels.backend import choose;"
                 "choose(torch.device('cpu'))", SWAG_KERNELS_BACKEND="cudnn")  # fmt: skip
    assert "SWAG_KERNELS_BACKEND names the back end 'cudnn'" in result.stderr


def test_backend_that_does_not_serve_the_device():
    with backend("cpu"), pytest.raises(RuntimeError, match="does not serve tensors on cuda"):
        choose(torch.device("cuda"))


def test_environment_variables():
    code = "import torch; from swag_kernels.backend import choose; print(choose(torch.device('cpu')))"
    assert run(code, SWAG_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    code = "from swag_kernels import native; print(native.isa())"
    assert run(code, SWAG_KERNELS_ISA="portable").stdout.strip() == "portable"
    assert "is not available here" in run(code, SWAG_KERNELS_ISA="mmx").stderr


def test_without_the_extension_the_package_works_and_says_what_is_missing():
    code = (
        "import sys; sys.modules['swag_kernels._C'] = None\n"
        "import torch, swag_kernels\n"
        "x = torch.randn(2, 3, 4)\n"
        "y = swag_kernels.sampled_lora(x, torch.randn(2, 1, 4), torch.randn(2, 5, 1), 1.0, torch.zeros(2, 3, 5))\n"
        "assert y.shape == (2, 3, 5)\n"
        "with swag_kernels.backend('cpu'):\n"
        "    swag_kernels.sampled_lora(x, torch.randn(2, 1, 4), torch.randn(2, 5, 1), 1.0, torch.zeros(2, 3, 5))\n"
    )
    result = run(code)
    assert "slow 'reference' back end" in result.stderr and "install a C++17 compiler" in result.stderr
    assert "the back end 'cpu' is not available" in result.stderr.splitlines()[-1]


def test_info_names_every_op(capsys):
    swag_kernels.info()
    printed = capsys.readouterr().out
    for op in ("collect_", "draw", "sampled_lora", "bayes_average_"):
        assert f"{op} → cpu" in printed
    assert native.isa() in printed


def test_triton_without_a_gpu_names_the_interpreter():
    code = "import torch; from swag_kernels.backend import choose; print(choose(torch.device('cpu')))"
    assert "TRITON_INTERPRET=1" in run(code, SWAG_KERNELS_BACKEND="triton", TRITON_INTERPRET="").stderr
    pytest.importorskip("triton")
    assert run(code, SWAG_KERNELS_BACKEND="triton", TRITON_INTERPRET="1").stdout.strip() == "triton"


def test_without_triton_the_back_end_says_what_to_install():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from swag_kernels.backend import _missing, _default\n"
        "print(_missing('triton')); print(_default('cuda'))"
    )
    assert "pip install triton" in run(code).stdout.splitlines()[0]
    assert "('reference', \"'triton' is not available" in run(code).stdout
