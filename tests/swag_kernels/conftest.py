from zlib import crc32

import pytest
import torch
from gpu_device import ON_GPU, TRITON_DTYPES
from gpu_fixtures import KERNELS, ROOT, load, served_by_cuda, served_by_triton

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


@pytest.fixture(scope="session")
def build():
    """tests/simt/build.py, where there is a compiler."""
    build = load("simt_build", ROOT / "tests" / "simt" / "build.py")
    if build.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return build


@pytest.fixture(scope="session")
def folder():
    """Where the compiled code stays from one run to the next."""
    return ROOT / "build" / "simt"


@pytest.fixture(scope="session")
def simt(build, folder):
    """The kernels of csrc/cuda compiled for the CPU."""
    return load("_simt", build.module(folder))


@pytest.fixture(scope="session")
def sanitized(build):
    """What the environment of a process must hold for it to load what was compiled with ``sanitize=True``."""
    if (library := build.sanitizer()) is None:
        pytest.skip("needs the library of AddressSanitizer")
    return {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.fixture
def device(request, monkeypatch):
    """The device with one back end serving every op; what Triton's interpreter computes wrongly is skipped."""
    kernels, _, schedule = request.param.partition(", threads ")
    if kernels == "triton":
        dtypes = {value for value in request.node.callspec.params.values() if isinstance(value, torch.dtype)}
        if not dtypes.issubset(TRITON_DTYPES):
            pytest.skip("Triton's interpreter computes bfloat16 wrongly")
        with served_by_triton() as device:
            yield device
    else:
        seed = crc32(request.node.nodeid.encode())  # of the random schedule
        with served_by_cuda(lambda: request.getfixturevalue("simt"), monkeypatch, schedule, seed) as device:
            yield device


@pytest.fixture
def imitate(device, request):
    """Has launches find a GPU of another compute capability, or with more multiprocessors."""
    if ON_GPU:
        pytest.skip("the GPU is what it is")
    return request.getfixturevalue("simt").imitate


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", KERNELS[metafunc.definition.path.parent.name], indirect=True)


def pytest_collection_modifyitems(items):
    """Marked ``gpu``: what only a GPU can show."""
    for item in items:
        if item.get_closest_marker("gpu") and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
