"""The kernel against the reference in float64, and the name of a sample: (posterior, seed, k), on this back end as on the CPU."""

import pytest
import torch
from gpu_device import DTYPES, assert_same_bits, trusted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_draw import held_elements, options, posterior

from swag_kernels import arena_size, backend, draw, reference, segment_table

NUMELS = [1500, 3, 0, 1025]

relaxed = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def on(device, state):
    return [None if t is None else t.to(device) for t in state]


def drawn(device, state, number, **settings):
    return draw(*on(device, state), number, **settings).cpu()


def drawn_on_the_cpu(state, number, **settings):
    with backend("cpu"):
        return draw(*state, number, **settings)


@given(
    numels=st.lists(st.sampled_from([0, 1, 63, 1024, 1025]), min_size=1, max_size=3),
    rank=st.sampled_from([0, 1, 5, 20, 34]),
    samples=st.integers(1, 5),
    first=st.sampled_from([0, 1, 5, 2**32 - 9]),
    antithetic=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**64 - 1),
)
@relaxed
def test_matches_the_reference_and_the_cpu(device, numels, rank, samples, first, antithetic, dtype, seed):
    """|w − exact| ≤ 2·|torch − exact| + one rounding to the dtype + 4 units in the last place of the normal; the same bits
    as the CPU's kernels, because both do the same correctly rounded operations."""
    dtype, layout = trusted(device, dtype), segment_table(numels)
    state = posterior(layout, rank)
    settings = options(layout, seed=seed, first_sample=first, antithetic=antithetic)
    out = drawn(device, state, samples, **settings | {"dtype": dtype})
    torch32 = reference.draw(*state, samples, **settings).to(dtype)
    wide = [None if t is None else t.double() for t in state]
    exact = reference.draw(*wide, samples, **settings | {"dtype": torch.float64})

    assert (out[:, ~held_elements(layout, len(state[0]))] == 0).all()
    error = (out.double() - exact).abs()
    worst = max((torch32.double() - exact).abs().flatten().tolist(), default=0)
    diagonal = 0.7 * wide[1] * 7  # no normal exceeds 6.8
    bound = 2 * worst + torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * diagonal
    assert (error <= bound).all()
    assert_same_bits(out, drawn_on_the_cpu(state, samples, **settings | {"dtype": dtype}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("antithetic", [False, True])
def test_sample_k_depends_on_neither_number_nor_chunk(device, antithetic, dtype):
    layout = segment_table([3, 1025])
    state = posterior(layout, 3)
    settings = options(layout, antithetic=antithetic, dtype=dtype, first_sample=1)
    whole = drawn(device, state, 19, **settings)
    for first, number in ((0, 1), (1, 2), (4, 5), (18, 1)):
        chunk = drawn(device, state, number, **settings | {"first_sample": 1 + first})
        assert torch.equal(chunk, whole[first : first + number])


@pytest.mark.parametrize("first", [0, 5])
def test_antithetic_pairs(device, first):
    layout = segment_table(NUMELS)
    mean, std, deviations = posterior(layout, 3)
    state = torch.zeros_like(mean), std, deviations
    pairs = drawn(device, state, 6, **options(layout, antithetic=True, first_sample=2 * first))
    assert torch.equal(pairs[0::2], -pairs[1::2])
    assert torch.equal(pairs[0::2], drawn(device, state, 3, **options(layout, first_sample=first)))


def test_a_shard_gives_the_tail_of_the_whole_tensor(device):
    layout = segment_table([7, 3000])
    state = posterior(layout, 3)
    whole = drawn(device, state, 3, **options(layout))[:, 1024 : 1024 + 3000]
    for first in (4, 1024, 2052):
        shard = torch.tensor([[0, 0, 0], [0, 3000 - first, first]])
        part = [torch.zeros(*t.shape[:-1], arena_size(shard)) for t in state]
        for mine, source in zip(part, state, strict=True):
            mine[..., : 3000 - first] = source[..., 1024 + first : 1024 + 3000]
        out = drawn(device, part, 3, **options(shard))
        assert torch.equal(out[:, : 3000 - first], whole[:, first:])


def test_gaps_in_the_layout_are_zero(device):
    layout = torch.tensor([[1024, 5, 0], [4096, 1030, 8]])
    out = drawn(device, posterior(layout, 2, size=8192), 3, **options(layout))
    held = held_elements(layout, 8192)
    assert (out[:, ~held] == 0).all() and (out[:, held] != 0).all()


def test_a_layout_that_is_written_to(device):
    layout = segment_table([500])
    state = posterior(layout, 2)
    before = drawn(device, state, 2, **options(layout))
    layout[0, 1] = 100
    after = drawn(device, state, 2, **options(layout))
    assert torch.equal(after[:, :100], before[:, :100]) and not after[:, 100:].any()
