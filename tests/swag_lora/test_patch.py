"""One pass over S samples equals S passes with each sample's weights set."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from swag_lora.patch import SampledModel
from tiny_models import FAMILIES, LABELS, samples, text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

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


def check_equal_to_loop(model: nn.Module, weights: dict[str, Tensor], batch: dict[str, Tensor], **options) -> SampledModel:
    """Every output tensor within twice the loop's own rounding error of the loop in float64."""
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
        scale = truth.abs().max()
        rounding = 4 * torch.finfo(y.dtype).eps * scale
        error, own_error = (y - truth).abs().max(), (reference - truth).abs().max()
        assert error <= 2 * own_error + rounding, (error, own_error, scale)
    logits = torch.stack([o.logits for o in own])
    assert len(own) == 1 or logits.std(0).mean() > 0.01 * logits.abs().mean(), "the samples do not differ"
    return sampled


def rows_seen(sampled: SampledModel, parts: list[str]) -> dict[str, set[int]]:
    """Leading sizes of the tensors that modules see from now on, by the part of their name in `parts`."""
    seen: dict[str, set[int]] = {part: set() for part in parts}

    def watch(part):
        return lambda module, args, output: seen[part].add(len(args[0]))

    for part in parts:
        names = [n for n, m in sampled.model.named_modules() if part in n and isinstance(m, (nn.Linear, Conv1D)) and "lora_" not in n]
        assert names, f"no linear layer in {part}"
        for name in names:
            sampled.model.get_submodule(name).register_forward_hook(watch(part))
    return seen


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_the_loop(family, padding):
    model = FAMILIES[family].lora()
    check_equal_to_loop(model, samples(model, SAMPLES), FAMILIES[family].batch(4, padding))


@pytest.mark.parametrize(("num_samples", "batch"), [(1, 4), (3, 1), (1, 1), (7, 1), (4, 6), (6, 4), (5, 7), (7, 7), (8, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_coincide(family, num_samples, batch):
    """S, B and S * B equal to each other, to the sequence length, the width, the table of positions, or 1."""
    model = FAMILIES[family].lora(layers_to_transform=[2, 3], layers_pattern=FAMILIES[family].layers.split(".")[-1])
    check_equal_to_loop(model, samples(model, num_samples), FAMILIES[family].batch(batch, "right"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family):
    model = FAMILIES[family].lora()
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
