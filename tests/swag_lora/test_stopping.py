"""Sampling until every reported probability is sure, example by example."""

import math

import pytest
import torch
from prediction_models import FIELDS, assert_same, fine_tune, texts

from swag_kernels import AverageState, bayes_average_
from swag_lora import Predictor, predict
from swag_lora.stopping import guarded_std_error, prior_deviation

DEVIATION = prior_deviation(0.5)


@pytest.fixture(scope="module")
def model_and_posterior():
    return fine_tune(spread=0.3)


@pytest.mark.parametrize("method", ["antithetic", "iid"])
def test_examples_stop_when_they_are_sure(model_and_posterior, method):
    """Each is the fixed average over as many samples as it stopped at, the first number at which it was sure."""
    model, posterior = model_and_posterior
    batch, tolerance = texts(20), 0.01
    prediction = predict(
        model, posterior, batch, tolerance=tolerance, max_samples=400, method=method, samples_per_pass=4
    )
    counts = prediction.num_samples
    assert len(set(counts.tolist())) > 2, "some examples are harder than others"
    assert (prediction.std_error <= tolerance).all(1)[counts < 400].all()
    for number in counts.unique().tolist():
        rows = (counts == number).nonzero()[:, 0]
        few = {name: value[rows] for name, value in batch.items()}
        fixed = predict(model, posterior, few, number, method=method)
        for name in FIELDS[:-1]:
            torch.testing.assert_close(
                getattr(prediction, name)[rows], getattr(fixed, name), rtol=1e-4, atol=1e-5, msg=name
            )
        draws = number / (2 if method == "antithetic" else 1)
        guarded = ((fixed.std_error**2 * draws * (draws - 1) + DEVIATION**2) / draws**2).sqrt()
        torch.testing.assert_close(prediction.std_error[rows], guarded, rtol=1e-3, atol=1e-5)
        if number > 4:
            before = predict(model, posterior, few, number - 4, method=method)
            draws -= 4 / (2 if method == "antithetic" else 1)
            error = ((before.std_error.nan_to_num() ** 2 * draws * (draws - 1) + DEVIATION**2) / draws**2).sqrt()
            assert (error > 0.999 * tolerance).any(1).all(), "it could have stopped before"


def test_the_order_of_the_examples_stays(model_and_posterior):
    model, posterior = model_and_posterior
    batch, order = texts(12), torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 8, 6, 4])
    a = predict(model, posterior, batch, tolerance=0.01, max_samples=100)
    b = predict(model, posterior, {n: v[order] for n, v in batch.items()}, tolerance=0.01, max_samples=100)
    assert torch.equal(a.num_samples[order], b.num_samples)
    torch.testing.assert_close(a.probs[order], b.probs, rtol=1e-4, atol=1e-5)


def test_done_examples_leave_the_batch(model_and_posterior):
    model, posterior = model_and_posterior
    batch = texts(20)
    predictor = Predictor(model, posterior, tolerance=0.01, max_samples=200, samples_per_pass=4)
    prediction = predictor(batch)
    rows = max(count for name, count in predictor.rows_computed.items() if name.endswith("output"))
    assert rows == int(prediction.num_samples.sum()), "every example paid for its own samples alone"


def test_antithetic_pairs_are_one_draw():
    """Pairs that cancel have no error whatever each sample's; the two samples of a pair are never two draws."""
    p = torch.tensor([0.3, 0.7]).log()
    away = torch.tensor([0.2, -0.2])
    pairs = torch.stack([p, p])[:, None].exp() + torch.stack([away, -away])[:, None]
    state = AverageState(1, 2, antithetic=True)
    bayes_average_(state, pairs.repeat(3, 1, 1).log())
    torch.testing.assert_close(guarded_std_error(state, 0.5), torch.full((1, 2), DEVIATION / 3))
    iid = AverageState(1, 2)
    bayes_average_(iid, pairs.repeat(3, 1, 1).log())
    torch.testing.assert_close(guarded_std_error(iid, 0.5), torch.full((1, 2), math.sqrt(6 * 0.04 + DEVIATION**2) / 6))


def test_coverage(model_and_posterior):
    """Against 20 000 samples: 99 % of probabilities lie within three of their own standard errors."""
    model, posterior = model_and_posterior
    batch, tolerance = texts(16), 0.005
    reference = predict(model, posterior, batch, 20_000, method="iid", samples_per_pass=500, seed=99)
    within, total, samples = 0, 0, []
    for seed in range(40):
        prediction = predict(model, posterior, batch, tolerance=tolerance, max_samples=4000, seed=seed)
        bound = 3 * (prediction.std_error**2 + reference.std_error**2).sqrt()
        within += ((prediction.probs - reference.probs).abs() <= bound).sum().item()
        total += bound.numel()
        samples.append(prediction.num_samples.float().mean().item())
    print(f"coverage {within / total:.4f}, {sum(samples) / len(samples):.0f} samples")
    assert within / total >= 0.99


def test_multiple_tokens_are_one_example(model_and_posterior):
    """An example whose logits have further axes is sure when all of them are."""
    model, posterior = model_and_posterior
    whole = predict(model, posterior, texts(6), tolerance=0.02, max_samples=64)
    assert whole.num_samples.shape == (6,)
    joined = type(whole).cat([whole.select(torch.tensor([0, 1])), whole.select(torch.tensor([5]))])
    assert torch.equal(joined.num_samples, whole.num_samples[torch.tensor([0, 1, 5])])
    assert torch.equal(joined.probs, whole.probs[torch.tensor([0, 1, 5])])


def test_the_same_call_has_the_same_bits(model_and_posterior):
    model, posterior = model_and_posterior
    runs = [predict(model, posterior, texts(9), tolerance=0.02, max_samples=64) for _ in range(2)]
    assert_same(*runs)


@pytest.mark.parametrize("tolerance", [0, -0.1, 1.0, float("nan")])
def test_tolerances_that_mean_nothing(model_and_posterior, tolerance):
    with pytest.raises(ValueError, match="tolerance is a standard error of probabilities, above 0 and below 1"):
        predict(*model_and_posterior, texts(), tolerance=tolerance)


def test_max_samples_goes_with_tolerance(model_and_posterior):
    for options in ({"max_samples": 10}, {"max_samples": 10, "tolerance": 0.1, "num_samples": 4}):
        with pytest.raises(ValueError, match="max_samples goes with tolerance"):
            predict(*model_and_posterior, texts(), **options)
