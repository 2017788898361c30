import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import swag_kernels
from swag_kernels import backend, cuda, native, reference
from swag_kernels.backend import choose, select

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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
    with pytest.raises(ValueError, match="known are: cuda, triton, cpu, reference"), backend("cudnn"):
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
    if not torch.cuda.is_available():
        assert "'triton' is not available" in run(code).stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("lacking", "chosen", "warns"),
    [((), "cuda", False), (("cuda",), "triton", False), (("cuda", "triton"), "reference", True)],
)
def test_the_first_that_a_gpu_has_serves_it(lacking, chosen, warns):
    """Only the reference is slow enough to warn of."""
    code = (
        "import torch, warnings\n"
        "from swag_kernels.backend import choose, select\n"
        "import sys; module = sys.modules['swag_kernels.backend']\n"
        f"module._missing = lambda name: 'not there' if name in {lacking} else None\n"
        "device = torch.device('cuda')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(choose(device), select(device).__name__, len(caught) > 0)\n"
        "print(module._choice(device))\n"
    )
    first, described = run(code).stdout.splitlines()
    assert first == f"{chosen} swag_kernels.{chosen} {warns}"
    assert described.count("not there") == len(lacking)


@pytest.fixture
def found(monkeypatch):
    """Has the cuda back end find an extension with its kernels, and GPUs of these capabilities."""

    def find(*capabilities, built=True, hip=None):
        monkeypatch.setattr(native, "missing", lambda: None)
        monkeypatch.setattr(cuda, "_kernels", lambda: SimpleNamespace(**({"cuda_collect": None} if built else {})))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        return cuda.missing.__wrapped__()

    return find


def test_cuda_says_what_it_lacks(found):
    assert found((8, 0), (9, 0), (10, 0)) is None
    assert "SWAG_KERNELS_CUDA=1" in found((9, 0), built=False)
    assert found() == "torch finds no NVIDIA GPU" == found((9, 4), hip="6.4")
    assert "cuda:1 (GPU 1) has compute capability 7.5 and the kernels need 8.0" in found((9, 0), (7, 5))


def test_without_the_extension_cuda_says_so():
    code = "import sys; sys.modules['swag_kernels._C'] = None; from swag_kernels import cuda; print(cuda.missing())"
    assert "install a C++17 compiler" in run(code).stdout


@pytest.mark.parametrize(("triton", "linear", "backward"), [(True, "triton", "triton"), (False, "cuda", "reference")])
def test_info_tells_who_serves_what_cuda_leaves_to_others(monkeypatch, triton, linear, backward):
    module = sys.modules["swag_kernels.backend"]
    monkeypatch.setattr(module, "_missing", lambda name: None)
    monkeypatch.setattr(cuda, "_triton", lambda: SimpleNamespace() if triton else None)
    with backend("cuda"):
        described = module._choice(GPU)
    assert f"sampled_lora_linear → {linear}, sampled_lora_backward → {backward}" in described
    for op in ("collect_", "draw", "sampled_lora", "sampled_lora_", "bayes_average_"):
        assert f"{op} → cuda" in described


@pytest.mark.parametrize("current", [0, 1])
def test_cuda_launches_on_the_tensor_s_device_and_stream(monkeypatch, current):
    devices = [current]

    @contextmanager
    def device(index):
        devices.append(index)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    launched = []
    tensor = SimpleNamespace(get_device=lambda: 1)
    cuda._launch(lambda *arguments: launched.append((devices[-1], *arguments)), tensor, 7, 8)
    assert launched == [(1, 7, 8, 101)] and devices == [current]


@pytest.mark.parametrize(
    ("dtype", "rows", "features", "rank", "kernels"),
    [
        (torch.bfloat16, 4096, 64, 64, True),
        (torch.float16, 1, 64, 65, False),
        (torch.float32, 16, 64, 64, True),
        (torch.float32, 17, 64, 8, False),
        (torch.bfloat16, 4, 64, 0, False),
        (torch.bfloat16, 4, 0, 8, False),
    ],
)
def test_what_the_kernels_of_cuda_serve(dtype, rows, features, rank, kernels):
    assert cuda.serves(dtype, rows, features, rank) == kernels
