"""Averages against the formulas written out in float64, over a model small enough to loop by hand."""

import copy
import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from swag_lora.posterior import SwagPosterior
from swag_lora.predict import Prediction, Predictor, predict

FIELDS = ["log_probs", "entropy", "expected_entropy", "mutual_information", "disagreement", "std_error"]


class Head(nn.Module):
    """logits = x W^T for one random matrix W [C, 6]; `axes` adds axes between the batch and the classes."""

    def __init__(self, axes=(), num_classes=4):
        super().__init__()
        self.axes = axes
        self.weight = nn.Parameter(torch.randn(num_classes, 6))


class SampledHead(nn.Module):
    seen: list = []

    def __init__(self, model, weights):
        super().__init__()
        self.weights, self.axes = weights, model.axes

    def set_weights(self, weights):
        self.weights = weights

    def release_weights(self):
        self.weights = None

    def same_batch(self):
        return nullcontext()

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        weight = self.weights["weight"]
        self.seen.append(len(weight))
        return SimpleNamespace(logits=torch.einsum("b...i,sci->sb...c", x, weight))


class GaussianHead:
    """A posterior over W with the contract of `SwagPosterior.draw`."""

    def __init__(self, model, spread=1.0):
        self.mean, self.spread = model.weight.detach().clone(), spread
        self.calls = []

    def draw(self, num_samples, *, seed, first, scale, method):
        self.calls.append((num_samples, seed, first, scale, method))
        rows = []
        for k in range(first, first + num_samples):
            pair, sign = (k // 2, 1 - 2 * (k % 2)) if method == "antithetic" else (k, 1)
            noise = torch.randn(self.mean.shape, generator=torch.Generator().manual_seed(10007 * seed + pair))
            rows.append(self.mean + sign * scale**0.5 * self.spread * noise)
        return {"weight": torch.stack(rows)}


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(importlib.import_module("swag_lora.predictor"), "SampledModel", SampledHead)
    SampledHead.seen = []
    return Head()


def by_hand(logits, pairs=False):
    """Every field from logits [S, B, C], in float64."""
    p = logits.double().softmax(-1)
    mean = p.mean(0)
    draws = p.unflatten(0, (-1, 2)).mean(1) if pairs else p
    expected = -(p * p.log()).sum(-1).mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    return {
        "log_probs": mean.log(),
        "entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": entropy - expected,
        "disagreement": (p.argmax(-1) != mean.argmax(-1)).double().mean(0),
        "std_error": ((draws - mean).square().sum(0) / (len(draws) * (len(draws) - 1.0))).sqrt()
        if len(draws) > 1
        else torch.full_like(mean, torch.nan),
    }


def assert_equal_fields(a, b):
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)
    assert a.num_samples == b.num_samples


@pytest.mark.parametrize("num_samples", [1, 2, 7, 32])
def test_against_a_loop(head, num_samples):
    posterior, x = GaussianHead(head), torch.randn(5, 6)
    prediction = predict(head, posterior, {"x": x, "labels": torch.zeros(5)}, num_samples, seed=3)
    method = "iid" if num_samples % 2 else "antithetic"
    assert posterior.calls == [(num_samples, 3, 0, 0.5, method)]
    weights = posterior.draw(num_samples, seed=3, first=0, scale=0.5, method=method)
    logits = torch.stack([x.double() @ w.double().T for w in weights["weight"]])
    expected = by_hand(logits, pairs=method == "antithetic")
    for name in FIELDS:
        value = getattr(prediction, name)
        assert value.dtype == torch.float32 and not value.requires_grad
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=2e-6, equal_nan=True)
    assert prediction.num_samples == num_samples and len(prediction) == 5
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(5))
    assert torch.equal(prediction.predicted, expected["log_probs"].argmax(-1))


def test_mean_of_softmax_not_softmax_of_mean(head):
    """Two confident samples that disagree, 2:1 in votes and 1:2 in summed logits."""
    logits = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]], [[0.0, 30.0]]])
    prediction = Prediction.from_logits(logits)
    assert prediction.predicted.item() == 0 and logits.mean(0).argmax().item() == 1
    torch.testing.assert_close(prediction.disagreement, torch.tensor([1 / 3]))
    torch.testing.assert_close(prediction.probs[0, 1], (2 / (1 + torch.tensor(4.0).exp()) + 1) / 3)


def test_entropies_decompose(head):
    prediction = predict(head, GaussianHead(head), {"x": torch.randn(50, 6)}, 16)
    torch.testing.assert_close(
        prediction.entropy, prediction.expected_entropy + prediction.mutual_information, rtol=0, atol=1e-6
    )
    assert (prediction.mutual_information > 1e-3).all()
    at_the_mean = predict(head, GaussianHead(head), {"x": torch.randn(50, 6)}, 16, scale=0)
    assert (at_the_mean.mutual_information < 1e-6).all() and (at_the_mean.std_error < 1e-7).all()
    assert (at_the_mean.disagreement == 0).all()


@pytest.mark.parametrize("method", ["iid", "antithetic"])
def test_std_error_is_the_spread_over_repetitions(head, method):
    """Mean squared standard error against the variance of the estimate over 600 seeds; 4 sigma is about 25 %."""
    posterior, batch = GaussianHead(head, spread=0.7), {"x": torch.randn(3, 6)}
    runs = [predict(head, posterior, batch, 8, seed=seed, method=method) for seed in range(600)]
    observed = torch.stack([run.probs for run in runs]).var(0)
    claimed = torch.stack([run.std_error for run in runs]).square().mean(0)
    torch.testing.assert_close(claimed, observed, rtol=0.25, atol=0)


def test_antithetic_pairs_reduce_the_error(head):
    posterior, batch = GaussianHead(head, spread=0.3), {"x": torch.randn(20, 6)}
    iid = predict(head, posterior, batch, 64, method="iid").std_error.mean()
    assert predict(head, posterior, batch, 64).std_error.mean() < 0.5 * iid


@pytest.mark.parametrize(("method", "step"), [("iid", 1), ("iid", 5), ("antithetic", 2), ("antithetic", 6)])
def test_chunks(head, method, step):
    posterior, batch = GaussianHead(head), {"x": torch.randn(5, 6)}
    whole = predict(head, posterior, batch, 16, first=4, method=method)
    SampledHead.seen.clear()
    parts = predict(head, posterior, batch, 16, first=4, method=method, samples_per_pass=step)
    assert SampledHead.seen == [min(step, 16 - start) for start in range(0, 16, step)]
    for name in FIELDS:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert parts.num_samples == 16
    again = predict(head, posterior, batch, 16, first=4, method=method, samples_per_pass=step)
    assert_equal_fields(parts, again)


def test_predictor_draws_once(head):
    posterior, batches = GaussianHead(head), [{"x": torch.randn(n, 6)} for n in (3, 2)]
    predictor = Predictor(head, posterior, 6, seed=1)
    parts = [predictor(batch) for batch in batches]
    assert len(posterior.calls) == 1
    assert_equal_fields(parts[1], predict(head, posterior, batches[1], 6, seed=1))

    joined = Prediction.cat(parts)
    assert len(joined) == 5 and joined.num_samples == 6
    assert_equal_fields(Prediction.cat([joined]), joined)
    whole = predict(head, posterior, {"x": torch.cat([batch["x"] for batch in batches])}, 6, seed=1)
    for name in FIELDS:
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "counts"), [("iid", (1, 3, 4, 9, 16)), ("antithetic", (2, 6, 8, 16))])
@pytest.mark.parametrize("examples", [None, 2])
def test_after_several_counts(head, method, counts, examples):
    """Each as if it were the number asked for, in one go over the samples of the last."""
    posterior, batch = GaussianHead(head), {"x": torch.randn(5, 6), "labels": torch.zeros(5)}
    named = {"seed": 2, "first": 4, "method": method, "examples_per_pass": examples}
    found = Predictor(head, posterior, 16, samples_per_pass=4, **named).at(batch, counts)
    assert sum(SampledHead.seen) == 16 * (1 if examples is None else 3)
    assert [prediction.num_samples for prediction in found] == list(counts)
    for count, prediction in zip(counts, found, strict=True):
        alone = predict(head, posterior, batch, count, **named)
        for name in FIELDS:
            torch.testing.assert_close(
                getattr(prediction, name), getattr(alone, name), rtol=1e-5, atol=1e-6, equal_nan=True
            )


def test_counts_where_chunks_end_leave_the_bits(head):
    posterior, batch = GaussianHead(head), {"x": torch.randn(5, 6)}
    predictor = Predictor(head, posterior, 16, samples_per_pass=4)
    eight, twelve = predictor.at(batch, (8, 12))
    assert_equal_fields(predictor.at(batch, (4, 8, 16))[-1], predictor(batch))
    assert_equal_fields(eight, predict(head, posterior, batch, 8, samples_per_pass=4))
    assert_equal_fields(twelve, predict(head, posterior, batch, 12, samples_per_pass=4))


def test_counts_that_do_not_fit(head, tmp_path):
    posterior, batch = GaussianHead(head), {"x": torch.randn(2, 6)}
    predictor = Predictor(head, posterior, 8)
    for counts in ((), (4, 2), (2, 2), (2, 10)):
        with pytest.raises(ValueError, match="counts must ascend, up to num_samples=8"):
            predictor.at(batch, counts)
    with pytest.raises(ValueError, match=r"counts must be even, got \[2, 3\]"):
        predictor.at(batch, (2, 3))
    with pytest.raises(ValueError, match="a count must be at least 1"):
        predictor.at(batch, (0, 2))
    with pytest.raises(TypeError, match="a count must be an integer"):
        predictor.at(batch, (2.0, 4))
    with pytest.raises(TypeError, match="batch must map"):
        predictor.at(torch.randn(2, 6), (2,))
    for named in ({"tolerance": 0.01}, {"num_samples": 8, "resume": tmp_path / "file"}):
        with pytest.raises(ValueError, match="without tolerance, mesh and resume"):
            Predictor(head, posterior, **named).at(batch, (2, 4))


def test_method_defaults(head):
    posterior, batch = GaussianHead(head), {"x": torch.randn(2, 6)}
    for num_samples, first in [(4, 0), (3, 0), (4, 2), (4, 1)]:
        predict(head, posterior, batch, num_samples, first=first)
    assert [call[-1] for call in posterior.calls] == ["antithetic", "iid", "antithetic", "iid"]


@pytest.mark.parametrize("shape", [(2, 5), (3, 1)])
def test_further_axes(head, shape):
    x = torch.randn(*shape, 6)
    prediction = predict(head, GaussianHead(head), {"x": x}, 4)
    flat = predict(head, GaussianHead(head), {"x": x.reshape(-1, 6)}, 4)
    assert prediction.log_probs.shape == prediction.std_error.shape == (*shape, 4)
    for name in FIELDS:
        assert torch.equal(getattr(prediction, name).flatten(), getattr(flat, name).flatten())
    assert prediction.entropy.shape == prediction.predicted.shape == shape


def test_point_estimate_from_logits():
    logits = torch.randn(7, 3)
    prediction = Prediction.from_logits(logits[None])
    torch.testing.assert_close(prediction.log_probs, logits.log_softmax(-1))
    assert (prediction.mutual_information < 1e-6).all() and prediction.std_error.isnan().all()
    assert prediction.num_samples == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_other_types(dtype):
    logits = torch.randn(4, 6, 5).to(dtype)
    prediction = Prediction.from_logits(logits, antithetic=True)
    expected = by_hand(logits, pairs=True)
    exact = dtype == torch.float64
    assert prediction.log_probs.dtype == (torch.float64 if exact else torch.float32)
    for name in FIELDS:
        value = getattr(prediction, name).double()
        torch.testing.assert_close(value, expected[name], rtol=1e-12 if exact else 1e-5, atol=1e-6)


def test_to_moves_every_tensor(head):
    prediction = predict(head, GaussianHead(head), {"x": torch.randn(2, 6)}, 4)
    moved = prediction.to("meta")
    assert all(getattr(moved, name).is_meta for name in FIELDS) and moved.num_samples == 4
    assert_equal_fields(prediction.to("cpu"), prediction)


def test_bad_arguments(head):
    posterior, batch = GaussianHead(head), {"x": torch.randn(2, 6)}
    for arguments, message in [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 4, "first": -1}, "first must be at least 0"),
        ({"num_samples": 4, "scale": -0.5}, "scale must be at least 0"),
        ({"num_samples": 4, "scale": float("nan")}, "scale must be at least 0"),
        ({"num_samples": 3, "method": "antithetic"}, "must be even, got 3 and 0"),
        ({"num_samples": 4, "first": 1, "method": "antithetic"}, "must be even, got 4 and 1"),
        ({"num_samples": 4, "method": "sobol"}, "one of 'iid', 'antithetic', 'antithetic.orthogonal', got 'sobol'"),
        ({"num_samples": 4, "samples_per_pass": 0}, "samples_per_pass must be at least 1"),
        ({"num_samples": 4, "samples_per_pass": 3}, "even for antithetic"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(head, posterior, batch, **arguments)
    assert posterior.calls == []
    with pytest.raises(TypeError, match="batch must map"):
        predict(head, posterior, torch.randn(2, 6))
    with pytest.raises(ValueError, match="sample axis"):
        Prediction.from_logits(torch.randn(2, 3))


def test_cat_refuses_what_does_not_belong_together():
    two, four = (Prediction.from_logits(torch.randn(s, 3, 5)) for s in (2, 4))
    with pytest.raises(ValueError, match=r"sample counts cannot be joined: \[2, 4\]"):
        Prediction.cat([two, four])
    with pytest.raises(ValueError, match="no predictions"):
        Prediction.cat([])


def test_model_without_logits(head, monkeypatch):
    monkeypatch.setattr(SampledHead, "forward", lambda self, x: SimpleNamespace(last_hidden_state=x))
    with pytest.raises(TypeError, match="no logits"):
        predict(head, GaussianHead(head), {"x": torch.randn(2, 6)}, 2)


def tiny(kind="classifier"):
    """A PEFT model in training mode with dropout, a posterior of five collections, and a batch for it."""
    torch.manual_seed(0)
    bert = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "num_labels": 3,
    }  # fmt: skip
    if kind == "lm":
        base = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16))
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], lora_dropout=0.2, fan_in_fan_out=True)
    else:
        build = BertForMultipleChoice if kind == "choice" else BertForSequenceClassification
        base = build(BertConfig(**bert))
        lora = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.2, modules_to_save=["classifier"])
    model = get_peft_model(base, lora).train()
    posterior = SwagPosterior(model, rank=4)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        posterior.collect()
    tokens = torch.randint(0, 40, (3, 4, 7) if kind == "choice" else (3, 7))
    mask = torch.ones_like(tokens)
    mask[1, ..., 5:] = 0
    return model, posterior, {"input_ids": tokens, "attention_mask": mask}


def fingerprint(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["classifier", "choice", "lm"])
def test_peft_model_against_one_forward_a_sample(kind):
    model, posterior, batch = tiny(kind)
    before = fingerprint(model)
    prediction = predict(model, posterior, {**batch, "labels": torch.tensor([0, 1, 2])}, 6, seed=2)

    weights = posterior.draw(6, seed=2)
    logits = []
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for i in range(6):
            logits.append(torch.func.functional_call(twin, weights.sample(i), kwargs=batch).logits)
    expected = by_hand(torch.stack(logits), pairs=True)
    shape = {"classifier": (3, 3), "choice": (3, 4), "lm": (3, 7, 40)}[kind]
    assert prediction.log_probs.shape == shape and prediction.mutual_information.max() > 1e-3
    for name in FIELDS:
        torch.testing.assert_close(getattr(prediction, name).double(), expected[name], rtol=1e-4, atol=1e-5)

    after = fingerprint(model)
    assert model.training and before[1:] == after[1:]
    assert before[0].keys() == after[0].keys() and all(torch.equal(before[0][k], after[0][k]) for k in before[0])


def test_peft_model_predictor():
    model, posterior, batch = tiny()
    predictor = Predictor(model, posterior, 8, samples_per_pass=4)
    prediction = predictor(batch)
    assert_equal_fields(prediction, predict(model, posterior, batch, 8, samples_per_pass=4))
    whole = predict(model, posterior, batch, 8)
    for name in FIELDS:
        torch.testing.assert_close(getattr(prediction, name), getattr(whole, name), rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    posterior.collect()
    assert_equal_fields(predictor(batch), prediction)
    assert not torch.equal(predict(model, posterior, batch, 8).probs, whole.probs)
    with pytest.raises(RuntimeError, match="nothing collected yet"):
        predict(model, SwagPosterior(model), batch, 4)
