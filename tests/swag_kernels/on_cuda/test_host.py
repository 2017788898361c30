"""What swag_kernels/cuda.py does before and after a launch."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_sampled_lora import SCALING, inputs, plain

from swag_kernels import (
    arena_size,
    backend,
    collect_,
    cuda,
    draw,
    reference,
    sampled_lora,
    sampled_lora_linear,
    segment_table,
)

NUMELS = [1500, 3]


def shifted(*shape, by, device):
    """Zeros that start a few elements after a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + 4, device=device)[by : size + by].view(shape)


@pytest.mark.parametrize("by", [(1, 0, 0), (0, 2, 0), (0, 0, 3)], ids=str)
def test_arenas_at_any_address(device, by):
    """A collection into them, and draws from them, as if they were aligned."""
    layout = segment_table(NUMELS)
    size, states = arena_size(layout), []
    for offsets in ((0, 0, 0), by):
        shapes = (size,), (size,), (2, size)
        arenas = [shifted(*shape, by=o, device=device) for shape, o in zip(shapes, offsets, strict=True)]
        states.append((*arenas, torch.zeros((), dtype=torch.int64, device=device)))
    for step in range(3):
        params = [torch.full((numel,), 1.0 + step**2, device=device) for numel in NUMELS]
        for state in states:
            collect_(params, *state, layout)
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(states[0][0][:3].cpu(), torch.full((3,), (1 + 2 + 5) / 3))
    assert states[0][3] == 3
    options = {"seed": 1, "first_sample": 0, "diag_scale": 1.0, "low_rank_scale": 0.5, "antithetic": False}
    ours, theirs = (draw(*state[:3], 2, **options, layout=layout, dtype=torch.float32) for state in states)
    assert torch.equal(ours, theirs)


def test_a_collection_is_forgotten_with_its_layout(device):
    layout = segment_table([5])
    state = torch.zeros(1024, device=device), torch.zeros(1024, device=device), None
    params, count = [torch.ones(5, device=device)], torch.zeros((), dtype=torch.int64, device=device)
    collect_(params, *state, count, layout)
    assert cuda.recollect(params, *state, count, layout)
    kept = weakref.ref(cuda._collections.last(layout))
    del layout
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("rank", [2, 65], ids=["kernels", "products"])
@pytest.mark.parametrize("samples", [1, 3])
def test_in_place(device, samples, rank):
    given = [t.to(device) for t in inputs(samples, 2, 8, 8, rank, torch.float32)]
    expected = plain(*(t.cpu() for t in given))
    assert sampled_lora(*given[:3], SCALING, given[3]) is given[3]
    torch.testing.assert_close(given[3].cpu(), expected)


def test_a_result_over_its_own_input_is_refused(device):
    x, A, B, _ = (t.to(device) for t in inputs(3, 2, 8, 8, 2, torch.float32))
    before = x.clone()
    with pytest.raises(ValueError, match="swag_sampled_lora: y .* overlaps x"):
        sampled_lora(x, A, B, SCALING, x)
    assert torch.equal(x, before)


def test_what_is_left_to_triton(device, monkeypatch):
    asked = []

    def ask(op):
        return lambda *given: asked.append(op) or getattr(reference, op)(*given)

    ops = "sampled_lora_linear", "sampled_lora_backward"
    monkeypatch.setattr(cuda, "_triton", lambda: SimpleNamespace(**{op: ask(op) for op in ops}))
    x, A, B, base = (t.to(device).requires_grad_() for t in inputs(3, 2, 8, 8, 2, torch.float32))
    sampled_lora(x, A, B, SCALING, base).sum().backward()
    with torch.no_grad():
        sampled_lora_linear(x, A[0].mT @ A[0], None, A, B, SCALING)
    assert asked == ["sampled_lora_backward", "sampled_lora_linear"]


def test_without_triton_both_are_composed(device, monkeypatch):
    monkeypatch.setattr(cuda, "_triton", lambda: None)
    weight, results = torch.randn(8, 8, device=device), []
    for name in ("cuda", "reference"):
        torch.manual_seed(0)
        x, A, B, base = (t.to(device).requires_grad_() for t in inputs(3, 2, 8, 8, 2, torch.float32))
        with backend(name):
            sampled_lora(x, A, B, SCALING, base).square().sum().backward()
            with torch.no_grad():
                y = sampled_lora_linear(x, weight, None, A, B, SCALING)
        results.append([y, *(leaf.grad for leaf in (x, A, B, base))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
