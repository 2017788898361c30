"""Temperature scaling against a grid, against torch's minimiser, and on data whose temperature is known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from swag_lora import Prediction
from swag_lora.metrics import nll
from swag_lora.temperature import LARGEST, apply_temperature, fit_temperature, tempered


def calibrated(n=4000, classes=5, seed=0):
    """Log-probabilities, and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).log_softmax(-1)
    return log_probs, torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]


def standard_error(log_probs):
    """Of log T at T = 1: the Fisher information of n examples is the sum of Var_p[log p]."""
    probs = log_probs.exp()
    mean = (probs * log_probs).sum(1, keepdim=True)
    return 1 / math.sqrt((probs * (log_probs - mean).square()).sum())


def test_calibrated_data_keep_their_temperature():
    for seed in range(5):
        log_probs, labels = calibrated(seed=seed)
        assert abs(math.log(fit_temperature(log_probs, labels))) < 4 * standard_error(log_probs)


@pytest.mark.parametrize("factor", [0.3, 1.7, 6.0])
def test_overconfident_logits_recover_their_factor(factor):
    log_probs, labels = calibrated()
    wrong = (factor * log_probs).log_softmax(-1)
    assert abs(math.log(fit_temperature(wrong, labels) / factor)) < 4 * standard_error(log_probs)
    right = fit_temperature(log_probs, labels)
    assert fit_temperature(wrong, labels) == pytest.approx(factor * right, rel=1e-9)


def test_against_torch_s_minimiser():
    log_probs, labels = calibrated(300, seed=3)
    log_probs = (2.5 * log_probs).log_softmax(-1)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    options = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 1e-14, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([log_t], **options)

    def loss():
        optimizer.zero_grad()
        value = cross_entropy(log_probs / log_t.exp(), labels)
        value.backward()
        return value

    optimizer.step(loss)
    assert fit_temperature(log_probs, labels) == pytest.approx(log_t.exp().item(), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), classes=st.integers(2, 6), spread=st.floats(0.1, 30))
def test_no_temperature_on_a_grid_is_better(seed, n, classes, spread):
    generator = torch.Generator().manual_seed(seed)
    log_probs = (spread * torch.randn(n, classes, generator=generator)).log_softmax(-1)
    labels = torch.randint(classes, (n,), generator=generator)
    found = fit_temperature(log_probs, labels)
    assert 1 / LARGEST <= found <= LARGEST
    best = nll(apply_temperature(log_probs.double(), found), labels)
    for step in range(-20, 21):
        other = math.exp(step / 20 * math.log(LARGEST))
        assert best <= nll(apply_temperature(log_probs.double(), other), labels) + 1e-9


def test_ends_of_the_range():
    logits = torch.tensor([[3.0, 0.0, -1.0], [0.0, 2.0, 0.5]])
    log_probs = logits.log_softmax(-1)
    assert fit_temperature(log_probs, torch.tensor([0, 1])) == 1 / LARGEST
    assert fit_temperature((40 * logits).log_softmax(-1), torch.tensor([0, 1])) == 1 / LARGEST
    assert fit_temperature(log_probs, torch.tensor([2, 0])) == LARGEST
    assert fit_temperature(torch.full((3, 4), 0.25).log(), torch.tensor([0, 1, 2])) == 1


def test_classes_of_no_probability_do_not_matter():
    log_probs, labels = calibrated(200)
    wider = torch.cat([log_probs, torch.full((200, 2), -torch.inf)], 1)
    absent = torch.cat([log_probs, torch.full((200, 2), -1e4)], 1)
    expected = fit_temperature(log_probs, labels)
    assert fit_temperature(wider, labels) == pytest.approx(expected, rel=1e-12)
    assert fit_temperature(absent, labels) == pytest.approx(expected, rel=1e-12)
    for temperature in (0.1, 20.0):
        assert (apply_temperature(absent, temperature)[:, 5:].exp() < 1e-200).all()
        assert not tempered(Prediction.from_logits(wider[None]), temperature).entropy.isnan().any()


def test_apply():
    log_probs = calibrated(50)[0].float().view(5, 10, 5)
    torch.testing.assert_close(apply_temperature(log_probs, 1.0), log_probs)
    hot = apply_temperature(log_probs, 3.0)
    assert hot.dtype == torch.float32
    torch.testing.assert_close(hot, (log_probs / 3).log_softmax(-1))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="above 0 and finite"):
            apply_temperature(log_probs, temperature)


def test_prediction_at_a_temperature():
    averaged = Prediction.from_logits(3 * torch.randn(8, 30, 4))
    cooler = tempered(averaged, 0.5)
    point = Prediction.from_logits((averaged.log_probs.double() / 0.5)[None])
    for name in ("log_probs", "entropy", "expected_entropy"):
        torch.testing.assert_close(getattr(cooler, name).double(), getattr(point, name), rtol=1e-5, atol=1e-6)
    assert cooler.num_samples == 1 and cooler.log_probs.dtype == torch.float32
    assert (
        (cooler.mutual_information == 0).all() and (cooler.disagreement == 0).all() and cooler.std_error.isnan().all()
    )
    assert torch.equal(cooler.predicted, averaged.predicted)


def test_refusals():
    log_probs, labels = calibrated(10)
    impossible = log_probs.clone()
    impossible[3] = torch.tensor([-torch.inf, 0, -torch.inf, -torch.inf, -torch.inf])
    labels[3] = 0
    with pytest.raises(ValueError, match="a label has probability zero"):
        fit_temperature(impossible, labels)
    with pytest.raises(ValueError, match="sum to"):
        fit_temperature(3 * log_probs, labels)
    with pytest.raises(ValueError, match="at least one example"):
        fit_temperature(log_probs[:0], labels[:0])
