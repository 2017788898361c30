"""K samples in one pass through MiniLM with LoRA, against the loop that everybody runs."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from harness import alternate, compare
from swag_lora import Prediction, Predictor, SwagPosterior, predict
from swag_lora.demo import encoder
from swag_lora.published import PublishedSwag

SAMPLES, LENGTH, RANK = 16, 32, 20

logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def fine_tune():
    """MiniLM with LoRA on query and value, and posteriors of both kinds from the same 20 collections."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=4)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(model, config).eval()
    random = [p for p in model.parameters() if p.requires_grad]
    posterior, published = SwagPosterior(model, rank=RANK), PublishedSwag(random, RANK)
    for _ in range(RANK):
        with torch.no_grad():
            for param in random:
                param.add_(0.02 * torch.randn_like(param))
        posterior.collect()
        published.collect(random)
    return model, random, posterior, published


@torch.no_grad()
def forward_loop(model, random, samples, batch):
    """Set each sample's weights and run the whole model: K forward passes."""
    logits = []
    for sample in samples:
        for param, value in zip(random, sample, strict=True):
            param.data = value
        logits.append(model(**batch).logits)
    return Prediction.from_logits(torch.stack(logits))


@pytest.mark.parametrize("batch_size", [1, 16])
def bench_one_pass(fine_tune, report, benchmark, batch_size):
    model, random, posterior, published = fine_tune
    batch = {
        "input_ids": torch.randint(1000, 20000, (batch_size, LENGTH)),
        "attention_mask": torch.ones(batch_size, LENGTH, dtype=torch.int64),
    }
    trained = [param.data for param in random]
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    weights = posterior.draw(SAMPLES, seed=0)
    prebuilt = [[weights[name][s] for name in names] for s in range(SAMPLES)]
    predictor, halves = Predictor(model, posterior, SAMPLES), Predictor(model, posterior, SAMPLES, samples_per_pass=8)

    def published_loop():
        return forward_loop(model, random, (published.sample_fullrank(0.5) for _ in range(SAMPLES)), batch)

    def prebuilt_loop():
        return forward_loop(model, random, prebuilt, batch)

    try:
        torch.testing.assert_close(predictor(batch).probs, prebuilt_loop().probs, rtol=1e-4, atol=1e-5)
        seconds = alternate(
            {
                "one pass": lambda: predictor(batch),
                "passes of 8 samples": lambda: halves(batch),
                "published loop (resample, K forwards)": published_loop,
                "loop with prebuilt weights": prebuilt_loop,
            },
            rounds=9,
        )
        fresh = alternate(
            {
                "one pass": lambda: predict(model, posterior, batch, SAMPLES),
                "published loop (resample, K forwards)": published_loop,
            },
            rounds=9,
        )
        case = f"predict, MiniLM LoRA, K={SAMPLES}, batch {batch_size}, seq {LENGTH}"
        report(
            compare(case, seconds, "one pass", {"published loop (resample, K forwards)": 1.0})
            + compare(f"{case}, drawing anew", fresh, "one pass", {"published loop (resample, K forwards)": 1.0})
        )
        benchmark.pedantic(predictor, args=(batch,), rounds=5, warmup_rounds=1)
    finally:
        for param, value in zip(random, trained, strict=True):
            param.data = value
