"""The device under test with the kernels of one back end chosen for every op: a GPU, or the CPU in their stead."""

import importlib.util
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpu_device import ON_GPU

from swag_kernels import backend, cuda, triton
from swag_kernels.backend import _PREFERENCE

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = ("forward", "reversed", "random")
IMITATED = {"major": 9, "multiprocessors": 4}
TRITON = ("triton",)
CUDA = ("cuda",) if ON_GPU else tuple(f"cuda, threads {schedule}" for schedule in SCHEDULES)
KERNELS = {"on_triton": TRITON, "on_cuda": CUDA, "on_gpu": TRITON + CUDA}
"""What a folder's tests run on."""


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def served_by_triton():
    """The GPU, or the CPU in Triton's interpreter."""
    if triton.missing():
        pytest.skip(triton.missing())
    with backend("triton"):
        yield torch.device("cuda" if ON_GPU else "cpu")


@contextmanager
def served_by_cuda(simt, monkeypatch, schedule, seed):
    """The GPU, or the CPU that runs the same sources, with a block's threads in one order."""
    if ON_GPU:
        if cuda.missing():
            pytest.skip(cuda.missing())
        with backend("cuda"):
            yield torch.device("cuda")
        return
    monkeypatch.setattr(cuda, "_kernels", lambda: simt())
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "_triton", lambda: None)
    monkeypatch.setitem(_PREFERENCE, "cpu", (*_PREFERENCE["cpu"], "cuda"))
    simt().schedule(schedule, seed)
    simt().imitate(**IMITATED)
    with backend("cuda"):
        yield torch.device("cpu")


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty gives holds NaN, so that what a kernel leaves unwritten shows. On the CPU alone: there the mode asks
    nothing else of torch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(before)
