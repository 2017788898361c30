import math

import pytest
import torch
from average_checks import FIELDS, check, compare, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from swag_kernels import AverageState, backend, bayes_average_, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# S, B, C: two classes, odd sizes, more samples than a tile holds, more classes than a block. B is large enough for plain
# torch's largest error to be a typical one.
SIZES = [(8, 64, 2), (6, 33, 17), (32, 70, 150), (1, 40, 9), (600, 20, 33), (10, 16, 4099), (3, 16, 30_000)]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_reference(isa, sizes, antithetic):
    logits = 3 * torch.randn(sizes)
    check(torch.cat((logits, 0.5 * logits)) if antithetic else logits, None, antithetic)


@pytest.mark.parametrize("chunks", [2, 6])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(isa, dtype, antithetic, chunks):
    check((3 * torch.randn(16, 40, 150)).to(dtype), chunks, antithetic)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(isa, sizes):
    state = stream(torch.randn(sizes))
    assert state.num_samples == sizes[0] and state.log_sum.shape == sizes[1:]
    if not sizes[0]:
        assert (state.log_sum == -torch.inf).all() and not state.m2.any() and not state.votes.any()


def test_views(isa):
    logits = torch.randn(6, 50, 8)
    check(logits.permute(2, 0, 1))
    check(torch.randn(4, 30, 21)[:, ::2, 1:])


def test_bits_do_not_depend_on_threads_or_on_the_rest_of_the_batch(isa, threads):
    logits = 3 * torch.randn(6, 41, 5000)
    threads(1)
    one = stream(logits)
    for number in (2, 3, 16):
        threads(number)
        several, alone = stream(logits), stream(logits[:, 7:8].contiguous())
        for field in FIELDS:
            assert torch.equal(getattr(several, field), getattr(one, field)), field
            assert torch.equal(getattr(alone, field)[0], getattr(one, field)[7]), field


def test_order_of_the_samples(isa):
    logits = 3 * torch.randn(16, 40, 30)
    order = torch.randperm(16)
    exact, plain = stream(logits.double(), dtype=torch.float64), stream(logits, name="reference")
    compare(stream(logits[order]), plain, exact)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits(isa, scale):
    """Log-probabilities far below what a float32 probability can hold still add up."""
    check(scale * torch.randn(8, 40, 11))
    logits = torch.zeros(4, 1, 3)
    logits[:, 0, 1], logits[:, 0, 2] = -200.0, scale * torch.tensor([-1.0, -2.0, -1.0, -3.0])
    state = stream(logits, 2)
    torch.testing.assert_close(state.log_probs()[0, :2], torch.tensor([0.0, -200.0]))
    assert (state.std_error()[0, :2] == 0).all()


def test_excluded_classes(isa):
    logits = torch.randn(8, 64, 70)
    logits[:, :, 3], logits[2:5, :, 40:] = -torch.inf, -torch.inf
    logits[:, 5] = -torch.inf
    logits[:, 5, 60] = 4.0
    check(logits)
    check(logits, 2, True)
    state = stream(logits)
    assert (state.log_sum[:, 3] == -torch.inf).all() and not state.m2[:, 3].any()
    assert state.log_probs()[5, 60] == 0 and state.mean_entropy[5] == 0 and state.entropy()[5] == 0


@pytest.mark.parametrize("classes", [3, 40, 5000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_undefined_rows_are_nan_and_leave_the_others_alone(isa, classes, value):
    logits = torch.randn(4, 6, classes)
    clean = stream(logits)
    logits[1, 2, classes // 2] = value
    logits[2, 4] = -torch.inf
    state, reference = stream(logits), stream(logits, name="reference")
    for field in ("log_sum", "m2", "mean_entropy"):
        out = getattr(state, field)
        assert out[[2, 4]].isnan().all()
        out[[2, 4]] = getattr(clean, field)[[2, 4]]
        assert torch.equal(out, getattr(clean, field)), field
    assert torch.equal(state.votes, reference.votes)
    bayes_average_(state, torch.randn(2, 6, classes))
    assert state.count == 6


def test_ties_vote_for_the_first_class(isa):
    logits = torch.zeros(3, 2, 5000)
    logits[1, :, [7, 4000]] = 2.0
    logits[2, :, [4999, 2047, 2048]] = 1.0
    votes = stream(logits).votes
    assert votes.sum() == 6 and votes[:, [0, 7, 2047]].eq(1).all()


@pytest.mark.parametrize("antithetic", [False, True])
def test_what_the_state_says(isa, antithetic):
    """The accessors against their definitions, in float64, with the count carried over from call to call."""
    logits = 2 * torch.randn(12, 5, 7)
    state = stream(logits, 4, antithetic)
    p = logits.double().softmax(-1)
    mean, entropy = p.mean(0), -(p * p.log()).sum(-1)
    draws = p.unflatten(0, (-1, 2)).mean(1) if antithetic else p
    chosen = mean.argmax(-1)
    predictive = -(mean * mean.log()).sum(-1)
    expected = {
        "log_probs": mean.log(),
        "probs": mean,
        "entropy": predictive,
        "expected_entropy": entropy.mean(0),
        "mutual_information": predictive - entropy.mean(0),
        "disagreement": (p.argmax(-1) != chosen).double().mean(0),
        "std_error": draws.std(0) / math.sqrt(len(draws)),
    }
    assert state.num_samples == 12
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(state, name)().double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_identical_samples_have_no_spread(isa):
    state = stream(torch.randn(1, 9, 33).expand(10, 9, 33), 2, True)
    assert state.std_error().max() < 1e-7 and state.mutual_information().max() < 1e-6 and not state.disagreement().any()


def test_state_larger_than_one_call(isa):
    """Thousands of samples: the spread is that of the draws, not of rounding in the running mean."""
    logits = torch.randn(1, 4, 5) + 1e-3 * torch.randn(4000, 4, 5)
    state, exact = stream(logits, 100), stream(logits.double(), name="reference", dtype=torch.float64)
    torch.testing.assert_close(state.std_error().double(), exact.std_error(), rtol=1e-3, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)  # the tolerance is a matter of luck for one in a thousand
@given(
    pairs=st.integers(1, 12),
    batch=st.integers(60, 90),
    classes=st.integers(2, 90),
    chunk=st.integers(1, 6),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    antithetic=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(native.supported_isas() if native.missing() is None else []),
    seed=st.integers(0, 2**16),
)
def test_any_size(pairs, batch, classes, chunk, scale, antithetic, dtype, name, seed):
    torch.manual_seed(seed)
    logits = (scale * torch.randn(2 * pairs, batch, classes)).to(dtype)
    with native.use_isa(name):
        check(logits, 2 * chunk, antithetic)
        state = stream(logits, 2 * chunk, antithetic)
    torch.testing.assert_close(state.probs().sum(-1), torch.ones(batch), rtol=1e-4, atol=0)
    assert (state.votes.sum(-1) == 2 * pairs).all() and (state.m2 >= 0).all()
    assert (state.mean_entropy >= 0).all() and (state.mean_entropy <= math.log(classes) * (1 + 1e-5)).all()


def units_in_the_last_place(out, exact):
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)).double() - exact.float().abs().double()
    return ((out.double() - exact).abs() / spacing).max().item()


def test_exponential_and_logarithm(isa):
    x = torch.cat((-87.3 * torch.rand(200_000), -torch.rand(200_000), 88 * torch.rand(100_000), torch.zeros(1)))
    exps, logs = torch.empty_like(x), torch.empty_like(x)

    def run(x):
        native._kernels().exp_log(x.data_ptr(), exps.data_ptr(), logs.data_ptr(), x.numel())

    run(x)
    assert units_in_the_last_place(exps, x.double().exp()) <= 1.1 and exps[-1] == 1
    y = torch.cat((2 * torch.rand(200_000) + 0.5, exps[:300_000], torch.ones(1)))
    run(y)
    assert units_in_the_last_place(logs, y.double().log()) <= 1.2 and logs[-1] == 0
    special = torch.tensor([-torch.inf, -88.0, torch.nan])
    run(special)
    assert not exps[:2].any() and exps[2].isnan() and logs[2].isnan()


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name):
    state = AverageState(3, 7)
    buffers = state.log_sum, state.m2, state.votes, state.mean_entropy, state.count
    with backend(name):
        torch.library.opcheck(torch.ops.swag_kernels.bayes_average_, (*buffers, torch.randn(4, 3, 7), 1))


def test_compiles_without_a_graph_break():
    state, logits = AverageState(3, 6), torch.randn(4, 3, 6)

    def step(logits):
        bayes_average_(state, logits * 2)
        return state.log_sum.exp()

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    assert torch.equal(out, stream(2 * logits).log_sum.exp()) and state.num_samples == 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_merged_states_are_the_state_of_all_samples(antithetic):
    logits = 3 * torch.randn(18, 5, 7, dtype=torch.float64)
    whole, merged = (AverageState(5, 7, antithetic=antithetic, dtype=torch.float64) for _ in range(2))
    bayes_average_(whole, logits)
    for part in logits.split([4, 2, 12]):
        block = AverageState(5, 7, antithetic=antithetic, dtype=torch.float64)
        bayes_average_(block, part)
        merged.merge_(block)
    merged.merge_(AverageState(5, 7, antithetic=antithetic))
    for name in ("log_sum", "m2", "votes", "mean_entropy", "count"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-13)
    rows = torch.tensor([4, 1])
    chosen = merged.select(rows)
    assert torch.equal(chosen.std_error(), merged.std_error()[rows]) and chosen.num_samples == 18
    bayes_average_(chosen, logits[:, rows])
    assert merged.num_samples == 18, "a selection is a copy"


def test_states_that_do_not_merge():
    with pytest.raises(ValueError, match="nothing in common"):
        AverageState(5, 7).merge_(AverageState(5, 7, antithetic=True))
