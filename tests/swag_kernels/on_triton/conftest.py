import pytest
import torch

from swag_kernels import backend
from swag_kernels import triton as kernels

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def device():
    """The GPU, or the CPU in Triton's interpreter, with the Triton kernels chosen for every op."""
    if kernels.missing():
        pytest.skip(kernels.missing())
    with backend("triton"):
        yield torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty gives holds NaN, so that what a kernel leaves unwritten shows. On the CPU alone: there the mode asks
    nothing else of torch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items):
    """Marked ``gpu``: what the interpreter cannot show."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
