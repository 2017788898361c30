import pytest
import torch
from average_checks import FIELDS, check, stream
from gpu_device import DTYPES

from swag_kernels import AverageState

# S, B, C: two classes, odd sizes, more samples than one merge takes, more classes than a tile or a part holds.
SIZES = [(8, 16, 2), (6, 9, 17), (12, 6, 150), (40, 4, 33), (5, 3, 1030), (3, 2, 20_000)]


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_the_reference(device, sizes, antithetic):
    logits = 3 * torch.randn(sizes)
    check(torch.cat((logits, 0.5 * logits)) if antithetic else logits, None, antithetic, device=device)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(device, dtype, antithetic):
    check((3 * torch.randn(12, 12, 150)).to(dtype), 6, antithetic, device=device)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(device, sizes):
    state = stream(torch.randn(sizes), device=device)
    assert state.num_samples == sizes[0] and state.log_sum.shape == sizes[1:]
    if not sizes[0]:
        assert (state.log_sum == -torch.inf).all() and not state.m2.any() and not state.votes.any()


def test_views(device):
    check(torch.randn(6, 50, 8).permute(2, 0, 1), device=device)


def test_bits_do_not_depend_on_the_rest_of_the_batch(device):
    logits = 3 * torch.randn(5, 6, 1500)
    whole, alone = stream(logits, device=device), stream(logits[:, 4:5].contiguous(), device=device)
    for field in FIELDS:
        assert torch.equal(getattr(alone, field)[0], getattr(whole, field)[4]), field


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits(device, scale):
    """Log-probabilities far below what a float32 probability can hold still add up."""
    check(scale * torch.randn(8, 20, 11), device=device)
    logits = torch.zeros(4, 1, 3)
    logits[:, 0, 1], logits[:, 0, 2] = -200.0, scale * torch.tensor([-1.0, -2.0, -1.0, -3.0])
    state = stream(logits, 2, device=device)
    torch.testing.assert_close(state.log_probs()[0, :2].cpu(), torch.tensor([0.0, -200.0]))
    assert (state.std_error()[0, :2] == 0).all()


def test_excluded_classes(device):
    logits = torch.randn(8, 12, 70)
    logits[:, :, 3], logits[2:5, :, 40:] = -torch.inf, -torch.inf
    logits[:, 5] = -torch.inf
    logits[:, 5, 60] = 4.0
    check(logits, device=device)
    check(logits, 2, True, device=device)
    state = stream(logits, device=device)
    assert (state.log_sum[:, 3] == -torch.inf).all() and not state.m2[:, 3].any()
    assert state.log_probs()[5, 60] == 0 and state.mean_entropy[5] == 0 and state.entropy()[5] == 0


@pytest.mark.parametrize("classes", [3, 1500])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_undefined_rows_are_nan_and_leave_the_others_alone(device, classes, value):
    logits = torch.randn(4, 6, classes)
    clean = stream(logits, device=device)
    logits[1, 2, classes // 2] = value
    logits[2, 4] = -torch.inf
    state = stream(logits, device=device)
    for field in ("log_sum", "m2", "mean_entropy"):
        out = getattr(state, field)
        assert out[[2, 4]].isnan().all(), field
        assert torch.equal(out[[0, 1, 3, 5]], getattr(clean, field)[[0, 1, 3, 5]]), field


def test_ties_go_to_the_first_class(device):
    logits = torch.zeros(4, 3, 1500)
    logits[:, 1, [700, 1400]], logits[:, 2, 1499] = 2.0, 1.0
    votes = stream(logits, device=device).votes
    assert votes[0, 0] == votes[1, 700] == votes[2, 1499] == 4 and votes.sum() == 12


def test_opcheck(device):
    state = AverageState(3, 7, device=device)
    fields = state.log_sum, state.m2, state.votes, state.mean_entropy, state.count
    torch.library.opcheck(torch.ops.swag_kernels.bayes_average_, (*fields, torch.randn(4, 3, 7, device=device), 1))
