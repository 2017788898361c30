"""Where the sample axis begins late: random weights in the last layers of an encoder, or in its head alone."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from harness import alternate, compare
from swag_lora import Predictor, SampledModel, SwagPosterior

SAMPLES, LENGTH, VOCABULARY = 32, 32, 5000
HEAD_SAMPLES, HEAD_LENGTH, HEAD_BATCH = 1000, 64, 16
CONFIG = BertConfig(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    vocab_size=VOCABULARY,
    num_labels=4,
)

logging.set_verbosity_error()


@torch.no_grad()
def posterior_of(model) -> SwagPosterior:
    posterior = SwagPosterior(model, rank=8)
    for _ in range(8):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
        posterior.collect()
    return posterior


def text(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (batch_size, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2])
def bench_last_quarter(batch_size, report, benchmark):
    """LoRA on the last 3 of 12 layers: 9 layers run once, not 32 times."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=[9, 10, 11])
    model = get_peft_model(BertForSequenceClassification(CONFIG), lora).eval()
    sampled = SampledModel(model, posterior_of(model).draw(SAMPLES)).eval()
    batch = text(batch_size, LENGTH)

    def late():
        return sampled(**batch).logits

    def from_the_start():
        return sampled(**batch, output_hidden_states=True).logits  # every layer's states, for every sample

    torch.testing.assert_close(late(), from_the_start(), rtol=1e-4, atol=1e-5)
    before = sampled.rows_computed
    late()
    rows = {name: count - before[name] for name, count in sampled.rows_computed.items()}
    seconds = alternate({"axis from layer 9": late, "axis from the start": from_the_start}, rounds=7)
    case = f"12-layer encoder, LoRA on the last quarter, K={SAMPLES}, batch {batch_size} × {LENGTH} tokens"
    table = Table(title=f"rows computed, {case}", title_justify="left")
    for name in ("layers", "rows"):
        table.add_column(name)
    for layers in (range(9), range(9, 12)):
        of_layers = [c for n, c in rows.items() if any(re.search(rf"layer\.{i}(\.|$)", n) for i in layers)]
        most = max(of_layers)
        table.add_row(f"{layers.start} – {layers.stop - 1}", str(most))
    report(compare(case, seconds, "axis from layer 9", {"axis from the start": 3.0}), table)
    benchmark.pedantic(late, rounds=3, warmup_rounds=1)


@torch.no_grad()
def bench_head_alone(report, benchmark):
    """1000 samples of a classifier: the encoder runs once."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(BertForSequenceClassification(CONFIG), lora).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    posterior, batch = posterior_of(model), text(HEAD_BATCH, HEAD_LENGTH)
    predictor = Predictor(model, posterior, HEAD_SAMPLES, samples_per_pass=100, keep_weights=False)

    def plain():
        return model(**batch).logits

    posterior.load_mean()
    spread = predictor(batch)
    assert (spread.probs - plain().softmax(-1)).abs().max() < 0.2, "another model"
    seconds = alternate({"1000 samples of the head": lambda: predictor(batch), "one plain forward": plain}, rounds=7)
    case = f"12-layer encoder, K={HEAD_SAMPLES} samples of its head, batch {HEAD_BATCH} × {HEAD_LENGTH} tokens"
    report(compare(case, seconds, "1000 samples of the head", {"one plain forward": 1 / 1.5}))
    benchmark.pedantic(lambda: predictor(batch), rounds=3, warmup_rounds=1)
