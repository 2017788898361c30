"""bayes_average_ over classifier and vocabulary sizes, against the stacked softmax that everybody writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness import alternate, assert_as_accurate, compare, copy_bandwidth, limit
from swag_kernels import AverageState, bayes_average_

STACKED = "stack → softmax → mean, entropies"
GIVEN = "softmax → mean, entropies"


def plain_average(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Averaged probabilities, predictive entropy and expected entropy of probabilities ``[S, B, C]``."""
    mean = probs.mean(0)
    return mean, torch.special.entr(mean).sum(-1), torch.special.entr(probs).sum(-1).mean(0)


def averaged(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    state = AverageState(*logits.shape[1:])
    bayes_average_(state, logits)
    return state.probs(), state.entropy(), state.expected_entropy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples, batch, classes", [(32, 1, 150), (32, 64, 150), (32, 1, 128_256), (32, 8, 128_256)])
def bench_bayes_average(dtype, samples, batch, classes, report, benchmark):
    logits = (3 * torch.randn(samples, batch, classes)).to(dtype)
    members = list(logits.clone())

    def ours():
        return averaged(logits)

    def stacked():
        return plain_average(torch.stack(members).softmax(-1, dtype=torch.float32))

    def given():
        return plain_average(logits.softmax(-1, dtype=torch.float32))

    # The timed rows with as many others as it takes for plain torch's largest error to be a typical one.
    rows = logits if classes > 1000 else torch.cat((logits, torch.randn(samples, 64, classes).to(dtype)), dim=1)
    exact = plain_average(rows.double().softmax(-1))
    plain = plain_average(rows.softmax(-1, dtype=torch.float32))
    for out, theirs, truth in zip(averaged(rows), plain, exact, strict=True):
        assert_as_accurate(out, theirs, truth, "bayes_average_")
    del rows, exact, plain

    functions = {"bayes_average_": ours, STACKED: stacked, GIVEN: given}
    seconds = alternate(functions, rounds=301 if batch * classes < 1e5 else 9)
    case = f"bayes_average_ {str(dtype)[6:]} S={samples} B={batch} C={classes}"
    state_bytes = (
        4 * batch * classes * 4 * 2
    )  # log_sum, m2 and votes read and written, and the same again to make and read them
    moved = 2 * logits.numel() * logits.element_size() + state_bytes
    report(
        compare(case, seconds, "bayes_average_", {STACKED: 3.0})
        + [limit(case, "bytes at copy bandwidth", seconds["bayes_average_"], moved / copy_bandwidth())]
    )
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
