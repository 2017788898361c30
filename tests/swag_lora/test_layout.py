from dataclasses import replace

import pytest
import torch
from posterior_models import tiny_peft
from torch import nn

from swag_kernels import BLOCK, arena_size
from swag_lora.layout import Layout, find_parameter, require_finite, select_parameters


def example():
    return Layout.of({"a": torch.zeros(3, 5), "b": torch.zeros(()), "c": torch.zeros(BLOCK + 1).half()})


def test_segments_and_views():
    layout = example()
    assert [segment.start for segment in layout.segments] == [0, BLOCK, 2 * BLOCK]
    assert layout.size == 4 * BLOCK == arena_size(layout.table)
    assert layout.numel == 16 + BLOCK + 1 and len(layout) == 3
    buffer = torch.arange(2 * layout.size).view(2, -1)
    views = layout.views(buffer)
    assert views["a"].shape == (2, 3, 5) and views["b"].shape == (2,) and layout.views(buffer[0])["b"].shape == ()
    assert views["a"][1].flatten().tolist() == list(range(layout.size, layout.size + 15))
    views["c"].zero_()
    assert not buffer[:, 2 * BLOCK : 3 * BLOCK + 1].any() and buffer[:, 3 * BLOCK + 1 :].all()


def test_json_round_trip():
    layout = example()
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    "text", ["?", "{}", "[]", "[1]", '[{"name": "a"}]', '[{"name": "a", "shape": [2], "dtype": "x"}]']
)
def test_json_that_is_no_layout(text):
    with pytest.raises(ValueError, match="not a layout"):
        Layout.from_json(text)


def test_json_with_other_offsets():
    with pytest.raises(ValueError, match="b lies at element 1025"):
        Layout.from_json(example().to_json().replace('"offset": 1024', '"offset": 1025'))


@pytest.mark.parametrize(
    "names, shapes, said",
    [
        ("abc", [(3, 5), (), (BLOCK + 1,)], None),
        ("ab", [(3, 5), ()], "c [1025] is missing"),
        ("abc", [(5, 3), (), (BLOCK + 1,)], "a has shape [5, 3] instead of [3, 5]"),
        ("abcd", [(3, 5), (), (BLOCK + 1,), (2,)], "d [2] is not expected"),
        ("bac", [(), (3, 5), (BLOCK + 1,)], "b is in place 0 instead of a"),
    ],
)
def test_difference_names_the_tensor(names, shapes, said):
    other = Layout(tuple(names), tuple(shapes), (torch.float32,) * len(names))
    assert example().difference(other) == said


def test_difference_ignores_dtypes():
    layout = example()
    assert layout.difference(replace(layout, dtypes=(torch.bfloat16,) * 3)) is None


def test_trainable_is_lora_and_the_used_copy_of_modules_to_save():
    model = tiny_peft()
    names = list(select_parameters(model))
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in names) == 8
    assert [name for name in names if "classifier" in name] == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]


def test_lora_is_the_active_adapter_alone_and_may_be_frozen():
    model = tiny_peft()
    model.add_adapter("other", model.peft_config["default"])
    model.requires_grad_(False)
    names = list(select_parameters(model, "lora"))
    assert len(names) == 8 and all(".lora_" in name and ".default." in name for name in names)
    model.set_adapter("other")
    assert [name.replace(".other.", ".default.") for name in select_parameters(model, "lora")] == names


def test_predicate_sees_names_and_parameters_but_no_replaced_originals():
    model = tiny_peft()
    seen = []
    selected = select_parameters(model, lambda name, p: seen.append(name) or ("classifier" in name and p.dim() == 1))
    assert list(selected) == ["base_model.model.classifier.modules_to_save.default.bias"]
    assert not any("original_module" in name for name in seen)
    assert "base_model.model.bert.embeddings.LayerNorm.bias" in seen


def test_tied_parameters_appear_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(select_parameters(model)) == ["a.weight"]


@pytest.mark.parametrize(
    "params, said",
    [("trainable", "is_trainable=True"), ("lora", "adapters: default"), (lambda name, p: False, "predicate")],
    ids=["trainable", "lora", "predicate"],
)
def test_empty_selection(params, said):
    model = tiny_peft().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = []
    with pytest.raises(ValueError, match=f"nothing to be random.*{said}"):
        select_parameters(model, params)


def test_unknown_word_and_integer_parameters():
    with pytest.raises(ValueError, match="'all'"):
        select_parameters(tiny_peft(), "all")
    model = nn.ParameterDict({"codes": nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)})
    with pytest.raises(TypeError, match=r"codes is torch\.uint8"):
        select_parameters(model, lambda name, p: True)


def test_find_parameter_does_not_fall_through_to_wrapped_modules():
    model = tiny_peft()
    for name, parameter in model.named_parameters():
        assert find_parameter(model, name) is parameter
    # PEFT forwards attributes: model.bert is model.base_model.model.bert, yet it is not this parameter's name.
    assert find_parameter(model, "bert.embeddings.LayerNorm.bias") is None
    assert find_parameter(model, "base_model.model.classifier.nothing") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_require_finite_names_the_tensor(value, dtype):
    tensors = [torch.full((4, 6), 6e4, dtype=dtype), torch.zeros(0), torch.randn(6, 8).to(dtype).T, -torch.ones(3)]
    require_finite("abcd", tensors)
    for name, tensor in zip("acd", [tensors[0], tensors[2], tensors[3]], strict=True):
        kept = tensor[2].clone()
        tensor[2] = value
        with pytest.raises(ValueError, match=f"^{name} holds a NaN or an infinity"):
            require_finite("abcd", tensors)
        tensor[2] = kept
