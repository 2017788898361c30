"""The kernel against the reference in float64, and the name of a sample: (posterior, seed, k), on this back end as on the CPU."""

from importlib import import_module
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_draw import held_elements, options, posterior
from test_philox import KNOWN_ANSWERS, box_muller, normal, words_with_corners
from triton_device import DTYPES, assert_same_bits

from swag_kernels import arena_size, backend, draw, reference, segment_table
from swag_kernels.triton.normal import box_muller as triton_box_muller

NUMELS = [1500, 3, 0, 1025]

relaxed = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@triton.jit
def philox_kernel(p_counter, p_words, seed_low, seed_high, number, B: tl.constexpr):
    o = tl.arange(0, B)
    m = o < number
    seed = (seed_high.to(tl.uint64) << 32) | seed_low.to(tl.uint64)
    c0 = tl.load(p_counter + o, mask=m).to(tl.uint32, bitcast=True)
    c1 = tl.load(p_counter + number + o, mask=m).to(tl.uint32, bitcast=True)
    c2 = tl.load(p_counter + 2 * number + o, mask=m).to(tl.uint32, bitcast=True)
    c3 = tl.load(p_counter + 3 * number + o, mask=m).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(p_words + o, x0.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + number + o, x1.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + 2 * number + o, x2.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + 3 * number + o, x3.to(tl.int32, bitcast=True), mask=m)


@triton.jit
def normal_kernel(p_words, p_normals, number, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < number
    for pair in tl.static_range(2):
        x0 = tl.load(p_words + 2 * pair * number + o, mask=m).to(tl.uint32, bitcast=True)
        x1 = tl.load(p_words + (2 * pair + 1) * number + o, mask=m).to(tl.uint32, bitcast=True)
        n0, n1 = triton_box_muller(x0, x1)
        tl.store(p_normals + 2 * pair * number + o, n0, mask=m)
        tl.store(p_normals + (2 * pair + 1) * number + o, n1, mask=m)


def as_int32(words):
    return torch.as_tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_known_answers(device, counter, key, answer):
    """Random123's vectors; the kernels of this package go through the same ``tl.philox``."""
    counters = as_int32(counter)[:, None].repeat(1, 7).contiguous().to(device)
    words = torch.empty_like(counters)
    philox_kernel[(1,)](counters, words, key & 0xFFFFFFFF, key >> 32, 7, B=8)
    assert torch.equal(words.cpu(), as_int32(answer)[:, None].repeat(1, 7))


def test_normals(device):
    """Within a few units in the last place of float64, and the bits of the CPU's kernels."""
    words = words_with_corners(20_000)
    number = words.shape[1]
    out = torch.empty(words.shape, device=device)
    integers = as_int32(words.astype("int64")).to(device)
    normal_kernel[triton.cdiv(number, 1024),](integers, out, number, B=1024, enable_fp_fusion=False)
    truth = torch.from_numpy(box_muller(words))
    spacing = torch.nextafter(truth.float().abs(), torch.tensor(float("inf"))) - truth.float().abs()
    assert ((out.cpu().double() - truth).abs() / spacing).max() < 4
    assert_same_bits(out, torch.from_numpy(normal(words)))


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
    layout = segment_table(numels)
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
    layout = segment_table(NUMELS)
    state = posterior(layout, 3)
    settings = options(layout, antithetic=antithetic, dtype=dtype, first_sample=1)
    whole = drawn(device, state, 19, **settings)
    for first, number in ((0, 1), (1, 2), (4, 5), (18, 1)):
        chunk = drawn(device, state, number, **settings | {"first_sample": 1 + first})
        assert torch.equal(chunk, whole[first : first + number])


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_configuration_gives_the_same_bits(device, antithetic, monkeypatch):
    """Whatever a program holds in registers, reads again or makes at once."""
    module = import_module("swag_kernels.triton.draw")
    layout = segment_table(NUMELS)
    state = posterior(layout, 10)
    settings = options(layout, antithetic=antithetic, first_sample=1)
    own = drawn(device, state, 3, **settings)
    for held, (group, elements) in product(module.HELD_RANKS, ((1, 512), (1, 1024), (2, 1024))):
        tile = {"HELD": held, "GROUP": group, "B_N": elements}
        monkeypatch.setattr(module, "tile_of", lambda *_, tile=tile: tile)
        assert torch.equal(drawn(device, state, 3, **settings), own), tile


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
