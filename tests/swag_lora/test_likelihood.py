"""Averaged token likelihoods against a plain loop over samples, and what they hold in memory."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from language_models import BUILD, HIDDEN, VOCAB, Given, assert_frozen, entropy, frozen, given, loop, lora, prompts
from peft import LoraConfig, get_peft_model
from posterior_models import tiny_peft
from tiny_models import FAMILIES, samples
from torch.utils._python_dispatch import TorchDispatchMode

from swag_lora import SwagPosterior
from swag_lora.likelihood import TokenLogProbs, log_probs
from swag_lora.predict import Prediction

SAMPLES = 4
FIELDS = ("log_probs", "entropy", "expected_entropy", "mutual_information")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def expected(model, weights, batch, labels=None):
    """The fields of `TokenLogProbs` by plain forwards over each row alone, without its padding."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    fields = {name: torch.zeros(ids.shape, dtype=torch.float64) for name in FIELDS}
    for row in range(len(ids)):
        where = mask[row].nonzero().squeeze(1)
        probs = loop(model, weights, ids[row, where])
        for here, position in enumerate(where[1:].tolist()):
            label = int(ids[row, position] if labels is None else labels[row, position])
            if label == -100:
                continue
            mean, own = probs[:, here].mean(0), entropy(probs[:, here]).mean()
            values = mean[label].log(), entropy(mean), own, entropy(mean) - own
            for name, value in zip(FIELDS, values, strict=True):
                fields[name][row, position] = value
    return fields


def check(result, fields):
    assert isinstance(result, TokenLogProbs)
    for name in FIELDS:
        torch.testing.assert_close(getattr(result, name), fields[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(result.mask, fields["log_probs"] != 0)
    torch.testing.assert_close(result.sequence_log_probs, fields["log_probs"].sum(1), **CLOSE)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", BUILD)
def test_equals_the_loop(name, padding):
    model, batch = lora(name), prompts(padding)
    posterior = given(model, SAMPLES)
    fields = expected(model, posterior.weights, batch)
    assert fields["mutual_information"].max() > 1e-3, "the samples do not differ"
    check(log_probs(model, posterior, **batch, num_samples=SAMPLES), fields)
    assert posterior.asked == [(0, SAMPLES, "antithetic")]
    check(log_probs(model, posterior, **batch, num_samples=SAMPLES, max_logits=10, samples_per_pass=2), fields)
    assert {call for call in posterior.asked[1:]} == {(0, 2, "antithetic"), (2, 2, "antithetic")}


@pytest.mark.parametrize(
    "options", [{"max_logits": 3}, {"max_logits": 3 * VOCAB}, {"samples_per_pass": 1, "max_logits": 7}]
)
def test_blocks_and_passes_change_nothing(options):
    model, batch = lora("llama"), prompts("left")
    posterior = given(model, 5)
    part = Given({name: tensor[2:] for name, tensor in posterior.weights.items()})
    result = log_probs(model, posterior, **batch, num_samples=3, first=2, **options)
    check(result, expected(model, part.weights, batch))
    assert all(call[2] == "iid" for call in posterior.asked)


RANDOM_HEADS = {
    "saved": ("llama", {"modules_to_save": ["lm_head"]}),
    "lora": ("qwen3", {"target_modules": ["q_proj", "lm_head"]}),
    "lora with bias": ("llama", {"target_modules": ["lm_head"], "lora_bias": True}),
    "saved alone, softcapped": ("gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("head", RANDOM_HEADS)
def test_random_head(head):
    name, options = RANDOM_HEADS[head]
    model, batch = lora(name, **options), prompts("right")
    weights = samples(model, SAMPLES)
    assert any("lm_head" in name for name in weights)
    if head.startswith("saved alone"):
        weights = {name: tensor for name, tensor in weights.items() if "lm_head" in name}
    fields = expected(model, weights, batch)
    check(log_probs(model, Given(weights), **batch, num_samples=SAMPLES), fields)
    check(log_probs(model, Given(weights), **batch, num_samples=SAMPLES, samples_per_pass=2, max_logits=14), fields)
    answers = torch.tensor([[3, 40, 7], [50, 2, 11], [7, 8, 9]])
    chosen = log_probs(model, Given(weights), **batch, num_samples=SAMPLES, answers=answers)
    torch.testing.assert_close(chosen.log_probs, candidates(model, weights, batch, answers).mean(1).log(), **CLOSE)


def test_trained_embedding_that_is_also_the_head():
    model = BUILD["gpt2"]().double().eval()
    weights = {"transformer.wte.weight": samples(model, 2)["transformer.wte.weight"]}
    batch = prompts("right")
    check(log_probs(model, Given(weights), **batch, num_samples=2, max_logits=30), expected(model, weights, batch))


def test_labels():
    model, batch = lora("llama"), prompts("right")
    posterior = given(model, 2)
    labels = torch.randint(0, VOCAB, batch["input_ids"].shape)
    labels[0, 2], labels[1], labels[2, -1] = -100, -100, -100
    result = log_probs(model, posterior, labels=labels, **batch, num_samples=2)
    check(result, expected(model, posterior.weights, batch, labels))
    assert result.mask.sum() == 8 and not result.mask[1].any()


def candidates(model, weights, batch, answers):
    """Each sample's softmax over the candidates alone, ``[B, S, A]``."""
    rows = []
    for ids, mask, own in zip(batch["input_ids"], batch["attention_mask"].bool(), answers, strict=True):
        probs = loop(model, weights, ids[mask])[:, -1, own]
        rows.append(probs / probs.sum(-1, keepdim=True))
    return torch.stack(rows)


class Watch(TorchDispatchMode):
    """The size of the largest tensor made, and the widths of all matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.widths = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
                    self.widths.add(tensor.shape[-1])
        return result


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_answers(name, padding):
    model, batch = lora(name), prompts(padding)
    posterior = given(model, SAMPLES)
    shared, own = torch.tensor([5, 30, 17]), torch.tensor([[5, 30], [17, 5], [44, 2]])
    for answers, distinct in ((shared, 3), (own, 5)):
        with Watch() as watch:
            result = log_probs(model, posterior, **batch, num_samples=SAMPLES, answers=answers, samples_per_pass=2)
        probs = candidates(model, posterior.weights, batch, answers.expand(3, -1))
        assert isinstance(result, Prediction) and result.num_samples == SAMPLES
        torch.testing.assert_close(result.probs, probs.mean(1), **CLOSE)
        torch.testing.assert_close(result.expected_entropy, entropy(probs).mean(1), **CLOSE)
        pairs = probs.unflatten(1, (-1, 2)).mean(2)
        torch.testing.assert_close(result.std_error, pairs.std(1) / 2**0.5, **CLOSE)
        assert VOCAB not in watch.widths and distinct in watch.widths, "other rows of the head were computed"


def test_memory_is_bounded_whatever_the_number_of_samples():
    vocabulary, limit, rows, length = 4001, 20_000, 3, 6
    config = hf.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=4,
    )
    model = get_peft_model(hf.LlamaForCausalLM(config), LoraConfig(r=1, target_modules=["q_proj"])).eval()
    ids = torch.randint(0, vocabulary, (rows, length))
    posterior = given(model, 16)

    def peak(num_samples, **options):
        arguments = {"num_samples": num_samples, "max_logits": limit, **options}
        first = log_probs(model, posterior, ids, **arguments)  # draws, which the posterior keeps
        with Watch() as watch:
            again = log_probs(model, posterior, ids, **arguments)
        assert torch.equal(first.log_probs, again.log_probs)
        return watch.largest

    head = vocabulary * 4
    assert head < limit < 8 * rows * (length - 1) * vocabulary
    assert peak(8) <= limit
    running = (length - 1) * vocabulary  # of one sequence, the fewest there can be
    assert peak(8, samples_per_pass=2) == peak(16, samples_per_pass=2) <= max(limit, running)
    assert peak(8, samples_per_pass=4, max_logits=8000) <= max(head, running)


def test_posterior_of_the_library_and_the_model_is_untouched():
    model = lora("llama", torch.float32, lora_dropout=0.5).train()
    posterior = SwagPosterior(model, rank=3)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        posterior.collect()
    before, batch = frozen(model), prompts("right")
    result = log_probs(model, posterior, **batch, num_samples=6, seed=3, scale=0.7)
    assert_frozen(model, before)
    weights = posterior.draw(6, seed=3, scale=0.7, method="antithetic")
    fields = expected(model.eval(), weights, batch)
    assert result.log_probs.dtype == torch.float32 and result.num_samples == 6
    for name in FIELDS:
        torch.testing.assert_close(getattr(result, name), fields[name].float(), rtol=1e-4, atol=1e-5)
    again = log_probs(model, posterior, **batch, num_samples=6, seed=3, scale=0.7)
    assert torch.equal(again.log_probs, result.log_probs)


def test_bfloat16():
    model, ids = lora("llama", torch.bfloat16), torch.randint(0, VOCAB, (2, 5))
    posterior = given(model, 2)
    exact = log_probs(model.double(), Given({n: w.double() for n, w in posterior.weights.items()}), ids, num_samples=2)
    rough = log_probs(model.bfloat16(), posterior, ids, num_samples=2)
    assert rough.log_probs.dtype == torch.float32
    torch.testing.assert_close(rough.log_probs.double(), exact.log_probs, rtol=0.05, atol=0.05)


def _refusals():
    ids = torch.randint(2, VOCAB, (2, 5))
    mask = torch.ones_like(ids)
    yield {"labels": ids[:, :4]}, "labels have shape"
    yield {"labels": torch.full_like(ids, -100)}, "there is no label"
    yield {"input_ids": ids[:, :1]}, "there is no label"
    yield {"labels": ids.clone().fill_(VOCAB)}, f"labels has token id {VOCAB}.*0 ... {VOCAB - 1}.*differs from the head"
    yield {"labels": ids.clone().fill_(-7)}, "labels has token id -7"
    yield {"answers": torch.tensor([1, VOCAB])}, f"answers has token id {VOCAB}"
    yield {"answers": torch.tensor([1, 2, 1])}, "one token twice"
    yield {"answers": torch.ones(3, 2, dtype=torch.int64)}, r"answers have shape \[3, 2\]"
    yield {"answers": torch.tensor([1.0])}, "answers are torch.float32"
    yield {"answers": torch.tensor([1]), "labels": ids}, "either labels or answers"
    yield {"input_ids": ids.clone().fill_(VOCAB)}, f"input_ids has token id {VOCAB}"
    yield {"input_ids": ids[0]}, r"\[B, T\]"
    yield {"input_ids": ids[:0]}, "is empty"
    yield {"attention_mask": mask[:, :3]}, "attention_mask has shape"
    yield {"attention_mask": mask * torch.tensor([[1], [0]])}, "every token of a row"
    yield {"num_samples": 0}, "num_samples must be at least 1"
    yield {"num_samples": 3, "method": "antithetic"}, "must be even"
    yield {"samples_per_pass": 3}, "even for antithetic"
    yield {"scale": -1.0}, "scale must be at least 0"
    yield {"first": -2}, "first must be"
    yield {"method": "sobol"}, "one of 'iid', 'antithetic'"
    yield {"max_logits": 3}, "max_logits must be at least the 4 samples"


def test_bad_input_is_refused_before_anything_is_drawn():
    model, ids = lora("llama"), torch.randint(2, VOCAB, (2, 5))
    posterior = given(model, SAMPLES)
    for change, message in _refusals():
        with pytest.raises(ValueError, match=message):
            log_probs(model, posterior, **{"input_ids": ids, "num_samples": SAMPLES} | change)
    assert posterior.asked == []


def test_models_without_a_causal_head_are_refused():
    ids = torch.ones(1, 3, dtype=torch.int64)
    masked = hf.BertForMaskedLM(hf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    for model in (tiny_peft(), masked, FAMILIES["llama"].lora()):
        with pytest.raises(TypeError, match="is no causal language model"):
            log_probs(model, given(model, 2), ids)
    seq2seq = FAMILIES["t5"].lora()
    with pytest.raises(TypeError, match="encoder-decoder"):
        log_probs(seq2seq, given(seq2seq, 2), ids)
    with pytest.raises(TypeError, match="Linear is no transformers model"):
        log_probs(torch.nn.Linear(2, 2), Given({}), ids)
    model = lora("llama")
    model.get_base_model().lm_head = torch.nn.Sequential(torch.nn.Linear(HIDDEN, VOCAB))
    with pytest.raises(TypeError, match="output head is a Sequential"):
        log_probs(model, given(model, 2), ids)
