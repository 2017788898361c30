"""Scales and ranks chosen on validation data, through noise that is drawn once."""

import math

import pytest
import torch
from posterior_models import step
from prediction_models import fine_tune, texts

import swag_lora.drawing
from swag_lora import SwagPosterior, predict
from swag_lora.ensemble import Ensemble
from swag_lora.metrics import accuracy, brier, ece, nll
from swag_lora.mixture import Mixture
from swag_lora.prediction import Prediction
from swag_lora.scale import (
    SCALES,
    RankChoice,
    ReusedDraws,
    ScaleChoice,
    candidate_ranks,
    choose_rank,
    choose_scale,
    reused,
)

METHODS = ["iid", "antithetic", "antithetic+orthogonal"]
BATCH = texts(20)
LABELS = torch.randint(3, (20,), generator=torch.Generator().manual_seed(0))
ENCODED = [{"label": int(label)} for label in LABELS]


class Evaluator:
    """Predicts the same batch for every split, in chunks of samples."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def sampled(self, posterior, encoded, sampling, title):
        self.asked.append((sampling.scale, title))
        assert encoded is ENCODED
        method = sampling.resolved_method
        return predict(
            self.model, posterior, BATCH, sampling.samples, seed=sampling.seed, scale=sampling.scale, method=method,
            samples_per_pass=2,
        )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """How many samples the op has drawn."""
    counts = []
    for name, place in (("draw", 3), ("draw_orthogonal", 3)):
        op = getattr(swag_lora.drawing, name)

        def counted(*args, op=op, place=place, **named):
            counts.append(args[place])
            return op(*args, **named)

        monkeypatch.setattr(swag_lora.drawing, name, counted)
    return counts


@pytest.mark.parametrize("method", METHODS)
def test_every_scale_from_one_draw(drawn, method):
    _, posterior = fine_tune()
    draws = ReusedDraws(posterior)
    served = {scale: draws.draw(6, seed=3, first=2, scale=scale, method=method) for scale in (0.0, *SCALES)}
    assert drawn == [6]
    for scale, weights in served.items():
        own = posterior.draw(6, seed=3, first=2, scale=scale, method=method)
        assert (weights.seed, weights.first, weights.method, weights.dtype) == (3, 2, method, own.dtype)
        torch.testing.assert_close(weights.buffer, own.buffer, rtol=1e-5, atol=2e-6)
    assert torch.equal(served[0.0].buffer, posterior.mean.expand(6, -1))
    wide = served[8.0].buffer - posterior.mean
    torch.testing.assert_close(wide, 4 * (served[0.5].buffer - posterior.mean), rtol=1e-3, atol=1e-5)


def test_other_requests_are_drawn_for_themselves(drawn):
    _, posterior = fine_tune()
    draws = ReusedDraws(posterior)
    requests = [(4, 0, 0, "iid"), (4, 1, 0, "iid"), (4, 0, 4, "iid"), (2, 0, 0, "iid"), (4, 0, 0, "antithetic")]
    for number, seed, first, method in requests * 2:
        own = posterior.draw(number, seed, first, 2.0, method).buffer
        torch.testing.assert_close(draws.draw(number, seed, first, 2.0, method).buffer, own, rtol=1e-5, atol=2e-6)
    assert sum(drawn) == 3 * (4 + 4 + 4 + 2 + 4)
    with pytest.raises(ValueError, match="scale must be finite"):
        draws.draw(2, scale=float("nan"))


def test_samples_of_a_model_in_bfloat16_are_rounded_once():
    model, posterior = fine_tune()
    model.to(torch.bfloat16)
    served = ReusedDraws(posterior).draw(4, scale=4.0)
    exact = posterior.draw(4, scale=4.0, dtype=torch.float32).buffer
    assert served.dtype == torch.bfloat16
    off = (served.buffer.float() - exact).abs()
    assert (off <= 2**-8 * exact.abs() + 1e-6).all()
    assert (served.buffer == exact.to(torch.bfloat16)).float().mean() > 0.999


def test_mixtures_reuse_each_member_s(drawn):
    model, one = fine_tune()
    other = SwagPosterior(model, rank=3)
    for _ in range(4):
        step(model)
        other.collect()
    mixture = Mixture([one, other], scales=[1, 3])
    draws = reused(mixture)
    for scale in (0.5, 4.0):
        served = draws.draw(8, seed=1, scale=scale).buffer
        torch.testing.assert_close(served, mixture.draw(8, seed=1, scale=scale).buffer, rtol=1e-5, atol=2e-6)
    assert sum(drawn) == 3 * 8
    with pytest.raises(TypeError, match="not for Ensemble"):
        reused(Ensemble.of_means([one]))


def test_choose_scale(drawn):
    model, posterior = fine_tune()
    evaluator = Evaluator(model)
    choice = choose_scale(evaluator, posterior, ENCODED, samples=4, seed=2)
    assert drawn == [2, 2], "one draw of each chunk serves all scales"
    assert sorted(scale for scale, _ in evaluator.asked) == list(choice.scales)
    assert {*SCALES} <= {*choice.scales}
    for i, scale in enumerate(choice.scales):
        log_probs = predict(model, posterior, BATCH, 4, seed=2, scale=scale).log_probs
        for name, metric in (("nll", nll), ("brier", brier)):
            assert getattr(choice, name)[i] == pytest.approx(metric(log_probs, LABELS), rel=1e-4)
        assert choice.accuracy[i] == accuracy(log_probs, LABELS)
        assert choice.ece[i] == pytest.approx(ece(log_probs, LABELS), abs=1e-4)
    assert choice.scale == choice.scales[choice.nll.index(min(choice.nll))]
    assert (choice.samples, choice.seed) == (4, 2)
    again = choose_scale(Evaluator(model), posterior, ENCODED, samples=4, seed=2)
    assert again == choice


@pytest.mark.parametrize(
    ("best", "first", "last"),
    [
        (1, 0.5, 32),
        (16, 0.5, 32),
        (32, 0.5, 64),
        (512, 0.5, 1024),
        (4096, 0.5, 4096),
        (1e9, 0.5, 4096),
        (0.5, 0.25, 32),
        (0.125, 1 / 16, 32),
        (1e-6, 1 / 64, 32),
    ],
)
def test_scales_go_on_by_twos_while_an_end_is_the_best(best, first, last):
    model, posterior = fine_tune()

    class Sharpest(Evaluator):
        """Surest of the right answer at one scale."""

        def sampled(self, posterior, encoded, sampling, title):
            self.asked.append((sampling.scale, title))
            margin = 6 - 0.2 * abs(math.log2(sampling.scale / best))
            return Prediction.from_logits(margin * torch.nn.functional.one_hot(LABELS, 3).unsqueeze(0))

    choice = choose_scale(Sharpest(model), posterior, ENCODED, samples=2)
    assert choice.scales == tuple(2.0**i for i in range(round(math.log2(first)), 1 + round(math.log2(last))))
    assert choice.scale == min(max(best, first), last)
    assert choose_scale(Sharpest(model), posterior, ENCODED, samples=2, scales=(1.0, 2.0)).scales == (1.0, 2.0)


def test_scales_that_change_nothing_are_not_gone_on_with():
    model, posterior = fine_tune()

    class Even(Evaluator):
        def sampled(self, posterior, encoded, sampling, title):
            return Prediction.from_logits(torch.zeros(1, len(LABELS), 3))

    choice = choose_scale(Even(model), posterior, ENCODED)
    assert choice.scales == SCALES and choice.scale == SCALES[0]


def test_the_chosen_one_has_the_smallest_nll():
    def made(nlls):
        return ScaleChoice((0.5, 1.0, 2.0), nlls, (1.0,) * 3, (0.0,) * 3, (0.0,) * 3, 8, 0)

    assert made((0.3, 0.2, 0.4)).scale == 1.0
    assert made((0.3, 0.2, 0.2)).scale == 1.0
    assert made((0.3, float("inf"), 0.2)).scale == 2.0
    ranks = RankChoice((2, 5, 10), (made((0.3, 0.25, 0.4)), made((0.4, 0.4, 0.2)), made((0.2, 0.5, 0.5))))
    assert ranks.rank == 5 and ranks.choice.scale == 2.0


def test_choose_rank():
    model, posterior = fine_tune()
    for _ in range(3):
        step(model, 0.15)
        posterior.collect()
    evaluator = Evaluator(model)
    found = choose_rank(evaluator, posterior, ENCODED, samples=4, scales=(0.5, 2.0))
    assert found.ranks == (2, 4)
    assert [title[:8] for _, title in evaluator.asked] == ["rank 2, ", "rank 2, ", "rank 4, ", "rank 4, "]
    assert found.choices[1] == choose_scale(Evaluator(model), posterior, ENCODED, samples=4, scales=(0.5, 2.0))
    assert found.choices[0] != found.choices[1]


def test_candidate_ranks():
    assert candidate_ranks(20) == (2, 5, 10, 20)
    assert candidate_ranks(30) == (2, 5, 10, 20, 30)
    assert candidate_ranks(2) == (2,) and candidate_ranks(3) == (2, 3)
    assert candidate_ranks(1) == candidate_ranks(0) == (0,)


def test_nothing_to_choose_by():
    model, posterior = fine_tune()
    with pytest.raises(ValueError, match="there are none: give a number"):
        choose_scale(Evaluator(model), posterior, [])
    for scales in ((), (1.0, -1.0), (float("inf"),)):
        with pytest.raises(ValueError, match="scales to choose from"):
            choose_scale(Evaluator(model), posterior, ENCODED, scales=scales)


@pytest.mark.parametrize(("rank", "collections"), [(4, 3), (4, 4), (4, 9), (5, 13)])
def test_truncated_holds_the_most_recent(rank, collections):
    """As if a posterior of that rank had seen the same collections: the ring's rows and their order too."""
    torch.manual_seed(0)
    model, _ = fine_tune()
    whole = SwagPosterior(model, rank=rank)
    others = {fewer: SwagPosterior(model, rank=fewer) for fewer in range(min(rank, collections) + 1)}
    for _ in range(collections):
        step(model)
        for posterior in (whole, *others.values()):
            posterior.collect()
    for fewer, expected in others.items():
        truncated = whole.truncated(fewer)
        assert truncated.mean is whole.mean and truncated.m2 is whole.m2
        assert torch.equal(truncated.deviations[: min(fewer, collections)], expected.deviations)
        if fewer != 1:
            assert torch.equal(truncated.draw(3, scale=1.0).buffer, expected.draw(3, scale=1.0).buffer)
    diagonal = whole.draw(3, covariance=False).buffer
    assert torch.equal(whole.truncated(0).draw(3).buffer, diagonal)
    if collections <= rank:
        assert whole.truncated(collections).deviations.data_ptr() == whole.deviations.data_ptr(), "shared"
        assert torch.equal(whole.truncated(collections).draw(3).buffer, whole.draw(3).buffer)
    for bad, message in ((-1, "at least 0"), (min(rank, collections) + 1, "this posterior holds")):
        with pytest.raises(ValueError, match=message):
            whole.truncated(bad)


def test_truncated_is_saved_as_what_it_is(tmp_path):
    model, posterior = fine_tune()
    posterior.truncated(3).save_pretrained(tmp_path / "saved")
    loaded = SwagPosterior.from_pretrained(model, tmp_path / "saved")
    assert loaded.rank == 3 and int(loaded.count) == 6
    assert torch.equal(loaded.draw(4).buffer, posterior.truncated(3).draw(4).buffer)
