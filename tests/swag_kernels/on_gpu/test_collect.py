"""The kernel against the reference in float64, and against the CPU's kernels bit for bit where no GPU rounds otherwise."""

import pytest
import torch
from gpu_device import DTYPES, assert_same_bits, trusted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_collect import UNTOUCHED, assert_as_accurate_as_torch, in_reference, snapshots

from swag_kernels import arena_size, backend, collect_, segment_table
from swag_kernels.backend import select

SIZES = st.sampled_from([0, 1, 3, 31, 1023, 1024, 1025, 2500])

relaxed = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def recollect(params, *rest):
    return select(rest[0].device).recollect(params, *rest)


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
    numels, dtypes = zip(*((numel, trusted(device, dtype)) for numel, dtype in tensors), strict=True)
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
    for params in snapshots([1500, 3, 1025], [torch.float32, torch.float16, torch.float32], 5):
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


def moved(p):
    p.data = p.data.clone()


def transposed_in_place(p):
    p.data = p.data.t()


def same_memory_as_half(p):
    p.data.view(torch.float16).copy_(torch.randn(32, 64))
    p.data = p.data.view(torch.float16)[:16, :64].view(32, 32)


def stored_again(p):
    """As a sharded module frees its memory between steps and gathers it elsewhere."""
    values = p.data.clone()
    p.data.untyped_storage().resize_(0)
    occupied = torch.full((1024,), -1.0, device=p.device)
    p.data.untyped_storage().resize_(4096)
    p.data.copy_(values)
    assert (occupied == -1).all()


STALE = {
    "another storage": lambda m: moved(m.weight),
    "all storages": lambda m: m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()}, assign=True),
    "transposed": lambda m: transposed_in_place(m.weight),
    "another dtype": lambda m: m.half(),
    "another dtype at the address": lambda m: same_memory_as_half(m.weight),
    "one row of the memory": lambda m: setattr(m.weight, "data", m.weight.data[:1].expand(32, 32)),
    "exchanged": lambda m: torch.utils.swap_tensors(m.weight, m.other),
    "a negative view": lambda m: setattr(m.scale, "data", torch.complex(m.scale.data, m.scale.data).conj().imag),
}
FREED = {  # the allocator may give the same address again, and then the table is right again
    "another dtype and back": lambda m: m.half().float(),
    "storage freed and gathered": lambda m: stored_again(m.weight),
}
COPIED = ("transposed", "one row of the memory", "a negative view")  # at every collection, so never without its checks
SAME = {
    "nothing": lambda m: None,
    "values": lambda m: [p.data.mul_(2) for p in m.parameters()],
    "values loaded": lambda m: m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()}),
    "the parameters themselves": lambda m: [
        setattr(m, n, torch.nn.Parameter(p.data)) for n, p in [*m._parameters.items()]
    ],
}


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.other = (torch.nn.Parameter(torch.randn(32, 32)) for _ in range(2))
        self.scale = torch.nn.Parameter(torch.randn(1))


@pytest.mark.parametrize("getters", [False, True], ids=["by the extension", "by getters"])
@pytest.mark.parametrize("change", [*STALE, *SAME, *FREED])
def test_what_changed_between_collections_is_seen(device, monkeypatch, change, getters):
    """Other memory, dtypes or strides make a new table, other values do not, and the moments are right in each case."""
    if getters:
        monkeypatch.setattr("swag_kernels.describe._native", lambda: lambda tensors: None)
    module = Module().to(device)
    layout = segment_table([p.numel() for p in module.parameters()])
    ours, theirs = buffers(layout, 2, device)[:4], buffers(layout, 2)[:4]

    def collected():
        """Whether the table was used again."""
        params = list(module.parameters())
        with backend("cpu"):
            collect_([p.detach().cpu().resolve_neg() for p in params], *theirs, layout)
        with torch.no_grad():
            again = recollect(params, *ours, layout)
            if not again:
                collect_(params, *ours, layout)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert_same_bits(a.nan_to_num(7), b.nan_to_num(7))
        return again

    assert not collected() and collected()
    (STALE | SAME | FREED)[change](module)
    again = collected()
    assert again == (change in SAME) or change in FREED
    assert collected() == (change not in COPIED)


def test_memory_used_again_by_other_tensors(device):
    layout = segment_table([1024])
    memory = torch.randn(1024, device=device)
    mean, m2, _, count, _ = buffers(layout, 0, device)
    collect_([memory], mean, m2, None, count, layout)
    half = memory.view(torch.float16)
    half.copy_(torch.randn(2048))
    assert not recollect([half[:1024]], mean, m2, None, count, layout)
    assert not recollect([memory.view(torch.int32)], mean, m2, None, count, layout)
    with pytest.raises(ValueError, match="parameter 0"):
        collect_([half], mean, m2, None, count, layout)
    mean.zero_(), m2.zero_(), count.zero_()
    collect_([half[:1024]], mean, m2, None, count, layout)
    assert torch.equal(mean, half[:1024].float())


def test_other_buffers_are_checked_again(device):
    layout = segment_table([1024])
    params = [torch.randn(1024, device=device)]
    mean, m2, deviations, count, _ = buffers(layout, 2, device)
    collect_(params, mean, m2, deviations, count, layout)
    for other in (deviations.view(2048, 1), deviations[:1], deviations.view(1, 2048), None):
        assert not recollect(params, mean, m2, other, count, layout)
    assert not recollect(params, m2, mean, deviations, count, layout)
    assert recollect(params, mean, m2, deviations, count, layout)


def test_an_arena_that_grows(device):
    """Blocks after the last segment belong to nobody, and a table made for fewer of them is not read beyond its end."""
    layout = segment_table([1000])
    params = [torch.randn(1000, device=device)]
    for size in (1024, 4096, 2048):
        mean, m2 = torch.zeros(2, size, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        collect_(params, mean, m2, None, count, layout)
        assert torch.equal(mean[:1000], params[0]) and not mean[1000:].any()


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
