"""Accuracy, calibration and out-of-distribution detection of averaged predictions.

Every function takes `log_probs [n, C]` (natural logarithm, each row normalized; -inf is a probability of zero) and
`labels [n]` (integers in [0, C)), computes in float64, and returns a Python float. The predicted class is the argmax
of the same averaged probabilities that the likelihood is taken from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

if TYPE_CHECKING:
    from .predict import Prediction


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood in nats: the mean over all examples of -log p(y). Infinite where p(y) is zero."""
    log_probs, labels = _checked(log_probs, labels)
    return float(-log_probs.gather(1, labels[:, None]).mean())


def brier(log_probs: Tensor, labels: Tensor) -> float:
    """Multi-class Brier score: the mean over examples of the sum over classes of (p_c - 1[y = c])^2, in [0, 2].

    Brier (1950). Some libraries divide by C, or for two classes take one class alone (half of this).
    """
    log_probs, labels = _checked(log_probs, labels)
    probs = log_probs.exp()
    of_label = probs.gather(1, labels[:, None]).squeeze(1)
    return float((probs.square().sum(1) - 2 * of_label + 1).mean())


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """The fraction of examples whose most probable class is the label (the first one of a tie)."""
    log_probs, labels = _checked(log_probs, labels)
    return float((log_probs.argmax(1) == labels).double().mean())


def mcc(log_probs: Tensor, labels: Tensor) -> float:
    """Matthews correlation coefficient for C classes (Gorodkin 2004, R_K), in [-1, 1].

    Zero where it is undefined, that is where all predictions or all labels are one class.
    """
    log_probs, labels = _checked(log_probs, labels)
    n, num_classes = log_probs.shape
    predicted = log_probs.argmax(1)
    correct = (predicted == labels).sum().double()
    true_counts = torch.bincount(labels, minlength=num_classes).double()
    predicted_counts = torch.bincount(predicted, minlength=num_classes).double()
    covariance = correct * n - true_counts @ predicted_counts
    variances = (n**2 - true_counts @ true_counts) * (n**2 - predicted_counts @ predicted_counts)
    return float(covariance / variances.sqrt()) if variances > 0 else 0.0


def ece(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error of the predicted class, in [0, 1] (Guo et al. 2017, equation 5).

    The sum over bins of (n_bin / n) * |accuracy_bin - confidence_bin| with `num_bins` equal-width bins
    (i / num_bins, (i + 1) / num_bins] of the confidence max_c p_c. `torchmetrics` puts a confidence of exactly 1 in a
    bin of its own, so its number is larger for a model that saturates.
    """
    bins, correct, confidence = confidence_bins(log_probs, labels, num_bins)
    gap = torch.zeros(num_bins, dtype=torch.float64, device=bins.device)
    gap.scatter_add_(0, bins, correct - confidence)
    return float(gap.abs().sum() / len(bins))


def confidence_bins(log_probs: Tensor, labels: Tensor, num_bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """The bin of `ece` that each example falls into (int64), whether it is right (0 or 1), and its confidence, all [n].

    Floating point is float64.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    log_probs, labels = _checked(log_probs, labels)
    top, predicted = log_probs.max(1)
    confidence = top.exp()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    # Only the inner edges, so that a confidence rounded to just above 1 stays in the last bin.
    bins = torch.bucketize(confidence, edges[1:-1])
    return bins, (predicted == labels).double(), confidence


def risk_coverage(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The error rate among the i most confident examples, for i = 1 to n; float64 [n] (El-Yaniv and Wiener 2010).

    Element i - 1 is the risk at coverage i / n, by the confidence max_c p_c. Examples of equal confidence come in no
    order: the risk is its expectation over their permutations, so it does not depend on how the examples are sorted.
    """
    log_probs, labels = _checked(log_probs, labels)
    top, predicted = log_probs.max(1)
    confidence, order = top.sort(descending=True)
    wrong = (predicted != labels)[order].double()
    _, group, size = confidence.unique_consecutive(return_inverse=True, return_counts=True)
    rate = torch.zeros(len(size), dtype=torch.float64, device=wrong.device).scatter_add_(0, group, wrong) / size
    return rate[group].cumsum(0) / torch.arange(1, len(wrong) + 1, dtype=torch.float64, device=wrong.device)


def aurc(log_probs: Tensor, labels: Tensor) -> float:
    """Area under the risk-coverage curve, the mean of `risk_coverage`, in [0, 1] (Geifman et al. 2019).

    Small where the model is right, and where it is less confident when it is wrong.
    """
    return float(risk_coverage(log_probs, labels).mean())


def ood_auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve for telling out-of-distribution examples (positive) by a higher score.

    `scores_in [n]` and `scores_out [m]` are an uncertainty, as the predictive entropy or the mutual information.
    It is the probability that an outside example scores above an inside one, ties counting one half.
    """
    return float(binary_auroc(*_ranked(scores_in, scores_out)))


def ood_aupr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Average precision (area under the precision-recall curve), out-of-distribution examples being the positives.

    Arguments as in `ood_auroc`. A score without information gives m / (n + m).
    """
    return float(binary_average_precision(*_ranked(scores_in, scores_out)))


def report(
    prediction: Prediction, labels: Tensor, ood: Prediction | None = None, num_bins: int = 15
) -> dict[str, float]:
    """All metrics of one test set, by name.

    Keys: accuracy, mcc, nll, brier, ece; with `ood`, the prediction for inputs from elsewhere, also
    ood_auroc_entropy and ood_aupr_entropy, and where more than one sample was averaged
    ood_auroc_mutual_information and ood_aupr_mutual_information (of one sample the mutual information is zero).
    """
    log_probs = prediction.log_probs
    values = {
        "accuracy": accuracy(log_probs, labels),
        "mcc": mcc(log_probs, labels),
        "nll": nll(log_probs, labels),
        "brier": brier(log_probs, labels),
        "ece": ece(log_probs, labels, num_bins),
    }
    if ood is not None:
        scores = ["entropy"]
        if min(int(torch.as_tensor(p.num_samples).min()) for p in (prediction, ood)) > 1:
            scores.append("mutual_information")
        for score in scores:
            inside, outside = getattr(prediction, score), getattr(ood, score)
            values[f"ood_auroc_{score}"] = ood_auroc(inside, outside)
            values[f"ood_aupr_{score}"] = ood_aupr(inside, outside)
    return values


def _checked(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if log_probs.ndim != 2 or labels.ndim != 1 or len(log_probs) != len(labels):
        raise ValueError(
            f"log_probs must be [n, C] and labels [n], got {tuple(log_probs.shape)} and {tuple(labels.shape)}"
        )
    if log_probs.numel() == 0:
        raise ValueError("a metric needs at least one example and one class, got none")
    if not log_probs.is_floating_point() or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"log_probs must be floating point and labels integers, got {log_probs.dtype} and {labels.dtype}"
        )
    log_probs, labels = log_probs.detach().double(), labels.to(log_probs.device).long()
    outside = (labels < 0) | (labels >= log_probs.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"label {int(labels[row])} of example {row} is outside [0, {log_probs.shape[1]})")
    total = log_probs.logsumexp(1)
    unnormalized = ~(total.abs() <= 1e-2)
    if unnormalized.any():
        row = int(unnormalized.nonzero()[0])
        if log_probs[row].isnan().any():
            raise ValueError(f"log_probs of example {row} contain NaN")
        raise ValueError(
            f"the probabilities of example {row} sum to {float(total[row].exp()):.4g}, not 1; "
            "pass log-probabilities (logits.log_softmax(-1)), not logits or probabilities"
        )
    return log_probs, labels


def _ranked(scores_in: Tensor, scores_out: Tensor) -> tuple[Tensor, Tensor]:
    if scores_in.ndim != 1 or scores_out.ndim != 1 or not len(scores_in) or not len(scores_out):
        raise ValueError(
            "scores must be two vectors with at least one example each, "
            f"got {tuple(scores_in.shape)} and {tuple(scores_out.shape)}"
        )
    scores = torch.cat([scores_in.detach().double(), scores_out.detach().to(scores_in.device).double()])
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of the {len(scores)} scores are NaN")
    # torchmetrics applies a sigmoid to scores outside [0, 1], which makes ties of small differences; ranks do not
    # change either area and stay inside.
    ranks = scores.unique(return_inverse=True)[1].double()
    outside = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    outside[len(scores_in) :] = 1
    return ranks / ranks.max().clamp(min=1), outside
