import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads slow down the small products of Triton's interpreter
if "PYTEST_XDIST_WORKER" in os.environ:  # as many as cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of those that a test asks for

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is declared


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """``torch.empty`` and its relatives give NaN (or a large integer), so that an element nobody writes shows."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poison(torch.Tensor.new_empty))


def _poison(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        with torch.no_grad():
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    return poisoned
