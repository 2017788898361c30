"""Predictions averaged over posterior samples: as many as asked for, or as many as it takes to be sure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .prediction import Prediction
from .predictor import Posterior, Predictor

__all__ = ["Posterior", "Prediction", "Predictor", "predict"]


def predict(
    model: nn.Module,
    posterior: Posterior,
    batch: Mapping[str, Any],
    num_samples: int | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    scale: float = 0.5,
    method: str | None = None,
    samples_per_pass: int | None = None,
    examples_per_pass: int | None = None,
    memory: int | str | None = None,
    tolerance: float | None = None,
    max_samples: int | None = None,
    mesh: DeviceMesh | None = None,
    resume: str | os.PathLike[str] | None = None,
    save_every: int = 8,
) -> Prediction:
    """Average the model's class probabilities over posterior samples, for one batch.

    The model runs in evaluation mode without gradients; neither its mode nor anything else of it changes. Samples go
    through it in chunks, whose weights are drawn and dropped; what precedes the first random module runs once.

    Args:
        model: a PEFT model whose output has logits: [B, C] (classification), [B, choices] (multiple choice) or
            [B, T, C] (language model). For several batches build a `Predictor` once.
        posterior: anything with `draw(num_samples, seed=, first=, scale=, method=)`, as `SwagPosterior`.
        batch: the model's keyword arguments on its device; `labels` is ignored.
        num_samples: S, at least 1; 32 by default.
        seed, first: samples `first`, ..., `first + S - 1` of this seed.
        scale: multiplies the covariance; 0.5 is the paper's, 0 gives the mean weights.
        method: "iid"; "antithetic" for pairs mirrored about the mean, which needs even `num_samples` and `first`; or
            "antithetic+orthogonal", whose pairs have orthogonal z in the low-rank part (see `structured`). None takes
            "antithetic" where both are even and "iid" otherwise.
        samples_per_pass, examples_per_pass: of one forward pass. The same two give the same bits, however many processes
            there are; others the same prediction up to rounding. By default as `memory` and the time that passes take
            allow, see `Predictor.plan`.
        memory: for weights and activations, in bytes or as "4GiB"; by default most of what the device has free.
        tolerance: draw until the Monte-Carlo standard error of every reported probability of an example, as
            `stopping.guarded_std_error` has it, is at most this; examples that are sure leave the batch, and
            `Prediction.num_samples` says when. An antithetic pair counts as one draw.
        max_samples: with `tolerance`, where every example stops; 1024 by default.
        mesh: a `DeviceMesh` with a dimension "samples", "data" or both: the chunks of samples, the parts of the batch,
            are shared out among its ranks, and every rank gets the whole prediction. Each passes the same arguments.
        resume: a file that keeps what has been averaged: a call that was interrupted goes on from there with the same
            digits. It is written after every `save_every` chunks, in one step, and belongs to these arguments.

    Raises:
        ValueError: arguments out of range, a budget that not even one draw fits, more ranks than draws, a posterior
            that differs between ranks, or a `resume` file of another call.
    """
    predictor = Predictor(
        model,
        posterior,
        num_samples,
        seed=seed,
        first=first,
        scale=scale,
        method=method,
        samples_per_pass=samples_per_pass,
        examples_per_pass=examples_per_pass,
        memory=memory,
        tolerance=tolerance,
        max_samples=max_samples,
        mesh=mesh,
        resume=resume,
        save_every=save_every,
        keep_weights=False,
    )
    return predictor(batch)
