"""When a LoRA layer's base and update are one op, and when the base layer is called as itself."""

from importlib import import_module

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from swag_kernels import backend
from swag_lora import SampledModel, SwagPosterior

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=50,
    max_position_embeddings=64,
)
SAMPLES, LENGTH = 2, 40


def fine_tune(targets=("q_proj", "v_proj"), **lora):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets), **lora)
    model = get_peft_model(LlamaForCausalLM(CONFIG), config).eval()
    posterior = SwagPosterior(model, rank=2)
    for _ in range(3):
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.1 * torch.randn_like(p))
        posterior.collect()
    return model, posterior


@pytest.fixture
def called(monkeypatch):
    """Names of the ops that the LoRA layers called."""
    module, names = import_module("swag_lora.sampled_modules"), []
    for name in ("sampled_lora", "sampled_lora_linear"):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, name=name, op=op: (names.append(name), op(*given))[1])
    return names


@torch.no_grad()
def logits(model, weights):
    ids = torch.arange(LENGTH)[None] % CONFIG.vocab_size
    return SampledModel(model, weights).train(model.training)(input_ids=ids).logits


def test_a_linear_layer_and_its_update_are_one_op(called):
    model, posterior = fine_tune()
    logits(model, posterior.draw(SAMPLES))
    assert called == ["sampled_lora_linear"] * 2


def base_layers(model):
    return [module for name, module in model.named_modules() if name.endswith("base_layer")]


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_base_layer_run(called, hook):
    model, posterior = fine_tune()
    seen = []
    getattr(base_layers(model)[0], hook)(lambda module, *_: seen.append(module))
    logits(model, posterior.draw(SAMPLES))
    assert len(seen) == 1 and sorted(called) == ["sampled_lora", "sampled_lora_linear"]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_another_base_layer_computes_as_it_does(called):
    model, posterior = fine_tune()
    weights = posterior.draw(SAMPLES)
    before = logits(model, weights)
    called.clear()
    for layer in base_layers(model):
        layer.__class__ = Doubled
    assert not torch.equal(logits(model, weights), before)
    assert called == ["sampled_lora"] * 2


def test_another_dtype_of_the_update(called):
    model, posterior = fine_tune()
    for layer in base_layers(model):
        layer.to(torch.float64)
    model.base_model.model.double()
    weights = {name: w.double() for name, w in posterior.draw(SAMPLES).items()}
    assert logits(model, weights).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        logits(model.float(), posterior.draw(SAMPLES))
    assert called == ["sampled_lora_linear"] * 2 + ["sampled_lora"] * 2


def test_dropout_is_the_update_s_alone(called):
    model, posterior = fine_tune(lora_dropout=0.5)
    weights = posterior.draw(SAMPLES)
    logits(model, weights)
    logits(model.train(), weights)
    assert called == ["sampled_lora_linear"] * 2 + ["sampled_lora"] * 2


def test_the_fused_kernel_in_a_model(monkeypatch):
    """In the interpreter, which takes the kernel wherever it can serve."""
    kernels = import_module("swag_kernels.triton")
    if torch.cuda.is_available() or kernels.missing():
        pytest.skip("for Triton's interpreter")
    module = import_module("swag_kernels.triton.sampled_lora_linear")
    model, posterior = fine_tune(("q_proj", "v_proj", "o_proj"))
    weights, count = posterior.draw(SAMPLES), 0
    exact = logits(model, weights)
    original = module.fused

    def fused(*given):
        nonlocal count
        count += 1
        return original(*given)

    monkeypatch.setattr(module, "fused", fused)
    with backend("triton"):
        half = logits(model.half(), {name: w.half() for name, w in weights.items()})
    assert count == 1  # q and v read what all samples share
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)
