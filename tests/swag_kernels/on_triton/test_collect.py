"""The kernel against the reference in float64, and against the CPU's kernels bit for bit where no GPU rounds otherwise."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_collect import UNTOUCHED, assert_as_accurate_as_torch, in_reference, snapshots
from triton_device import DTYPES, assert_same_bits

from swag_kernels import arena_size, backend, collect_, segment_table
from swag_kernels.triton import recollect

SIZES = st.sampled_from([0, 1, 3, 31, 1023, 1024, 1025, 2500])

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def buffers(layout, rank, device="cpu"):
    """mean, m2, deviations and count with a mark in the padding, which nobody may change (but a slot's becomes zero)."""
    size = arena_size(layout)
    held = torch.zeros(size, dtype=torch.bool)
    for start, numel, _ in layout.tolist():
        held[start : start + numel] = True
    mean = torch.where(held, 0, UNTOUCHED).to(device)
    deviations = torch.full((rank, size), float("nan"), device=device) if rank else None
    return mean, mean.clone(), deviations, torch.zeros((), dtype=torch.int64, device=device), held


@given(
    tensors=st.lists(st.tuples(SIZES, st.sampled_from(DTYPES)), min_size=1, max_size=5),
    rank=st.sampled_from([0, 1, 2, 5]),
    number=st.integers(1, 7),
)
@relaxed
def test_matches_the_reference(device, tensors, rank, number):
    numels, dtypes = zip(*tensors, strict=True)
    layout = segment_table(numels)
    steps = snapshots(numels, dtypes, number)
    out = buffers(layout, rank, device)
    for params in steps:
        collect_([p.to(device) for p in params], *out[:4], layout)
    plain, exact = (in_reference(steps, layout, rank, dtype) for dtype in (torch.float32, torch.float64))

    held = out[4]
    assert out[3] == number
    for buffer, torch32, truth in zip(out[:2], plain, exact, strict=False):
        assert (buffer.cpu()[~held] == UNTOUCHED).all()
        assert_as_accurate_as_torch(buffer.cpu()[held], torch32[held], truth[held])
    for row in range(rank):
        written = out[2][row].cpu()
        if row < number:
            assert (written[~held] == 0).all()
            assert_as_accurate_as_torch(written[held], plain[2][row, held], exact[2][row, held])
        else:
            assert written.isnan().all()


def test_same_bits_as_the_cpu(device):
    layout = segment_table([1500, 3, 1025])
    ours, theirs = buffers(layout, 2, device), buffers(layout, 2)
    for params in snapshots([1500, 3, 1025], DTYPES[:1] + DTYPES[-1:] + DTYPES[:1], 5):
        collect_([p.to(device) for p in params], *ours[:4], layout)
        with backend("cpu"):
            collect_(params, *theirs[:4], layout)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_and_misaligned_parameters(device, dtype):
    layout = segment_table([35 * 40, 1025, 77])
    mean, m2, deviations, count, held = buffers(layout, 2, device)
    params = [torch.randn(40, 35).to(device, dtype).T, torch.randn(1026).to(device, dtype)[1:]]
    params.append(torch.randn(77 * 3).to(device, dtype)[::3])
    for _ in range(2):
        collect_(params, mean, m2, deviations, count, layout)
    flat = torch.cat([p.float().flatten() for p in params]).cpu()
    assert torch.equal(mean.cpu()[held], flat)
    assert not m2.cpu()[held].any()


def test_parameters_that_move(device):
    """The table of addresses follows: other storages, another dtype in the same storage, storages exchanged."""
    layout = segment_table([1024, 1024])
    memory = torch.randn(2, 1024, device=device)
    sets = [list(memory), list(memory.flip(0)), [memory[1], memory[0]], [memory[0].half(), memory[1]]]
    sets.append([memory[0].view(torch.float16)[:1024], memory[1].view(torch.float16)[1024:]])
    memory.view(torch.float16).clamp_(-1, 1).nan_to_num_(0.5)
    for params in sets:
        mean, m2, _, count, held = buffers(layout, 0, device)
        collect_(params, mean, m2, None, count, layout)
        assert torch.equal(mean, torch.cat(params).float())


def test_a_collection_is_repeated_only_if_nothing_moved(device):
    layout = segment_table([1024, 1200])
    params = [torch.randn(1024, device=device), torch.randn(30, 40, device=device)]
    state = buffers(layout, 2, device)[:4]
    theirs = buffers(layout, 2)[:4]
    for repeats, changed in enumerate(
        (params, params, [params[0], params[1].T], [params[0], params[1].half()], params)
    ):
        assert recollect(changed, *state, layout) == (repeats == 1)
        if repeats != 1:
            collect_(changed, *state, layout)
        with backend("cpu"):
            collect_([p.cpu() for p in changed], *theirs, layout)
    for a, b in zip(state[:3], theirs[:3], strict=True):
        assert_same_bits(a, b)
    other = buffers(layout, 2, device)[:4]
    assert not recollect(params, *other, layout) and not recollect(params, *state, segment_table([1024, 1200]))
    layout[0, 1] = 1000
    assert not recollect(params, *state, layout)


def test_gaps_in_the_layout(device):
    layout = torch.tensor([[1024, 5, 0], [4096, 2000, 8]])
    params = [torch.randn(5), torch.randn(2000)]
    mean, m2, deviations, count, held = buffers(layout, 1, device)
    deviations.zero_()
    collect_([p.to(device) for p in params], mean, m2, deviations, count, layout)
    assert torch.equal(mean.cpu()[held], torch.cat(params))
    assert (mean.cpu()[~held] == UNTOUCHED).all() and (m2.cpu()[~held] == UNTOUCHED).all()
    assert not deviations.any()


def test_no_tensors(device):
    layout = segment_table([])
    mean, m2, deviations, count, _ = buffers(layout, 2, device)
    collect_([], mean, m2, deviations, count, layout)
    assert count == 1
