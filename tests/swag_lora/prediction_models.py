"""A small fine-tune with a posterior, for the tests of predictions in chunks, in parts and on many ranks."""

import torch
from posterior_models import step, tiny_peft

from swag_lora import SwagPosterior

FIELDS = ["log_probs", "entropy", "expected_entropy", "mutual_information", "disagreement", "std_error"]


def fine_tune(spread=0.15, **options):
    """Its own seed: every process builds the same one."""
    torch.manual_seed(3)
    model = tiny_peft(**options).eval()
    posterior = SwagPosterior(model, rank=4)
    for _ in range(6):
        step(model, spread)
        posterior.collect()
    return model, posterior


def texts(examples=7, length=6, seed=0):
    ids = torch.randint(20, (examples, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(a, b, exact=True):
    """Every field of two predictions, bit for bit or up to rounding."""
    for name in FIELDS:
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, **tolerance)
    assert torch.equal(torch.as_tensor(a.num_samples), torch.as_tensor(b.num_samples))
