"""Metrics against definitions written out in numpy, and the inputs that trip them."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_matthews_corrcoef,
)

from swag_lora import metrics

PER_CLASS = [metrics.nll, metrics.brier, metrics.accuracy, metrics.mcc, metrics.ece]
CHECKED = [*PER_CLASS, metrics.aurc, metrics.confidence_bins]


def problem(n=400, num_classes=5, sharpness=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, num_classes, generator=generator)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.6,
        logits.argmax(1),
        torch.randint(num_classes, (n,), generator=generator),
    )
    return logits.log_softmax(1), labels


def ece_by_hand(probs, labels, num_bins):
    """Maddox et al.'s loop over half-open bins (lower, upper]."""
    confidence, predicted = probs.max(1), probs.argmax(1)
    total = 0.0
    for i in range(num_bins):
        inside = (confidence > i / num_bins) & (confidence <= (i + 1) / num_bins)
        if inside.any():
            gap = (predicted == labels)[inside].mean() - confidence[inside].mean()
            total += abs(gap) * inside.mean()
    return total


def auroc_by_hand(inside, outside):
    greater = (outside[:, None] > inside[None]).mean()
    return greater + 0.5 * (outside[:, None] == inside[None]).mean()


def aupr_by_hand(inside, outside):
    """Sum over distinct thresholds of (recall step) * precision."""
    scores = np.concatenate([inside, outside])
    positive = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    area, recall = 0.0, 0.0
    for threshold in np.unique(scores)[::-1]:
        flagged = scores >= threshold
        hits = positive[flagged].sum()
        area += (hits / len(outside) - recall) * hits / flagged.sum()
        recall = hits / len(outside)
    return area


@pytest.mark.parametrize("num_classes", [2, 5, 40])
def test_against_definitions(num_classes):
    log_probs, labels = problem(num_classes=num_classes)
    p, y = log_probs.double().exp().numpy(), labels.numpy()
    one_hot = np.eye(num_classes)[y]
    assert metrics.nll(log_probs, labels) == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-12)
    assert metrics.brier(log_probs, labels) == pytest.approx(((p - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    assert metrics.accuracy(log_probs, labels) == (p.argmax(1) == y).mean()
    predicted = np.eye(num_classes)[p.argmax(1)]
    covariance = np.mean((predicted - predicted.mean(0)) * (one_hot - one_hot.mean(0)))
    spread = np.mean((predicted - predicted.mean(0)) ** 2) * np.mean((one_hot - one_hot.mean(0)) ** 2)
    assert metrics.mcc(log_probs, labels) == pytest.approx(covariance / math.sqrt(spread), rel=1e-9)
    for num_bins in (1, 2, 15, 20):
        expected = ece_by_hand(p, y, num_bins)
        assert metrics.ece(log_probs, labels, num_bins) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics_away_from_edges():
    log_probs, labels = problem()
    probs = log_probs.exp()
    for ours, theirs in [
        (metrics.accuracy, multiclass_accuracy(probs, labels, 5, average="micro")),
        (metrics.mcc, multiclass_matthews_corrcoef(probs, labels, 5)),
        (metrics.ece, multiclass_calibration_error(probs, labels, 5, n_bins=15, norm="l1")),
    ]:
        assert ours(log_probs, labels) == pytest.approx(float(theirs), abs=1e-5)


def test_nll_is_over_examples_not_over_batches():
    log_probs, labels = problem(n=10)
    whole = metrics.nll(log_probs, labels)
    parts = [metrics.nll(log_probs[:8], labels[:8]), metrics.nll(log_probs[8:], labels[8:])]
    assert whole == pytest.approx(0.8 * parts[0] + 0.2 * parts[1])
    assert abs(whole - sum(parts) / 2) > 1e-3


def test_ece_saturated_confidence_stays_in_the_last_bin():
    probs = torch.tensor([[1.0, 0.0], [0.97, 0.03]], dtype=torch.float64)
    labels = torch.tensor([1, 0])
    # One bin holds both: |1/2 - 0.985|. A bin of its own for 1.0 would give (1 + 0.03) / 2.
    assert metrics.ece(probs.log(), labels, 15) == pytest.approx(0.485)


def test_ece_edge_belongs_to_the_lower_bin():
    probs = torch.tensor([[0.75, 0.25], [0.80, 0.20]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    # Bins (0.5, 0.75] and (0.75, 1]: apart the gaps are 0.25 and 0.8, together they would partly cancel.
    assert metrics.ece(probs.log(), labels, 4) == pytest.approx((0.25 + 0.80) / 2)


def test_ece_confidence_rounded_above_one():
    log_probs = torch.tensor([[1e-6, -20.0]])
    assert metrics.ece(log_probs, torch.tensor([0])) == pytest.approx(0, abs=1e-5)


def test_brier_of_certain_answers():
    certain = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert metrics.brier(certain, torch.tensor([0, 1])) == 0
    assert metrics.brier(certain, torch.tensor([1, 0])) == 2


def test_zero_probability_of_the_label_is_an_infinite_nll():
    log_probs = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert metrics.nll(log_probs, torch.tensor([0, 0])) == math.inf
    assert metrics.nll(log_probs, torch.tensor([0, 1])) == 0


def test_mcc_is_zero_where_undefined():
    one_class = torch.tensor([0.9, 0.1]).log().expand(10, 2)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert metrics.mcc(one_class, labels) == 0
    assert metrics.mcc(one_class, torch.zeros(10, dtype=torch.long)) == 0


def test_confidence_bins_are_those_of_the_calibration_error():
    log_probs, labels = problem()
    bins, correct, confidence = metrics.confidence_bins(log_probs, labels, 15)
    p = log_probs.double().exp().numpy()
    np.testing.assert_array_equal(bins, np.ceil(p.max(1) * 15).astype(int) - 1)
    np.testing.assert_array_equal(correct, p.argmax(1) == labels.numpy())
    np.testing.assert_allclose(confidence, p.max(1), rtol=1e-12)
    gaps = [abs((correct - confidence)[bins == i].sum()) for i in range(15)]
    assert metrics.ece(log_probs, labels, 15) == pytest.approx(float(sum(gaps)) / len(labels), rel=1e-12)
    saturated = torch.tensor([[0.0, -math.inf]])
    assert metrics.confidence_bins(saturated, torch.tensor([0]))[0].tolist() == [14]


def risk_by_hand(confidence, wrong):
    """The mean, over all orders of examples that are sorted by confidence, of the error rates of the first i."""
    curves = []
    for order in itertools.permutations(range(len(wrong))):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            curves.append([np.mean([wrong[j] for j in order[:i]]) for i in range(1, len(wrong) + 1)])
    return np.mean(curves, 0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6))
def test_risk_coverage_with_ties(examples):
    confidence = np.array([0.55 + level / 10 for level, _ in examples])
    wrong = np.array([bad for _, bad in examples], dtype=int)
    log_probs = torch.from_numpy(np.stack([confidence, 1 - confidence], 1)).log()
    curve = metrics.risk_coverage(log_probs, torch.from_numpy(wrong))
    by_hand = risk_by_hand(confidence, wrong)
    np.testing.assert_allclose(curve, by_hand, atol=1e-12)
    assert metrics.aurc(log_probs, torch.from_numpy(wrong)) == pytest.approx(by_hand.mean(), abs=1e-12)


def test_aurc_of_a_ranking_without_ties():
    log_probs, labels = problem(n=300)
    p = log_probs.double().exp().numpy()
    total = 0.0
    for threshold in p.max(1):
        kept = p.max(1) >= threshold
        total += (p.argmax(1) != labels.numpy())[kept].mean()
    assert metrics.aurc(log_probs, labels) == pytest.approx(total / 300, rel=1e-12)
    assert float(metrics.risk_coverage(log_probs, labels)[-1]) == pytest.approx(1 - metrics.accuracy(log_probs, labels))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 12), min_size=1, max_size=30),
    st.lists(st.integers(-3, 12), min_size=1, max_size=30),
)
def test_ood_areas_with_ties(inside, outside):
    a, b = np.array(inside) / 4, np.array(outside) / 4
    scores = torch.from_numpy(a), torch.from_numpy(b)
    assert metrics.ood_auroc(*scores) == pytest.approx(auroc_by_hand(a, b), abs=1e-6)
    assert metrics.ood_aupr(*scores) == pytest.approx(aupr_by_hand(a, b), abs=1e-6)


def test_ood_resolves_small_differences():
    inside = 40 + 1e-6 * torch.arange(50, dtype=torch.float64)
    outside = inside + 1e-6 * 50
    assert metrics.ood_auroc(inside, outside) == 1
    assert metrics.ood_auroc(outside, inside) == 0
    assert metrics.ood_aupr(inside, inside.clone()) == pytest.approx(0.5, abs=0.02)
    constant = torch.zeros(50)
    assert metrics.ood_auroc(constant, constant) == 0.5


def test_report():
    log_probs, labels = problem()
    entropy = torch.special.entr(log_probs.exp()).sum(1)
    inside = SimpleNamespace(log_probs=log_probs, entropy=entropy, mutual_information=entropy / 3, num_samples=4)
    outside = SimpleNamespace(log_probs=log_probs, entropy=entropy + 0.5, mutual_information=entropy / 3, num_samples=4)
    values = metrics.report(inside, labels)
    assert values == {f.__name__: f(log_probs, labels) for f in PER_CLASS}
    assert metrics.report(inside, labels, num_bins=3)["ece"] == metrics.ece(log_probs, labels, 3)

    values = metrics.report(inside, labels, outside)
    assert values["ood_auroc_entropy"] == metrics.ood_auroc(entropy, entropy + 0.5) > 0.5
    assert values["ood_aupr_entropy"] == metrics.ood_aupr(entropy, entropy + 0.5)
    assert values["ood_auroc_mutual_information"] == pytest.approx(0.5)
    assert "ood_aupr_mutual_information" in values
    inside.num_samples = outside.num_samples = 1
    assert not any("mutual" in name for name in metrics.report(inside, labels, outside))


@pytest.mark.parametrize("metric", CHECKED)
def test_bad_input(metric):
    log_probs, labels = problem(n=6)
    with pytest.raises(ValueError, match="at least one example"):
        metric(log_probs[:0], labels[:0])
    with pytest.raises(ValueError, match=r"\[n, C\] and labels \[n\]"):
        metric(log_probs, labels[:5])
    with pytest.raises(ValueError, match=r"\[n, C\] and labels \[n\]"):
        metric(log_probs[None], labels)
    with pytest.raises(TypeError, match="integers"):
        metric(log_probs, labels.float())
    with pytest.raises(ValueError, match="label 5 of example 3"):
        metric(log_probs, torch.tensor([0, 1, 2, 5, 0, 0]))
    with pytest.raises(ValueError, match="label -100 of example 0"):
        metric(log_probs, torch.tensor([-100, 1, 2, 1, 0, 0]))
    broken = log_probs.clone()
    broken[4, 2] = math.nan
    with pytest.raises(ValueError, match="example 4 contain NaN"):
        metric(broken, labels)
    with pytest.raises(ValueError, match="not logits or probabilities"):
        metric(log_probs.exp(), labels)
    with pytest.raises(ValueError, match="example 2 sum to 0"):
        broken = log_probs.clone()
        broken[2] = -math.inf
        metric(broken, labels)


def test_bad_bins_and_scores():
    log_probs, labels = problem(n=6)
    with pytest.raises(ValueError, match="num_bins"):
        metrics.ece(log_probs, labels, 0)
    scores = torch.rand(5)
    with pytest.raises(ValueError, match="at least one example each"):
        metrics.ood_auroc(scores, scores[:0])
    with pytest.raises(ValueError, match="1 of the 10 scores are NaN"):
        metrics.ood_aupr(scores, torch.tensor([1, 2, math.nan, 3, 4]))
