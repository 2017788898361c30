"""Quantised base layers: each is called as itself, once for all samples, and is left as it was."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from language_models import Given, entropy, loop
from peft import LoraConfig, get_peft_model
from posterior_models import step
from quantised_models import (
    CONFIG,
    KINDS,
    TARGETS,
    VOCAB,
    GroupQuantised,
    base_layers,
    dequantised,
    fine_tune,
    installed,
    torchao_config,
)
from tiny_models import samples
from torch import nn

from swag_lora import SampledModel, SwagPosterior, generate, log_probs, predict

SAMPLES, EXAMPLES, LENGTH = 3, 2, 7
OWN = [kind for kind in KINDS if kind.startswith(("bnb", "torchao"))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def ids(examples=EXAMPLES):
    return torch.randint(2, VOCAB, (examples, LENGTH))


@torch.no_grad()
def one_by_one(model, weights, *args, **kwargs):
    """The model's own outputs with each sample's weights set, in a copy."""
    model = copy.deepcopy(model)
    outputs = []
    for s in range(len(next(iter(weights.values())))):
        for name, tensor in weights.items():
            model.get_parameter(name).copy_(tensor[s])
        outputs.append(model(*args, **kwargs))
    return outputs


def lora_layer(kind, dtype, **options):
    """A LoRA layer of the kind behind an embedding; each sample has a table of its own, so rows differ by sample."""
    model = fine_tune(kind, dtype, **options)
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    return nn.Sequential(nn.Embedding(VOCAB, CONFIG["hidden_size"]).to(dtype), layer)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}], ids=["lora", "rslora with bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_equals_peft_s_own_forward(kind, dtype, options):
    """Within twice PEFT's rounding of an update in float64 on the very rows that the base layer gives."""
    if kind.startswith("torchao") and options.get("lora_bias"):
        options = {"use_rslora": True}  # PEFT refuses lora_bias there
    model, tokens = lora_layer(kind, dtype, **options), ids()
    assert f"{type(model[1]).__module__}.{type(model[1]).__name__}" == f"peft.tuners.lora.{KINDS[kind][0]}"
    weights = samples(model, SAMPLES)
    assert any(name.endswith("lora_B.default.bias") for name in weights) == ("lora_bias" in options)
    one = SampledModel(model, weights)(tokens)
    own = torch.stack(one_by_one(model, weights, tokens))

    rows = weights["0.weight"][:, tokens]
    A, B = (weights[f"1.lora_{ab}.default.weight"].double() for ab in "AB")
    bias = weights.get("1.lora_B.default.bias", torch.zeros(SAMPLES, B.shape[1])).double()
    update = torch.einsum("sbti,sri,sor->sbto", rows.double(), A, B) + bias[:, None, None]
    base = model[1].base_layer(rows.flatten(0, 1)).double().unflatten(0, (SAMPLES, -1))
    exact = base + model[1].scaling["default"] * update
    assert one.dtype == own.dtype == dtype and one.shape == own.shape
    rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (one - exact).abs().max() <= 2 * (own - exact).abs().max() + rounding
    assert rounding < 0.1 * update.abs().max()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_pass_equals_the_loop(kind, precision):
    """Every logit within twice the loop's own error (root mean square) of the loop in float64 without quantisation."""
    # torchao's int4 of a float32 model fails under autocast, samples or not.
    half = precision == "bfloat16" or (precision, kind) == ("autocast", "torchao int4")
    model, tokens = fine_tune(kind, torch.bfloat16 if half else torch.float32, modules_to_save=["score"]), ids()
    weights = samples(model, SAMPLES)
    assert any("score" in name for name in weights)
    calls = {name: [] for name in base_layers(model)}
    sampled = SampledModel(model, weights)
    for name, layer in base_layers(sampled.model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: calls[name].append(len(args[0])))
    # Without autocast's cache, which would keep the first sample's weights for the others of the loop.
    with torch.autocast("cpu", torch.bfloat16, precision == "autocast", cache_enabled=False):
        one = sampled(input_ids=tokens).logits
        own = torch.stack([o.logits for o in one_by_one(model, weights, input_ids=tokens)])
    behind = {name: rows for name, rows in calls.items() if "layers.0.self_attn" not in name}
    assert len(behind) == 4 and all(rows == [SAMPLES * EXAMPLES] for rows in behind.values()), calls
    assert all(rows == [EXAMPLES] for name, rows in calls.items() if name not in behind), calls

    doubled = {name: tensor.double() for name, tensor in weights.items()}
    exact = torch.stack([o.logits for o in one_by_one(dequantised(model), doubled, input_ids=tokens)])
    assert one.dtype == own.dtype and one.shape == own.shape
    error, own_error = ((y - exact).square().mean().sqrt() for y in (one, own))
    assert error <= 2 * own_error + 4 * torch.finfo(one.dtype).eps * exact.abs().max()
    assert exact.std(0).mean() > 5 * own_error, "the samples do not differ"


def tensors(value, seen):
    """Ids of the tensors that a layer reaches, through bitsandbytes' own objects too."""
    if id(value) in seen:
        return set()
    seen.add(id(value))
    found = {id(value)} if isinstance(value, torch.Tensor) else set()
    own = isinstance(value, (torch.Tensor, nn.Module)) or type(value).__module__.startswith("bitsandbytes.")
    parts = value if isinstance(value, dict) else vars(value) if own and hasattr(value, "__dict__") else {}
    return found.union(*(tensors(part, seen) for part in parts.values()))


@pytest.mark.parametrize("called_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_is_shared_and_left_as_it_was(kind, called_first):
    """Also where the twin's call is the first, in which bitsandbytes moves a weight's tensors to the layer."""
    model, tokens, weights = fine_tune(kind), ids(), samples(fine_tune(kind), SAMPLES)
    before = fine_tune(kind)(input_ids=tokens).logits
    if called_first:
        model(input_ids=tokens)
    sampled = SampledModel(model, weights)
    own, twins = base_layers(model), base_layers(sampled.model)
    for name, layer in own.items():
        assert twins[name] is not layer and tensors(twins[name], set()) == tensors(layer, set()) != set()
    one = sampled(input_ids=tokens).logits
    assert all(tensors(twins[name], set()) == tensors(layer, set()) for name, layer in own.items())
    assert not any(layer.training for layer in own.values()) and "forward" not in vars(next(iter(own.values())))
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(sampled(input_ids=tokens).logits, one)


def collected(model):
    posterior = SwagPosterior(model, rank=3)
    for _ in range(4):
        step(model, 0.2)
        posterior.collect()
    return posterior


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_predicts_and_goes_to_a_folder_and_back(kind, tmp_path):
    model, batch = fine_tune(kind, modules_to_save=["score"]), {"input_ids": ids()}
    posterior = collected(model)
    prediction = predict(model, posterior, batch, num_samples=4)
    own = one_by_one(model, posterior.draw(4, seed=0, scale=0.5, method="antithetic"), **batch)
    probs = torch.stack([o.logits for o in own]).softmax(-1)
    # Activations that round to the other side move 8 bit layers by about a hundredth.
    close = {"rtol": 0.1, "atol": 0.01} if "int8 with" in kind else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(prediction.log_probs.exp(), probs.mean(0), **close)
    assert (probs[0] - probs[1]).abs().max() > 0.05

    posterior.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.stat().st_size > 400_000]
    again = predict(model, posterior, batch, num_samples=4).log_probs
    # bitsandbytes rounds the scales of its 4 bit layers for the CPU each time that a state_dict is taken.
    tolerance = {"rtol": 0, "atol": 0.03 if KINDS[kind][0] == "bnb.Linear4bit" else 0}
    torch.testing.assert_close(again, prediction.log_probs, **tolerance)
    fresh = fine_tune(kind, modules_to_save=["score"])
    loaded = SwagPosterior.from_pretrained(fresh, tmp_path)
    assert torch.equal(predict(fresh, loaded, batch, num_samples=4).log_probs, prediction.log_probs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bnb int8 with outliers"])
def test_likelihoods_and_generation_of_a_decoder(kind):
    model, tokens = fine_tune(kind, head="CAUSAL_LM"), ids()
    posterior = Given(samples(model, 4))
    result = log_probs(model, posterior, tokens, num_samples=4)
    for row in range(EXAMPLES):
        probs = loop(model, posterior.weights, tokens[row])[:, :-1]
        wanted = probs.mean(0).gather(1, tokens[row, 1:, None]).log()[:, 0]
        torch.testing.assert_close(result.log_probs[row, 1:].double(), wanted, rtol=1e-2, atol=2e-2)
        gained = entropy(probs.mean(0)) - entropy(probs).mean(0)
        torch.testing.assert_close(result.mutual_information[row, 1:].double(), gained, rtol=5e-2, atol=1e-2)
        assert gained.min() > 0.05
    made = generate(model, posterior, tokens, num_samples=4, max_new_tokens=4, pad_token_id=1)
    forced = log_probs(model, posterior, made.sequences, num_samples=4)
    torch.testing.assert_close(made.log_probs, forced.log_probs[:, LENGTH:], rtol=1e-2, atol=2e-2)


LOADED = {
    "bnb int8": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
    "bnb nf4": lambda: hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "torchao int8": lambda: hf.TorchAoConfig(torchao_config(8)),
    "torchao int4": lambda: hf.TorchAoConfig(torchao_config(4)),
}


@pytest.mark.parametrize("kind", LOADED)
def test_models_that_transformers_quantises_while_loading(kind, tmp_path):
    if not installed(kind):
        pytest.skip(f"{kind}: its library is not installed, and transformers quantises with nothing else")
    hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG)).save_pretrained(tmp_path)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=LOADED[kind](), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(TARGETS))).eval()
    step(model, 0.1)
    kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {f"peft.tuners.lora.{KINDS[kind][0]}"}
    weights, tokens = samples(model, SAMPLES), ids()
    with torch.no_grad():
        one = SampledModel(model, weights)(input_ids=tokens).logits
        own = torch.stack([o.logits for o in one_by_one(model, weights, input_ids=tokens)])
    assert (one - own).abs().max() < 0.05 * own.abs().max() < own.std(0).max()
    if kind == "torchao int4":
        return  # PEFT does not merge into it
    with pytest.warns() if kind.startswith("bnb") else nullcontext():
        model.merge_adapter()
    with pytest.raises(ValueError, match="q_proj has merged adapters.*unmerge_adapter"):
        SampledModel(model, weights)


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_random_biases_of_quantised_layers(kind):
    if not installed(kind):
        pytest.skip(f"{kind}: its library is not installed, and the stand-in's bias is no parameter")
    model, tokens = fine_tune(kind, bias="all"), ids()
    weights = samples(model, SAMPLES)
    assert any(name.endswith("q_proj.base_layer.bias") for name in weights)
    one = SampledModel(model, weights)(input_ids=tokens).logits
    own = torch.stack([o.logits for o in one_by_one(model, weights, input_ids=tokens)])
    doubled = {name: tensor.double() for name, tensor in weights.items()}
    exact = torch.stack([o.logits for o in one_by_one(dequantised(model), doubled, input_ids=tokens)])
    error, own_error = ((y - exact).square().mean().sqrt() for y in (one, own))
    assert error <= 2 * own_error + 4 * torch.finfo(one.dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("kind", "refused"), [("bnb int8", True), ("torchao int8", False), ("torchao int4", True)])
def test_a_quantised_output_head(kind, refused):
    """Only some rows of it are computed, which few quantised tensors allow."""
    model, tokens = fine_tune(kind, head="CAUSAL_LM"), ids()
    core = model.get_base_model()
    core.lm_head = (
        KINDS[kind][1](nn.Linear(CONFIG["hidden_size"], 64)) if installed(kind) else GroupQuantised(core.lm_head)
    )
    posterior = Given(samples(model, 4))
    if refused or not installed(kind):
        with pytest.raises(TypeError, match="output head.*leave the head out of quantisation"):
            log_probs(model, posterior, tokens, num_samples=4)
        return
    result = log_probs(model, posterior, tokens, num_samples=4)
    probs = loop(model, posterior.weights, tokens[0])[:, :-1]
    torch.testing.assert_close(
        result.log_probs[0, 1:].double(), probs.mean(0).gather(1, tokens[0, 1:, None]).log()[:, 0], rtol=1e-3, atol=1e-3
    )
