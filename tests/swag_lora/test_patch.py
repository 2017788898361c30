"""One pass over S samples equals S passes with each sample's weights set."""

from __future__ import annotations

import copy
import functools
from types import MethodType

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny_models import FAMILIES, LABELS, samples, scramble, text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from swag_kernels import sampled_lora
from swag_lora.patch import SampledModel
from swag_lora.weights import SampledWeights

SAMPLES = 3


def loop(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor], **options):
    """S forwards of a copy of `model`, each with one sample's weights copied into its parameters."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    outputs = []
    with torch.no_grad():
        for s in range(len(next(iter(weights.values())))):
            for name, tensor in weights.items():
                parameters[name].copy_(tensor[s])
            outputs.append(model(**batch, **options))
    return outputs


def tensors(output) -> list[Tensor]:
    values = tree_leaves({k: v for k, v in output.items() if not isinstance(v, Cache)})
    return [v for v in values if isinstance(v, Tensor)]


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_equal_to_loop(
    model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor], **options
) -> SampledModel:
    """Every output tensor within twice the loop's own error (root mean square) of the loop in float64."""
    sampled = SampledModel(model, weights)
    with torch.no_grad():
        one = sampled(**batch, **options)
    own = loop(model, weights, batch, **options)
    exact = loop(copy.deepcopy(model).double(), tree_map(doubled, weights), tree_map(doubled, batch), **options)

    assert type(one) is type(own[0])
    assert [k for k, v in one.items() if not isinstance(v, Cache)] == [
        k for k, v in own[0].items() if not isinstance(v, Cache)
    ]
    for y, *rest in zip(tensors(one), *map(tensors, own), *map(tensors, exact), strict=True):
        reference, truth = torch.stack(rest[: len(own)]), torch.stack(rest[len(own) :])
        if y.dim() == 0:
            reference, truth = reference.mean(0), truth.mean(0)
        assert y.shape == reference.shape and y.dtype == reference.dtype
        rounding = 4 * torch.finfo(y.dtype).eps * truth.abs().max()
        error, own_error = ((v - truth).square().mean().sqrt() for v in (y, reference))
        print("RATIO", float(error / (own_error + rounding)))
        assert error <= 2 * own_error + rounding, (error, own_error, rounding)
    logits = torch.stack([o.logits for o in own])
    assert len(own) == 1 or logits.std(0).mean() > 0.01 * logits.abs().mean(), "the samples do not differ"
    return sampled


def rows_seen(sampled: SampledModel, parts: list[str]) -> dict[str, set[int]]:
    """Leading sizes of the tensors that modules see from now on, by the part of their name in `parts`."""
    seen: dict[str, set[int]] = {part: set() for part in parts}

    def watch(part):
        return lambda module, args, output: seen[part].add(len(args[0]))

    for part in parts:
        names = [
            n
            for n, m in sampled.model.named_modules()
            if part in n and isinstance(m, (nn.Linear, Conv1D)) and "lora_" not in n
        ]
        assert names, f"no linear layer in {part}"
        for name in names:
            sampled.model.get_submodule(name).register_forward_hook(watch(part))
    return seen


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_the_loop(family, padding):
    model = FAMILIES[family].lora()
    check_equal_to_loop(model, samples(model, SAMPLES), FAMILIES[family].batch(4, padding))


@pytest.mark.parametrize(("num_samples", "batch"), [(1, 4), (3, 1), (7, 1), (4, 6), (7, 7), (8, 3), (4, 4), (8, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_coincide(family, num_samples, batch):
    """S, B and S * B equal to each other, to the sequence length (7), the width (24), a table's length (16), or 1."""
    model = FAMILIES[family].lora(layers_to_transform=[2, 3], layers_pattern=FAMILIES[family].layers.split(".")[-1])
    check_equal_to_loop(model, samples(model, num_samples), FAMILIES[family].batch(batch, "right"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family):
    """Those of the layers ahead of all randomness too."""
    tiny = FAMILIES[family]
    model = tiny.lora(layers_to_transform=[2, 3], layers_pattern=tiny.layers.split(".")[-1])
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    batch = FAMILIES[family].batch(4, "right")
    check_equal_to_loop(model, samples(model, SAMPLES), batch, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "choice"])
def test_rows_before_the_first_random_module_run_once(family):
    """LoRA on the last two of four layers: the first two see B rows, the others S * B."""
    num_samples, batch = 4, 2
    tiny = FAMILIES[family]
    model = tiny.lora(layers_to_transform=[2, 3], layers_pattern=tiny.layers.split(".")[-1])
    sampled = check_equal_to_loop(model, samples(model, num_samples), tiny.batch(batch, "right"))
    within = ".self_attn." if family == "opt" else "."
    seen = rows_seen(sampled, layers := [f"{tiny.layers}.{i}{within}" for i in range(4)])
    with torch.no_grad():
        sampled(**tiny.batch(batch, "right"))
    table_of_relative_positions = {1} if family in ("deberta_v1", "deberta_v3") else set()
    rows = [seen[layer] - table_of_relative_positions for layer in layers]
    assert rows[0] == rows[1] == {batch}
    assert num_samples * batch in rows[2]
    if family not in ("deberta_v1", "deberta_v3"):
        assert rows[3] == {num_samples * batch}


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"layer.1.*query": 2, "layer.3.*value": 6}, "alpha_pattern": {"layer.2.*query": 11}},
        {"use_rslora": True, "r": 6},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["classifier", "pooler", "LayerNorm"]},
        {"modules_to_save": ["classifier", "word_embeddings", "position_embeddings"]},
        {"target_modules": ["query"], "layers_to_transform": [3], "modules_to_save": ["classifier", "output.dense"]},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_lora_options(options):
    model = FAMILIES["bert"].lora(**options)
    check_equal_to_loop(model, samples(model, SAMPLES), text(4, "right"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"bias": "all"}),
        ("gpt2", {"modules_to_save": ["score", "ln_1", "wte", "mlp.c_fc"], "target_modules": ["c_attn"]}),
        ("llama", {"modules_to_save": ["score", "input_layernorm", "norm"]}),
        ("qwen3", {"modules_to_save": ["lm_head", "q_norm", "embed_tokens"]}),
        ("gemma", {"modules_to_save": ["score", "post_attention_layernorm"]}),
        ("t5", {"modules_to_save": ["lm_head", "layer_norm"]}),
        ("deberta_v3", {"modules_to_save": ["classifier", "pooler", "LayerNorm"]}),
        ("deberta_v1", {"modules_to_save": ["classifier", "pooler", "LayerNorm"]}),
        ("deberta_v1", {"bias": "all"}),
        ("opt", {"bias": "lora_only"}),
        ("roberta", {"bias": "all"}),
        ("choice", {"bias": "all"}),
    ],
)
def test_random_parameters_outside_lora(family, options):
    model = FAMILIES[family].lora(**options)
    check_equal_to_loop(model, samples(model, SAMPLES), FAMILIES[family].batch(4, "right"))


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "deberta_v3"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "modules_to_save"])
def test_some_of_the_trainable_weights(family, part):
    """The tensors that are not in the weights are the model's own."""
    model = FAMILIES[family].lora(modules_to_save=["lm_head"] if family == "t5" else None)
    weights = samples(model, SAMPLES, lambda name: part in name)
    assert weights
    check_equal_to_loop(model, weights, FAMILIES[family].batch(4, "right"))


def test_head_only_posterior_runs_the_encoder_once():
    model = FAMILIES["bert"].lora()
    sampled = check_equal_to_loop(model, samples(model, SAMPLES, lambda n: "classifier" in n), text(2, "right"))
    seen = rows_seen(sampled, ["encoder.layer", "pooler", "modules_to_save"])
    sampled(**text(2, "right"))
    assert seen == {"encoder.layer": {2}, "pooler": {2}, "modules_to_save": {2 * SAMPLES}}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "deberta_v3", "vit"])
def test_bfloat16_model(family):
    """A bfloat16 base with its adapter in float32, as PEFT keeps it."""
    model = FAMILIES[family].lora().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    batch = tree_map(lambda t: t.bfloat16() if t.is_floating_point() else t, FAMILIES[family].batch(4, "right"))
    check_equal_to_loop(model, samples(model, SAMPLES), batch)


def test_weights_in_another_dtype_than_the_model():
    model = FAMILIES["bert"].lora(bias="all")
    weights, batch = samples(model, SAMPLES), text(4, "right")
    few = SampledModel(model, {name: tensor.bfloat16() for name, tensor in weights.items()})(**batch).logits
    full = SampledModel(model, weights)(**batch).logits
    assert few.dtype == full.dtype
    assert 0 < (few - full).abs().max() < 0.1 * full.abs().max()


def test_autocast(monkeypatch):
    dtypes = []

    def record(x, A, B, scaling, base):
        dtypes.extend([x.dtype, A.dtype, B.dtype, base.dtype])
        return sampled_lora(x, A, B, scaling, base)

    monkeypatch.setattr("swag_lora.sampled_modules.sampled_lora", record)
    model, batch = FAMILIES["bert"].lora(bias="all"), text(4, "right")
    weights = samples(model, SAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        one = SampledModel(model, weights)(**batch).logits
        own = torch.stack([o.logits for o in loop(model, weights, batch)])
    exact = torch.stack([o.logits for o in loop(model, weights, batch)])
    assert set(dtypes) == {torch.bfloat16} and one.dtype == own.dtype
    assert (one - exact).abs().max() <= 2 * (own - exact).abs().max()


def test_labels_average_the_loss_and_tuples_stay_tuples():
    model, batch = FAMILIES["bert"].lora(), text(4, "right") | {"labels": torch.tensor([0, 2, 1, 0])}
    weights = samples(model, SAMPLES)
    check_equal_to_loop(model, weights, batch)
    loss, logits = SampledModel(model, weights)(**batch, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (SAMPLES, 4, LABELS)


def test_positional_and_embedded_inputs():
    model, batch = FAMILIES["bert"].lora(), text(4, "right")
    sampled = SampledModel(model, samples(model, SAMPLES))
    expected = sampled(**batch).logits
    assert torch.equal(sampled(batch["input_ids"], batch["attention_mask"]).logits, expected)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(sampled(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits, expected)


@pytest.mark.parametrize("family", ["gpt2_lm", "llama", "qwen3"])
def test_cache_only_where_asked_for(family):
    tiny = FAMILIES[family]
    model, batch = tiny.lora(layers_to_transform=[3], layers_pattern=tiny.layers.split(".")[-1]), tiny.batch(4, "right")
    sampled = SampledModel(model, samples(model, SAMPLES))
    assert sampled(**batch).past_key_values is None
    output = sampled(**batch, use_cache=True)
    torch.testing.assert_close(output.logits, sampled(**batch).logits)
    assert [len(layer.keys) for layer in output.past_key_values.layers] == [SAMPLES * 4] * 4


def test_exchange_of_weights():
    model, batch = FAMILIES["roberta"].lora(bias="all"), text(4, "right")
    first, second = samples(model, 3), samples(model, 5)
    sampled = SampledModel(model, first)
    before = sampled(**batch).logits
    sampled.set_weights(second)
    assert sampled.num_samples == 5 and sampled.weights is second
    assert torch.equal(sampled(**batch).logits, SampledModel(model, second)(**batch).logits)

    name = next(iter(first))
    for wrong in (
        {k: v for k, v in first.items() if k != name},
        first | {name: first[name][:2]},
        first | {name: first[name].mT},
        first | {"other": first[name]},
    ):
        with pytest.raises(ValueError, match=f"{name}|other"):
            sampled.set_weights(wrong)
        assert torch.equal(sampled(**batch).logits, SampledModel(model, second)(**batch).logits)
    sampled.set_weights(first)
    assert torch.equal(sampled(**batch).logits, before)


def test_gradients_reach_the_weights():
    model, batch = FAMILIES["bert"].lora().double(), text(4, "right")
    weights = {name: tensor.requires_grad_() for name, tensor in samples(model, SAMPLES).items()}
    mix = torch.randn(SAMPLES, 4, LABELS, dtype=torch.float64)
    names = list(weights)
    one = torch.autograd.grad((SampledModel(model, weights)(**batch).logits * mix).sum(), [weights[n] for n in names])
    total = sum(
        (torch.func.functional_call(model, {n: weights[n][s] for n in names}, kwargs=batch).logits * mix[s]).sum()
        for s in range(SAMPLES)
    )
    for name, gradient, expected in zip(
        names, one, torch.autograd.grad(total, [weights[n] for n in names]), strict=True
    ):
        torch.testing.assert_close(gradient, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_lora_dropout_in_train_mode():
    """With every LoRA input dropped, all samples are the model without its update; in eval mode they are not."""
    model, batch = FAMILIES["gpt2"].lora(lora_dropout=1.0), text(4, "right")
    sampled = SampledModel(model, samples(model, SAMPLES, lambda name: "lora_" in name))
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        parameter.data.mul_("lora_" not in name)
    base = without(**batch).logits
    for module in sampled.modules():
        if isinstance(module, nn.Dropout) and module.p < 1:
            module.p = 0.0
    torch.testing.assert_close(sampled.train()(**batch).logits, base.expand(SAMPLES, -1, -1))
    assert not torch.allclose(sampled.eval()(**batch).logits, base.expand(SAMPLES, -1, -1))
    assert not model.training


def test_compiles_without_a_graph_break():
    model, batch = FAMILIES["bert"].lora(layers_to_transform=[2, 3], layers_pattern="layer"), text(2, "right")
    sampled = SampledModel(model, samples(model, 4))
    compiled = torch.compile(sampled, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, sampled(**batch).logits)


def snapshot(model: nn.Module) -> dict:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {
        name: {k: len(v) if k.endswith("hooks") else id(v) for k, v in module.__dict__.items()}
        for name, module in model.named_modules()
    }
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    return {"state": state, "attributes": attributes, "modes": modes, "parameters": parameters}


def check_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in ("attributes", "modes", "parameters"):
        assert after[part] == before[part]


@pytest.mark.parametrize("family", ["bert", "deberta_v3", "t5", "llama"])
@pytest.mark.parametrize("layer", [0, 3])
def test_exception_in_the_forward(family, layer):
    tiny = FAMILIES[family]
    model, batch = (
        tiny.lora(layers_to_transform=[1, 2, 3], layers_pattern=tiny.layers.split(".")[-1]),
        tiny.batch(2, "right"),
    )
    model.train()
    model.eval()
    expected = model(**batch).logits
    before = snapshot(model)
    sampled = SampledModel(model, samples(model, 4))
    logits = sampled(**batch).logits

    def fail(module, args):
        raise KeyboardInterrupt

    block = next(m for n, m in sampled.model.named_modules() if n.endswith(f"{tiny.layers}.{layer}"))
    inner = [m for n, m in block.named_modules() if isinstance(m, nn.Linear) and "lora_" not in n][-1]
    hook = inner.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sampled(**batch)
    check_unchanged(model, before)
    assert torch.equal(model(**batch).logits, expected)
    hook.remove()
    assert torch.equal(sampled(**batch).logits, logits)


def test_the_model_is_never_touched():
    model, batch = FAMILIES["bert"].lora(bias="all", modules_to_save=["classifier", "LayerNorm"]), text(2, "right")
    before = snapshot(model)
    sampled = SampledModel(model, {name: w.requires_grad_() for name, w in samples(model, 4).items()})
    sampled.train()(**batch).logits.sum().backward()
    check_unchanged(model, before)
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert {id(p) for p in sampled.parameters()} | {id(b) for b in sampled.buffers()} <= own, "a tensor was copied"
    for move in (sampled.half, sampled.double, lambda: sampled.to("cpu")):
        with pytest.raises(RuntimeError, match="shares its tensors"):
            move()
    check_unchanged(model, before)


def test_training_steps_and_user_hooks_are_seen():
    class Recorder:
        def __init__(self):
            self.rows, self.state = [], (value for value in ())

        def record(self, module, args, output):
            self.rows.append(len(output))

    model, batch, recorder = FAMILIES["bert"].lora(), text(2, "right"), Recorder()
    model.get_submodule("base_model.model.bert.encoder.layer.3.output.dense").register_forward_hook(recorder.record)
    sampled = SampledModel(model, samples(model, SAMPLES))
    before = sampled(**batch).logits
    assert recorder.rows == [2 * SAMPLES]
    with torch.no_grad():
        model.get_submodule("base_model.model.bert.pooler.dense").weight.mul_(0.5)
    assert not torch.allclose(sampled(**batch).logits, before)


def test_a_forward_replaced_on_the_instance():
    """As accelerate does it: the twin's own modules run, not the model's."""
    model, batch = FAMILIES["bert"].lora(), text(4, "right")
    weights = samples(model, SAMPLES)
    expected = SampledModel(model, weights)(**batch).logits
    model.forward = MethodType(type(model).forward, model)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1")
    layer.forward = functools.partial(layer.forward)
    assert torch.equal(SampledModel(model, weights)(**batch).logits, expected)


def refused(model: nn.Module, weights: dict[str, Tensor], match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        SampledModel(model, weights)


def test_refuses_an_adapter_in_another_state():
    model = FAMILIES["bert"].lora()
    weights = samples(model, SAMPLES)
    model.merge_adapter()
    refused(model, weights, r"query has merged adapters.*unmerge_adapter")
    model.unmerge_adapter()
    with model.disable_adapter():
        refused(model, weights, r"query has its adapters disabled.*enable_adapter_layers")

    model.add_adapter("other", LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    model.set_adapter("other")
    refused(model, weights, r"default.* takes no part .*'other'. is active.*set_adapter")
    query = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    query.set_adapter(["default", "other"])
    refused(model, weights, r"layer.0.*query has several active adapters.*set_adapter")


def test_another_adapter_beside_the_active_one():
    model, batch = FAMILIES["bert"].lora(), text(4, "right")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["key", "value"]))
    model.set_adapter("other")
    scramble(model)
    weights = samples(model, SAMPLES)
    assert weights and all(".other." in name for name in weights)
    check_equal_to_loop(model, weights, batch)


def test_weights_drawn_into_one_buffer():
    model, batch = FAMILIES["gpt2"].lora(bias="all", modules_to_save=["score", "wte"]), text(4, "right")
    weights = samples(model, SAMPLES)
    buffered = SampledWeights.from_mapping(weights)
    assert not buffered[next(iter(weights))].is_contiguous()
    torch.testing.assert_close(
        SampledModel(model, buffered)(**batch).logits, SampledModel(model, weights)(**batch).logits
    )


def test_a_quantised_base_layer_is_only_called():
    class Quantised(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.scale = linear.weight.abs().max() / 127
            self.register_buffer("codes", (linear.weight / self.scale).round().to(torch.int8))
            self.in_features, self.out_features = linear.in_features, linear.out_features

        def forward(self, x):
            return x @ (self.codes.to(x.dtype) * self.scale.to(x.dtype)).mT

    model = FAMILIES["llama"].lora()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.base_layer = Quantised(module.base_layer)
    check_equal_to_loop(model, samples(model, SAMPLES), text(4, "right"))


def test_refuses_weights_of_another_model():
    model = FAMILIES["bert"].lora()
    weights = samples(model, SAMPLES)
    name = next(iter(weights))
    refused(model, {}, "no weights")
    refused(
        model,
        {k.replace("default", "old"): v for k, v in weights.items()},
        r"old.* is no parameter.*renamed or removed",
    )
    refused(FAMILIES["bert"].lora(r=2), weights, r"lora_A.*shape \[3, 4, 24\].*\[2, 24\]")
    refused(model, weights | {name: weights[name][:2]}, f"{name} has 2 samples|{name} 2:")
    refused(model, {k: v[:0] for k, v in weights.items()}, "at least 1")
    refused(model, weights | {name: weights[name].long()}, f"{name}.*floating")
    refused(model, weights | {name: weights[name].to("meta")}, f"{name}.*device")


def test_refuses_modules_without_a_sampled_form():
    model = FAMILIES["bert"].lora(use_dora=True)
    refused(model, samples(model, SAMPLES), r"query uses the LoRA variant Dora.*use_dora=False", TypeError)
    model = FAMILIES["bert"].lora(target_modules=["word_embeddings"])
    refused(model, samples(model, SAMPLES), r"word_embeddings is a .*Embedding.*leave it out", TypeError)
    model = FAMILIES["vit"].lora(bias="all")
    refused(model, samples(model, SAMPLES), r"projection holds random.*Conv2d", TypeError)
    model = FAMILIES["t5"].lora(modules_to_save=["relative_attention_bias"])
    refused(model, samples(model, SAMPLES), r"relative_attention_bias.* holds random", TypeError)
    model = FAMILIES["deberta_v1"].lora()
    weights = {
        n: p.detach().expand(SAMPLES, -1) for n, p in model.named_parameters() if n.endswith(("q_bias", "v_bias"))
    }
    refused(model, weights, r"attention.self holds random parameters \(q_bias, v_bias\)", TypeError)

    encoder = nn.TransformerEncoderLayer(8, 2)
    refused(encoder, samples(encoder, SAMPLES), "reads its layers' weights directly", TypeError)
    model = FAMILIES["bert"].lora()
    query = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    query.forward = query.forward
    refused(model, samples(model, SAMPLES), r"layer.0.*query has a forward of its own")


def test_refuses_prompt_learning():
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = get_peft_model(FAMILIES["bert"].build(), config)
    refused(model, samples(model, SAMPLES), "PROMPT_TUNING prepends learned prompts.*use LoRA")


def test_refuses_calls_it_cannot_serve():
    model, batch = FAMILIES["gpt2_lm"].lora(), text(2, "right")
    sampled = SampledModel(model, samples(model, SAMPLES))
    with pytest.raises(ValueError, match="adapter_names.*set_adapter"):
        sampled(**batch, adapter_names=["default"] * 2)
    with pytest.raises(NotImplementedError, match="does not generate"):
        sampled.generate(**batch, num_beams=4)
    with pytest.raises(ValueError, match="position_ids has leading size 3, the batch has 2"):
        sampled(**batch, position_ids=torch.zeros(3, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="batch is empty"):
        sampled(**{name: tensor[:0] for name, tensor in batch.items()})
    with pytest.raises(ValueError, match="packed sequences"):
        sampled(**batch, cu_seq_lens_q=torch.tensor([0, 7]))


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_architectures_compile_without_a_graph_break(name):
    model = FAMILIES[name].lora()
    sampled = SampledModel(model, samples(model, SAMPLES))
    batch = FAMILIES[name].batch(2, "right")
    with torch.no_grad():
        compiled = torch.compile(sampled, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**batch).logits, sampled(**batch).logits)
