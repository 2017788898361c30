"""What the kernels of the arena load and store, counted in the interpreter, against the least that would do."""

import pytest
import torch

from swag_kernels import arena_size, collect_, draw, segment_table

RANK, SAMPLES = 20, 32
TENSORS = [8 * 4096, 4096 * 8]  # A and B of a 4096 wide layer, r=8; all LoRA tensors are whole blocks like these


@pytest.fixture
def moved(device, monkeypatch):
    """The bytes of all loads and stores so far, as ``moved()``."""
    if device.type != "cpu":
        pytest.skip("counts in the interpreter")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counted = [0]

    def counting(name, access):  # unmasked loads and stores go through the masked ones
        original = getattr(interpreter.InterpreterBuilder, name)

        def counted_access(self, pointers, *arguments):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            counted[0] += size * int(access(arguments).data.sum())
            return original(self, pointers, *arguments)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, counted_access)

    counting("create_masked_load", lambda arguments: arguments[0])
    counting("create_masked_store", lambda arguments: arguments[1])
    return lambda: counted[0]


def arena(layout):
    size = arena_size(layout)
    return torch.randn(size), torch.rand(size), torch.randn(RANK, size)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 24), (torch.float16, 22)])
def test_collect(moved, dtype, least):
    """Parameter, mean and m2 in; mean, m2 and a deviation out."""
    layout = segment_table(TENSORS)
    params = [torch.randn(n).to(dtype) for n in TENSORS]
    before = moved()
    collect_(params, *arena(layout), torch.zeros((), dtype=torch.int64), layout)
    least *= sum(TENSORS)
    assert least <= moved() - before <= 1.05 * least


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_draw(moved, dtype, antithetic):
    """mean, std and every deviation once; all samples out."""
    layout = segment_table([4096])
    mean, std, deviations = arena(layout)
    before = moved()
    draw(
        mean, std, deviations, SAMPLES, seed=1, first_sample=0, diag_scale=1.0, low_rank_scale=1.0,
        antithetic=antithetic, layout=layout, dtype=dtype,
    )  # fmt: skip
    least = 4096 * ((2 + RANK) * 4 + SAMPLES * dtype.itemsize)
    assert least <= moved() - before <= 1.05 * least
