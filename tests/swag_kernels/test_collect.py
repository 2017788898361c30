"""collect_ against the reference in float64, and what must hold for any sizes, dtypes, strides and instruction sets."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swag_kernels import arena_size, collect_, native, reference, segment_table

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the compiled extension")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([0, 1, 3, 16, 31, 1023, 1024, 1025, 2500])
UNTOUCHED = 7.0

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def buffers(layout, rank, offset=0):
    """mean, m2, deviations and count with a mark in the padding, which nobody may write (but a slot's is set to zero).

    ``offset`` shifts every buffer by that many elements from the allocator's alignment.
    """
    size = arena_size(layout)
    held = torch.zeros(size, dtype=torch.bool)
    for start, numel, _ in layout.tolist():
        held[start : start + numel] = True
    mean, m2 = (torch.full((size + offset,), UNTOUCHED)[offset:] for _ in range(2))
    mean[held], m2[held] = 0, 0
    deviations = torch.full((rank * size + offset,), float("nan"))[offset:].view(rank, size) if rank else None
    return mean, m2, deviations, torch.zeros((), dtype=torch.int64), held


def snapshots(numels, dtypes, number, scale=0.05):
    """``number`` sets of parameters that move a little, one tensor of each size and dtype."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, generator=generator) for n in numels]
    return [
        [(p + scale * torch.randn(p.shape, generator=generator)).to(d) for p, d in zip(start, dtypes, strict=True)]
        for _ in range(number)
    ]


def in_reference(steps, layout, rank, dtype):
    size = arena_size(layout)
    mean, m2 = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    deviations = torch.zeros(rank, size, dtype=dtype) if rank else None
    count = torch.zeros((), dtype=torch.int64)
    for params in steps:
        reference.collect_(params, mean, m2, deviations, count, layout)
    return mean, m2, deviations


def assert_as_accurate_as_torch(out, torch32, exact):
    """|out − exact| ≤ 2·|torch in float32 − exact| + one rounding to float32."""
    error = (out.double() - exact).abs()
    worst = max((torch32.double() - exact).abs().tolist(), default=0)
    bound = 2 * worst + torch.finfo(torch.float32).eps * exact.abs()
    assert (error <= bound).all(), (error - bound).max()


@given(
    tensors=st.lists(st.tuples(SIZES, st.sampled_from(DTYPES)), min_size=1, max_size=6),
    rank=st.sampled_from([0, 1, 2, 5]),
    number=st.integers(1, 7),
    count=st.integers(1, 3),
    offset=st.sampled_from([0, 1]),
)
@relaxed
def test_matches_the_reference(isa, threads, tensors, rank, number, count, offset):
    threads(count)
    numels, dtypes = zip(*tensors, strict=True)
    layout = segment_table(numels)
    steps = snapshots(numels, dtypes, number)
    mean, m2, deviations, seen, held = buffers(layout, rank, offset)
    for params in steps:
        collect_(params, mean, m2, deviations, seen, layout)

    assert seen == number
    exact = in_reference(steps, layout, rank, torch.float64)
    plain = in_reference(steps, layout, rank, torch.float32)
    for out, torch32, truth in zip((mean, m2), plain, exact, strict=False):
        assert (out[~held] == UNTOUCHED).all()
        assert_as_accurate_as_torch(out[held], torch32[held], truth[held])
    for row in range(rank):
        if row < number:
            assert (deviations[row, ~held] == 0).all()
            assert_as_accurate_as_torch(deviations[row, held], plain[2][row, held], exact[2][row, held])
        else:
            assert deviations[row].isnan().all()


def test_the_slot_is_the_only_row_written(isa):
    layout = segment_table([1500, 3])
    steps = snapshots([1500, 3], [torch.float32] * 2, 5)
    mean, m2, deviations, count, _ = buffers(layout, 3)
    for n, params in enumerate(steps):
        before = deviations.clone()
        collect_(params, mean, m2, deviations, count, layout)
        for row in range(3):
            same = torch.equal(deviations[row].nan_to_num(-1), before[row].nan_to_num(-1))
            assert same == (row != n % 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_misaligned_parameters(isa, dtype):
    layout = segment_table([35 * 40, 1025, 77])
    mean, m2, deviations, count, held = buffers(layout, 2)
    transposed = torch.randn(40, 35).to(dtype).T
    params = [transposed, torch.randn(1026).to(dtype)[1:], torch.randn(77 * 3).to(dtype)[::3]]
    for _ in range(2):
        collect_(params, mean, m2, deviations, count, layout)
    flat = torch.cat([p.float().flatten() for p in params])
    torch.testing.assert_close(mean[held], flat, rtol=0, atol=0)
    assert (m2[held] == 0).all()


def test_parameters_that_require_grad_keep_their_graph(isa):
    layout = segment_table([10])
    weight = torch.nn.Parameter(torch.randn(10))
    loss = (weight * 2).sum()
    mean, m2, deviations, count, held = buffers(layout, 1)
    collect_([weight], mean, m2, deviations, count, layout)
    loss.backward()
    assert (weight.grad == 2).all()
    assert torch.equal(mean[held], weight.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_variance_is_the_two_pass_variance(isa, dtype):
    """A spread small against the mean, where E[θ²] − E[θ]² in float32 is lost: Welford's error is that of the mean's rounding."""
    number, size = 25, 1003
    unit = {torch.float32: 2.0**-16, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    generator = torch.Generator().manual_seed(3)
    steps = [64 * (1 + unit * torch.randint(0, 4, (size,), generator=generator)).to(dtype) for _ in range(number)]
    layout = segment_table([size])
    mean, m2, _, count, held = buffers(layout, 0)
    for theta in steps:
        collect_([theta], mean, m2, None, count, layout)

    stacked = torch.stack(steps).double()
    exact = (stacked - stacked.mean(0)).square().sum(0)
    plain = in_reference([[theta] for theta in steps], layout, 0, torch.float32)[1][:size]
    assert_as_accurate_as_torch(m2[held], plain, exact)
    relative = ((m2[held].double() - exact).abs() / exact).max()
    assert relative < 32 * 2.0**-24 / unit
    if dtype == torch.float32:
        single = torch.stack(steps)
        cancelling = single.square().mean(0) - single.mean(0).square()
        assert ((number * cancelling.double() - exact).abs() / exact).median() > 1


@given(st.lists(SIZES, min_size=1, max_size=5), st.integers(2, 4))
@relaxed
def test_bits_do_not_depend_on_threads_or_instruction_set(threads, numels, count):
    layout = segment_table(numels)
    steps = snapshots(numels, [torch.float32] * len(numels), 3)
    results = []
    for name in native.supported_isas():
        for number in (1, count):
            threads(number)
            with native.use_isa(name):
                mean, m2, deviations, seen, held = buffers(layout, 2)
                for params in steps:
                    collect_(params, mean, m2, deviations, seen, layout)
            results.append(torch.cat([mean, m2, deviations.flatten()]))
    assert all(torch.equal(r, results[0]) for r in results)


def test_gaps_in_the_layout(isa, threads):
    """Segments may leave whole blocks between them; a slot's gap up to the segment's own block is padding, the rest nobody's."""
    threads(2)
    layout = torch.tensor([[1024, 5, 0], [4096, 2000, 8]])
    params = [torch.randn(5), torch.randn(2000)]
    mean, m2, deviations, count, held = buffers(layout, 1)
    deviations.zero_()
    collect_(params, mean, m2, deviations, count, layout)
    assert torch.equal(mean[held], torch.cat(params))
    assert (mean[~held] == UNTOUCHED).all() and (m2[~held] == UNTOUCHED).all()
    assert (deviations == 0).all()


def test_no_tensors(isa):
    layout = segment_table([])
    mean, m2, deviations, count, _ = buffers(layout, 2)
    collect_([], mean, m2, deviations, count, layout)
    assert count == 1


def test_nothing_large_is_allocated(isa):
    layout = segment_table([200_000])
    params = snapshots([200_000], [torch.float32], 1)[0]
    mean, m2, deviations, count, _ = buffers(layout, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        collect_(params, mean, m2, deviations, count, layout)
    assert max((e.cpu_memory_usage for e in profile.key_averages()), default=0) < 10_000
