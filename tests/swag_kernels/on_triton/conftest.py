import pytest
import torch
from gpu_device import ON_GPU


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty gives holds NaN, so that what a kernel leaves unwritten shows. On the CPU alone: there the mode asks
    nothing else of torch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not ON_GPU)
    yield
    torch.use_deterministic_algorithms(before)
