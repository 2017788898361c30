"""What precedes the first random module runs on one copy of the rows, and once for all passes over a batch."""

import re

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, LENGTH, samples, scramble

from swag_lora import SampledModel, SwagPosterior

S, B = 5, 3
LATE = ["bert", "roberta", "deberta_v1", "gpt2", "opt", "llama", "mistral", "qwen3", "gemma", "vit", "choice"]


def late(family, **options):
    """LoRA on the last of four layers."""
    options = {"layers_to_transform": [3], "layers_pattern": FAMILIES[family].layers.split(".")[-1]} | options
    model = FAMILIES[family].lora(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def of_layer(computed, index):
    return {n.split(f".{index}.")[-1]: c for n, c in computed.items() if re.search(rf"\.{index}(\.|$)", n)}


def loop(model, weights, batch):
    own = {name: p.detach().clone() for name, p in model.named_parameters() if name in weights}
    logits = []
    for s in range(len(next(iter(weights.values())))):
        for name, value in weights.items():
            model.get_parameter(name).copy_(value[s])
        logits.append(model(**batch).logits)
    for name, value in own.items():
        model.get_parameter(name).copy_(value)
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("family", LATE)
def test_layers_before_the_first_random_one(family):
    model, rows = late(family), B * (4 if family == "choice" else 1)
    weights, batch = samples(model, S), FAMILIES[family].batch(B, "right")
    sampled = SampledModel(model, weights).eval()
    torch.testing.assert_close(sampled(**batch).logits, loop(model, weights, batch), rtol=1e-4, atol=1e-5)
    for index in range(3):
        few = 2 * rows if family == "vit" else rows  # three examples and three channels: two copies tell them apart
        assert set(of_layer(sampled.rows_computed, index).values()) == {few}, "one copy of the rows"
    computed = of_layer(sampled.rows_computed, 3)
    assert max(computed.values()) >= S * rows
    if family == "deberta_v1":  # runs its samples one after the other
        return
    first_reads_shared = [n for n in computed if n.endswith(("query", "q_proj", "in_proj", "key", "k_proj"))]
    assert all(computed[n] in (rows, few) for n in first_reads_shared), (
        "what reads the shared rows has them once, random or not"
    )


@torch.no_grad()
@pytest.mark.parametrize("family", LATE)
def test_once_for_all_passes_over_a_batch(family):
    model = late(family)
    weights, batch = samples(model, 2 * S + 1), FAMILIES[family].batch(B, "left")
    sampled = SampledModel(model, {name: w[:S] for name, w in weights.items()}).eval()
    logits, rows = [], []
    with sampled.same_batch():
        for part in (slice(0, S), slice(S, 2 * S), slice(2 * S, None)):
            sampled.set_weights({name: w[part] for name, w in weights.items()})
            logits.append(sampled(**batch).logits)
            rows.append(sum(of_layer(sampled.rows_computed, 0).values()))
    torch.testing.assert_close(torch.cat(logits), loop(model, weights, batch), rtol=1e-4, atol=1e-5)
    assert rows[0] > 0 and rows[1] == rows[0], "nothing runs again"
    assert rows[2] <= 2 * rows[0], "a single sample may run it once more: it cannot tell which tensors have a batch"
    sampled(**batch)
    assert sum(of_layer(sampled.rows_computed, 0).values()) > rows[2], "nothing is kept afterwards"


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 4, LENGTH])
@pytest.mark.parametrize("num_samples", [LENGTH, 2 * LENGTH, 24, 12])
def test_as_many_rows_as_tokens_or_features(num_samples, batch_size):
    """S * B is also the length of the text, of a table or of a layer: a look ahead with another S tells the rows apart."""
    model = late("bert")
    weights, batch = samples(model, num_samples), FAMILIES["bert"].batch(batch_size, "right")
    sampled = SampledModel(model, weights).eval()
    torch.testing.assert_close(sampled(**batch).logits, loop(model, weights, batch), rtol=1e-4, atol=1e-5)
    for passes in (1, 2, 3):
        rows = set(of_layer(sampled.rows_computed, 1).values())
        assert max(rows) <= passes * max(2 * batch_size, 8), f"{rows} rows, {num_samples * batch_size} were not needed"
        sampled(**batch)


def test_a_random_head_alone():
    """1000 samples of a head: the encoder runs once for the rows of the batch, and nothing is copied S times."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = get_peft_model(
        hf.BertForSequenceClassification(config),
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"]),
    )
    model = scramble(model).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    posterior = SwagPosterior(model, rank=0)
    for _ in range(2):
        scramble(model)
        posterior.collect()
    batch = FAMILIES["bert"].batch(B, "right")
    sampled = SampledModel(model, posterior.draw(100)).eval()
    largest = 0
    with torch.no_grad(), sampled.same_batch():
        for first in range(0, 1000, 100):
            weights = posterior.draw(100, first=first)
            sampled.set_weights(weights)
            with LargestTensor() as made:
                logits = sampled(**batch).logits
            largest = max(largest, made.elements) if first else 0
            torch.testing.assert_close(logits, loop(model, weights, batch), rtol=1e-4, atol=1e-5)
    computed = sampled.rows_computed
    assert {c for n, c in computed.items() if n.endswith("bert")} == {B}
    assert largest <= 100 * B * 24, "the hidden states of all tokens were copied for every sample"


def test_another_batch_within_same_batch():
    model = late("bert")
    sampled = SampledModel(model, samples(model, 2)).eval()
    batch = FAMILIES["bert"].batch(B, "right")
    with torch.no_grad():
        with sampled.same_batch():
            sampled(**batch)
            with pytest.raises(ValueError, match="same batch"):
                sampled(**FAMILIES["bert"].batch(B, "right"))
        other = FAMILIES["bert"].batch(B, "right")
        torch.testing.assert_close(
            sampled(**other).logits, loop(model, samples_of(sampled), other), rtol=1e-4, atol=1e-5
        )


def test_with_gradients_nothing_is_kept():
    model = late("bert")
    weights = {name: w.requires_grad_() for name, w in samples(model, 2).items()}
    sampled, batch = SampledModel(model, weights).eval(), FAMILIES["bert"].batch(B, "right")
    with sampled.same_batch():
        for _ in range(2):
            sampled(**batch).logits.sum().backward()
    assert all(w.grad is not None for w in weights.values())
    assert set(of_layer(sampled.rows_computed, 0).values()) == {2 * B}


def samples_of(sampled):
    return dict(sampled.weights)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of a tensor with memory of its own that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result
