"""The baseline: a loop over samples in Python, one forward pass each, as public SWAG code does it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .posterior import SwagPosterior
from .predict import Prediction
from .published import PublishedSwag
from .tasks import Task


class Loop:
    """Predict by setting the model's weights to one sample after another.

    `resampled` is the published algorithm: for every batch and every sample the moments of all tensors are gathered
    and joined, a full-rank sample is drawn with torch's generator, and cut up into the model's parameters. `kept` takes
    weights that are there already. Both overwrite the model's weights.
    """

    def __init__(self, task: Task, model: nn.Module, posterior: SwagPosterior, scale: float) -> None:
        self.task, self.model, self.scale = task, model, scale
        self.parameters = posterior.layout.parameters(model)
        views = posterior.layout.views
        self.swag = PublishedSwag(self.parameters, max_columns=min(int(posterior.count), posterior.rank))
        self.swag.mean = [mean.clone() for mean in views(posterior.mean).values()]
        second = posterior.mean.square() + posterior.std().square()
        self.swag.sq_mean = [square.clone() for square in views(second).values()]
        held = posterior.deviations[: self.swag.max_columns]
        self.swag.cov_mat_sqrt = [rows.flatten(1).clone() for rows in views(held).values()]

    @torch.no_grad()
    def resampled(self, batch: Mapping[str, Tensor], samples: int) -> Prediction:
        logits = []
        for _ in range(samples):
            for parameter, value in zip(self.parameters, self.swag.sample_fullrank(self.scale), strict=True):
                parameter.copy_(value)
            logits.append(self.task.logits(self.model, batch))
        return Prediction.from_logits(torch.stack(logits))

    @torch.no_grad()
    def kept(self, batch: Mapping[str, Tensor], weights: Mapping[str, Tensor], antithetic: bool) -> Prediction:
        logits = []
        for tensors in zip(*weights.values(), strict=True):
            for parameter, value in zip(self.parameters, tensors, strict=True):
                parameter.copy_(value)
            logits.append(self.task.logits(self.model, batch))
        return Prediction.from_logits(torch.stack(logits), antithetic)
