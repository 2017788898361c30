import pytest
import torch

from swag_kernels import native


@pytest.fixture(params=native.supported_isas() if native.missing() is None else [])
def isa(request):
    """Every instruction set that this build and processor have, in turn."""
    with native.use_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """``torch.set_num_threads``, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
