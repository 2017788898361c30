"""Each sampled module against its own forward, one sample after the other; and inputs that cannot be told apart."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from swag_lora.patch import SampledModel

S, B, T, H = 3, 2, 5, 8
ARANGE = torch.arange(float(S * B))[:, None]

LEAVES = {
    "linear": lambda: nn.Linear(H, 6),
    "linear_unbiased": lambda: nn.Linear(H, 6, bias=False),
    "conv1d": lambda: Conv1D(6, H),
    "layer_norm": lambda: nn.LayerNorm(H),
    "layer_norm_unbiased": lambda: nn.LayerNorm(H, bias=False),
    "rms_norm": lambda: nn.RMSNorm(H),
    "llama": lambda: LlamaRMSNorm(H),
    "gemma": lambda: GemmaRMSNorm(H),
    "t5": lambda: T5LayerNorm(H),
}


class Chain(nn.Module):
    """Modules in a row, the first of them called on whatever `enter` makes of the input."""

    def __init__(self, *modules: nn.Module, enter=lambda x: x) -> None:
        super().__init__()
        self.modules_in_a_row = nn.ModuleList(modules)
        self.enter = enter

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.enter(x)
        for module in self.modules_in_a_row:
            x = module(x)
        return x


def sample(model: nn.Module, *endings: str) -> dict[str, Tensor]:
    return {
        name: parameter.detach() + torch.randn(S, *parameter.shape).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if name.endswith(endings or ("",))
    }


def loop(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    rows = []
    for s in range(S):
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name][s])
        rows.append(model(*inputs))
    return torch.stack(rows)


def check(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> None:
    one, own = SampledModel(model, weights)(*inputs), loop(model, weights, *inputs)
    exact = loop(copy.deepcopy(model).double(), weights, *(x.double() if x.is_floating_point() else x for x in inputs))
    assert one.shape == own.shape and one.dtype == own.dtype
    rounding = 4 * torch.finfo(one.dtype).eps * exact.abs().max()
    assert (one - exact).abs().max() <= 2 * (own - exact).abs().max() + rounding
    assert (own[0] - own[1]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(B, H), (B, T, H), (B, 4, T, H), (1, T, H)])
@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf(leaf, shape):
    model = LEAVES[leaf]()
    names = [name for name, _ in model.named_parameters()]
    for chosen in [names, *([n] for n in names)]:
        check(model, sample(model, *chosen), torch.randn(*shape))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_after_a_random_module(leaf):
    """Rows already differ by sample, and come as a view that is not contiguous."""
    model = Chain(nn.LayerNorm(H), LEAVES[leaf](), enter=lambda x: x.transpose(1, 2))
    check(model, sample(model), torch.randn(B, H, T).transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_on_an_input_without_a_batch(leaf):
    """The same table for every example: its result broadcasts against batch-leading tensors."""
    table = torch.randn(1, T, H)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = LEAVES[leaf]()

        def forward(self, x):
            return self.leaf(x) + self.leaf(table.to(x))

    model = Model()
    check(model, sample(model), torch.randn(B, T, H))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_on_an_input_without_a_batch(bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(H, H)

        def forward(self, x):
            return self.layer(x) + self.layer(x.new_ones(1, T, H))

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], bias=bias, lora_bias=True), Model())
    nn.init.normal_(model.layer.lora_B["default"].weight)
    weights = sample(model, "default.weight", "default.bias", *(["base_layer.bias"] if bias == "all" else []))
    assert len(weights) == (4 if bias == "all" else 3)
    check(model, weights, torch.randn(B, T, H))


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_in_bfloat16(leaf):
    """Rounded as often as the module itself rounds: no more error in the mean than it has."""
    model = LEAVES[leaf]().bfloat16()
    weights, x = sample(model), torch.randn(B, 64, H).bfloat16()
    one = SampledModel(model, weights)(x)
    own, exact = (
        loop(copy.deepcopy(model).to(dtype), weights, x.to(dtype)) for dtype in (torch.bfloat16, torch.float64)
    )
    assert one.dtype == own.dtype
    assert (one - exact).square().mean() <= 1.1 * (own - exact).square().mean()


def test_embedding():
    model = Chain(nn.Embedding(11, H, padding_idx=0), nn.LayerNorm(H))
    check(model, sample(model), torch.randint(0, 11, (B, T)))


def test_tied_embedding_and_head():
    model = Chain(nn.Embedding(11, H), nn.LayerNorm(H), nn.Linear(H, 11))
    model.modules_in_a_row[2].weight = model.modules_in_a_row[0].weight
    weights = sample(model)
    assert len([n for n in weights if "weight" in n]) == 2
    check(model, weights, torch.randint(0, 11, (B, T)))


def test_a_module_called_twice():
    layer = nn.Linear(H, H)
    model = Chain(layer, nn.GELU(), layer)
    check(model, sample(model), torch.randn(B, T, H))


@pytest.mark.parametrize(
    ("name", "enter", "shape"),
    [
        ("time first", lambda x: x.transpose(0, 1), (B, S * B, H)),
        ("time first, several steps a row", lambda x: x.transpose(0, 1), (B, 2 * S * B, H)),
        ("a table as long as two batches", lambda x: x.new_ones(2 * S * B, H), (B, T, H)),
        ("no multiple of the rows", lambda x: x.new_ones(7, H), (B, T, H)),
        ("a scalar", lambda x: x.sum(), (B, T, H)),
        ("no rows", lambda x: x[0, 0], (B, T, H)),
    ],
)
def test_rows_that_cannot_be_told_apart(name, enter, shape):
    model = Chain(nn.Linear(H, H), enter=enter)
    with pytest.raises(ValueError, match="modules_in_a_row.0 was called on .* told apart"):
        SampledModel(model, sample(model))(torch.randn(*shape))


def test_flattened_tokens_are_rows():
    model = Chain(nn.Linear(H, H), nn.LayerNorm(H), enter=lambda x: x.flatten(0, 1))
    weights = sample(model)
    one = SampledModel(model, weights)(torch.ones(B, T, H))
    assert one.shape == (S, B * T, H)


class Prefixed(nn.Module):
    """A module without random weights, called on something that may not be a batch, ahead of a random layer."""

    def __init__(self, call, table: int, loose: int) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        self.table = nn.Embedding(table, H)
        self.loose = nn.Parameter(torch.randn(loose, H))
        self.last = nn.Linear(H, H)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self, x))


@pytest.mark.parametrize(
    ("call", "length", "table", "loose"),
    [
        pytest.param(lambda m, x: x + m.first(m.table.weight).sum(0), T, S * B, 1, id="table"),
        pytest.param(lambda m, x: x + m.first(m.loose).sum(0), T, 1, S * B, id="loose parameter"),
        pytest.param(lambda m, x: x + m.first(ARANGE.to(x).expand(-1, H)).sum(0), S * B, 1, 1, id="length"),
        pytest.param(
            lambda m, x: m.first(x.transpose(0, 1)).transpose(0, 1).contiguous(), S * B, 1, 1, id="time first"
        ),
        pytest.param(
            lambda m, x: m.first((x[:, :1] * ARANGE.to(x)).transpose(0, 1)).transpose(0, 1).contiguous(),
            T,
            1,
            1,
            id="time first, inner length",
        ),
        pytest.param(lambda m, x: m.first(x.flatten(0, 1)).view(x.shape), S, 1, 1, id="flattened"),
        pytest.param(lambda m, x: m.first(x), T, 1, 1, id="batch"),
    ],
)
def test_modules_ahead_of_randomness(call, length, table, loose):
    """Whatever could be mistaken for a batch of S * B rows runs in full."""
    model = Prefixed(call, table, loose)
    check(model, sample(model, "last.weight"), torch.randn(B, length, H))


class Pair(nn.Linear):
    """Returns what `extra` makes of its input and output."""

    def __init__(self, extra) -> None:
        super().__init__(H, H)
        self.extra = extra

    def forward(self, x, *args):
        return self.extra(x, super().forward(x), *args)


class Paired(nn.Module):
    def __init__(self, extra, call, use) -> None:
        super().__init__()
        self.pair, self.last = Pair(extra), nn.Linear(H, H)
        self.call, self.use = call, use

    def forward(self, x):
        return self.last(self.use(*self.call(self.pair, x)))


@pytest.mark.parametrize(
    ("extra", "call", "use", "length"),
    [
        pytest.param(
            lambda x, y: (y, torch.arange(x.shape[1]).float()),
            lambda pair, x: pair(x),
            lambda y, table: y * table[:, None],
            B,
            id="a table as long as the batch",
        ),
        pytest.param(
            lambda x, y: (y, y.flatten(0, 1)),
            lambda pair, x: pair(x),
            lambda y, tokens: y + tokens.view(y.shape),
            T,
            id="flattened tokens",
        ),
        pytest.param(
            lambda x, y, mask: (y.view(len(mask), -1, H) * mask,),
            lambda pair, x: pair(x.flatten(0, 1), x[:, :1, :1].sigmoid()),
            lambda y: y,
            T,
            id="flattened tokens and a mask",
        ),
        pytest.param(
            lambda x, y, rows: (y, torch.ones(rows, 1, 1)),
            lambda pair, x: pair(x, len(x)),
            lambda y, ones: y * ones,
            T,
            id="a number of rows",
        ),
    ],
)
def test_calls_ahead_of_randomness(extra, call, use, length):
    model = Paired(extra, call, use)
    check(model, sample(model, "last.bias", "last.weight"), torch.randn(B, length, H))
