"""collect and draw of this back end alone: segments in a kernel's parameters, in as many launches as hold them, and draw's
deviations in registers or read again. The bits are those of the CPU's kernels."""

from itertools import cycle, islice

import pytest
import torch
from test_collect import UNTOUCHED, buffers, snapshots
from test_draw import DTYPES, held_elements, options, posterior, same_bits

from swag_kernels import backend, collect_, draw, segment_table

SIZES = [1, 1024, 5, 1025, 4, 130]
RANKS = [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 32, 33, 37]


@pytest.fixture
def launches(device, request):
    """How many kernels have run, where that can be asked."""
    return request.getfixturevalue("simt").launches if device.type == "cpu" else lambda: None


def on(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def assert_drawn_as_on_the_cpu(device, state, number, **settings):
    out = draw(*on(device, state), number, **settings).cpu()
    with backend("cpu"):
        assert same_bits(out, draw(*state, number, **settings))
    assert (out[:, ~held_elements(settings["layout"], len(state[0]))] == 0).all()


def assert_collected_as_on_the_cpu(device, steps, layout, rank):
    *theirs, held = buffers(layout, rank)
    if rank:  # what no step writes
        theirs[2].fill_(UNTOUCHED)
    ours = on(device, [None if t is None else t.clone() for t in theirs])
    for params in steps:
        collect_(on(device, params), *ours, layout)
        with backend("cpu"):
            collect_(on("cpu", params), *theirs, layout)
    assert ours[3] == len(steps)
    for a, b in zip(ours, theirs, strict=True):
        assert a is None or torch.equal(a.cpu(), b)
    assert (ours[0].cpu()[~held] == UNTOUCHED).all() and (ours[1].cpu()[~held] == UNTOUCHED).all()


@pytest.mark.parametrize("number", [256, 257, 768, 769, 2048, 2049])
def test_as_many_launches_as_hold_the_tensors(device, launches, number):
    """256, 768 and 2048 segments fit the three sizes of parameters, of which draw has the first two."""
    numels = list(islice(cycle(SIZES), number))
    layout = segment_table(numels)
    before = launches()
    steps = snapshots(numels, list(islice(cycle(DTYPES[1:] + DTYPES), number)), 2)
    assert_collected_as_on_the_cpu(device, steps, layout, 1)
    if before is not None:
        assert launches() - before == 2 * -(-number // 2048)
    assert_drawn_as_on_the_cpu(device, posterior(layout, 1), 2, **options(layout, first_sample=1))
    if before is not None:
        assert launches() - before == 2 * -(-number // 2048) + -(-number // 768)


def test_gaps_take_the_place_of_tensors(device, launches):
    """Of several blocks, before, between and after the segments; tensors without elements take none."""
    offsets = range(2048, 4096 * 512, 4096)
    layout = torch.tensor([[offset, n, 8] for offset, n in zip(offsets, cycle([*SIZES, 0]), strict=False)])
    size = 4096 * 512
    held = held_elements(layout, size)
    mean, m2, slot = (torch.where(held, 0, UNTOUCHED).to(device) for _ in range(3))
    count = torch.zeros((), dtype=torch.int64, device=device)
    params = [torch.randn(n) for n in layout[:, 1].tolist()]
    before = launches()
    collect_(on(device, params), mean, m2, slot[None], count, layout)
    assert before is None or launches() - before == 1
    assert torch.equal(mean.cpu(), torch.full((size,), UNTOUCHED).masked_scatter(held, torch.cat(params)))
    assert count == 1 and not m2.cpu()[held].any() and (m2.cpu()[~held] == UNTOUCHED).all()
    padded = held.view(-1, 1024).any(dim=1, keepdim=True).expand(-1, 1024).flatten()
    assert not slot.cpu()[padded].any() and (slot.cpu()[~padded] == UNTOUCHED).all()

    before = launches()
    assert_drawn_as_on_the_cpu(device, posterior(layout, 0, size), 1, **options(layout))
    assert before is None or launches() - before == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5, 8])
def test_parameters_at_any_element(device, dtype, offset):
    """Of whole blocks, which are read in wide loads where they lie for it."""
    layout = segment_table([3000, 3000])
    memory = [torch.randn(3000 + offset).to(device, dtype)[offset:] for _ in range(3)]
    assert_collected_as_on_the_cpu(device, [memory[:2], memory[1:]], layout, 3)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("antithetic", [False, True])
def test_deviations_in_registers_and_beyond(device, antithetic, rank):
    layout = segment_table([1027, 600])
    settings = options(layout, antithetic=antithetic, first_sample=3, dtype=DTYPES[rank % 3])
    assert_drawn_as_on_the_cpu(device, posterior(layout, rank), 4, **settings)


@pytest.mark.parametrize("rank, number", [(64, 100), (20, 160), (3100, 2)])
def test_more_z_than_shared_memory_is_given(device, rank, number):
    """It is made in chunks of draws, anew for each tile of a block."""
    layout = segment_table([517, 3])
    assert_drawn_as_on_the_cpu(device, posterior(layout, rank), number, **options(layout, dtype=torch.float16))


def test_zeros_keep_their_sign_and_padding_stays_zero(device):
    """Ranks between those that have kernels of their own add nothing; what is not finite does not leave its elements."""
    layout = segment_table([1030])
    mean, std, deviations = posterior(layout, 2)
    mean[::3], std[::2], deviations[:, ::2] = -0.0, 0.0, -0.0
    assert_drawn_as_on_the_cpu(device, (mean, std, deviations), 16, **options(layout, antithetic=True))
    for scales in ({"diag_scale": float("inf")}, {"low_rank_scale": float("inf")}, {"low_rank_scale": float("nan")}):
        out = draw(*on(device, (mean, std, deviations)), 3, **options(layout, **scales)).cpu()
        assert not out[:, 1030:].any() and not out[:, :1030].isfinite().all()


@pytest.mark.gpu
def test_an_output_of_more_than_two_to_the_31_elements(device):
    layout = segment_table([1 << 20])
    state = on(device, posterior(layout, 3))
    number, settings = (1 << 11) + 5, options(layout, dtype=torch.float16)
    out = draw(*state, number, **settings)
    assert out.numel() > 1 << 31
    for first in (0, 1 << 10, (1 << 11) - 1, number - 2):
        assert torch.equal(out[first : first + 2], draw(*state, 2, **settings | {"first_sample": first}))
