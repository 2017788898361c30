"""Descriptions against torch's own getters, by the extension and without it, and what must equal nothing."""

import ctypes
import struct
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from swag_kernels import native
from swag_kernels.describe import describe

module = sys.modules["swag_kernels.describe"]
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]
DLPACK = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}

relaxed = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
needs_extension = pytest.mark.skipif(native.missing() is not None, reason="needs the compiled extension")


@pytest.fixture(params=[pytest.param("extension", marks=needs_extension), "getters"])
def way(request, monkeypatch):
    if request.param == "getters":
        monkeypatch.setattr(module, "_native", lambda: lambda tensors: None)
    return request.param


@st.composite
def kinds(draw):
    """Tensors of many kinds in one memory, so that two of them often begin at the same address."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3))
    strides = draw(st.permutations([1, 3, 9]))[: len(shape)]
    if draw(st.booleans()):
        strides = torch.empty(shape, device="meta").stride()
    offset = draw(st.sampled_from([0, 0, 1, 8]))
    kind = draw(st.sampled_from(["tensor", "parameter", "requires_grad", "detached"]))

    def make(memory):
        tensor = memory.view(dtype).as_strided(shape, strides, offset)
        if kind == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point)
        if kind == "requires_grad" and dtype.is_floating_point:
            return tensor.requires_grad_()
        return tensor.detach() if kind == "detached" else tensor

    return make


def by_torch(tensors):
    return [(t.data_ptr(), t.device, t.dtype, t.shape, t.is_contiguous()) for t in tensors]


@given(ours=st.lists(kinds(), max_size=3), theirs=st.lists(kinds(), max_size=3))
@relaxed
def test_equal_if_and_only_if_torch_says_the_same(way, ours, theirs):
    memory = torch.zeros(512, dtype=torch.uint8)
    a, b, again = ([make(memory) for make in makes] for makes in (ours, theirs, ours))
    assert describe(a) == describe(again)
    assert (describe(a) == describe(b)) == (by_torch(a) == by_torch(b))


@needs_extension
@given(kinds())
@relaxed
def test_the_bytes_of_one_tensor(make):
    tensor = make(torch.zeros(512, dtype=torch.uint8))
    address, device, dtype, *shape = struct.unpack(f"{3 + tensor.dim()}q", native.describer()([tensor]))
    assert address == tensor.data_ptr()
    assert device == 1 << 32  # DLPack's kDLCPU, number 0
    kind, bits = str(tensor.dtype).removeprefix("torch.").rstrip("0123456789"), tensor.dtype.itemsize * 8
    assert dtype == tensor.dim() << 33 | tensor.is_contiguous() << 32 | DLPACK[kind] << 24 | bits << 16 | 1
    assert shape == list(tensor.shape)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.T,
        lambda p: p[1:],
        lambda p: p[:3],
        lambda p: p.view(torch.bfloat16),
        lambda p: p.view(torch.int32),
        lambda p: p.flatten(),
        lambda p: p[:, :1],
        lambda p: p.clone(),
    ],
)
def test_what_changes_a_description(way, change):
    p = torch.randn(4, 4)
    before = describe([p, p])
    assert describe([p, p.view(4, 4)]) == before
    assert describe([p, change(p)]) != before and describe([p]) != before


def _wrapper():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    return torch.Tensor._make_wrapper_subclass(Wrapper, (3,))


UNUSUAL = {
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "negative": lambda: torch.randn(1, dtype=torch.complex64).conj().imag,
    "negative scalar": lambda: torch.randn((), dtype=torch.complex64).conj().imag,
    "lazily zero": lambda: torch._efficientzerotensor(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(3, device="meta"),
    "mkldnn": lambda: torch.randn(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(2)]),
    "functional": lambda: torch._to_functional_tensor(torch.randn(3)),
    "wrapper": _wrapper,
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|prototype)")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_tensors_equal_nothing(way, name):
    tensors = [torch.zeros(1), UNUSUAL[name]()]
    assert describe(tensors) != describe(tensors) and describe(tensors[:1]) == describe(tensors[:1])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_and_transformed_tensors_equal_nothing(way):
    def seen(x):
        assert describe([x]) != describe([x])
        return x.sum()

    with FakeTensorMode():
        fake = torch.ones(3)
    assert describe([fake]) != describe([fake])
    torch.func.vmap(seen)(torch.randn(2, 3))
    torch.func.grad(seen)(torch.randn(3))


def test_a_subclass_with_memory_of_its_own(way):
    class Named(torch.Tensor):
        pass

    tensor = torch.randn(3, 4).as_subclass(Named)
    assert native.describer()([tensor]) is None  # for it the memory may be only part of the story
    assert describe([tensor]) == describe([tensor])
    assert describe([tensor]) != describe([tensor.T])


@pytest.mark.parametrize("other", [3, None, torch.Tensor, [torch.zeros(1)]], ids=str)
def test_what_is_no_tensor(way, other):
    with pytest.raises(TypeError, match=f"expected tensors, got {type(other).__name__}"):
        describe([torch.zeros(2), other])


class _Table(ctypes.Structure):
    """DLPackExchangeAPI; the last but one of the functions describes a tensor that it does not own."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    ]


def _changed(**fields):
    """A capsule of torch's table with some fields changed, and the table, which the capsule does not own."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    table = _Table.from_buffer_copy(ctypes.string_at(get(EXCHANGE, b"dlpack_exchange_api"), ctypes.sizeof(_Table)))
    for name, value in fields.items():
        setattr(table, name, value)
    return new(ctypes.addressof(table), b"dlpack_exchange_api", None), table


@needs_extension
def test_another_exchange_api_is_left_alone(monkeypatch):
    tensors = [torch.zeros(2)]
    same, same_table = _changed()
    newer, newer_table = _changed(major=2)
    empty, empty_table = _changed(functions=(ctypes.c_void_p * 5)())
    for exchange, known in ((same, True), (newer, False), (empty, False), (7, False), (None, False)):
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", exchange, raising=False)
        assert isinstance(native.describer()(tensors), bytes) == known
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert native.describer()(tensors) is None
    monkeypatch.setattr(module, "_native", native.describer)
    assert describe(tensors) == describe(tensors)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "none was built")
    assert native.describer()([torch.zeros(2)]) is None


@needs_extension
def test_the_extension_is_used_where_torch_has_the_api():
    assert EXCHANGE is not None  # torch 2.10 and later
    assert isinstance(describe([torch.nn.Parameter(torch.zeros(2)), torch.zeros(2)]), bytes)
