"""Streams logits into a state and compares it with the float64 reference, on any device and back end."""

from contextlib import nullcontext

import torch
from tolerance import assert_as_accurate_as_torch

from swag_kernels import AverageState, backend, bayes_average_

FIELDS = ("log_sum", "m2", "votes", "mean_entropy")


def stream(logits, chunks=None, antithetic=False, name=None, dtype=torch.float32, device="cpu"):
    """By the back end of that name, or by the one that serves the device."""
    state = AverageState(*logits.shape[1:], device=device, antithetic=antithetic, dtype=dtype)
    with backend(name) if name else nullcontext():
        for chunk in logits.to(device).split(chunks or max(len(logits), 1)):
            bayes_average_(state, chunk)
    return state


def check(logits, chunks=None, antithetic=False, device="cpu"):
    out = stream(logits, chunks, antithetic, device=device)
    plain = stream(logits, chunks, antithetic, "reference")
    exact = stream(logits.double(), None, antithetic, "reference", torch.float64)
    assert out.num_samples == exact.num_samples == len(logits)
    compare(out, plain, exact)


def compare(out, plain, exact):
    """m2 by its root, which is in units of a probability: a rounding of p moves it by as much."""
    for field in FIELDS:
        values = [getattr(state, field).cpu() for state in (out, plain, exact)]
        assert_as_accurate_as_torch(*([value.sqrt() for value in values] if field == "m2" else values))
    assert torch.equal(out.votes.cpu().double(), exact.votes)
