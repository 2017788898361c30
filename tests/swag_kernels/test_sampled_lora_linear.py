import pytest
import torch
from test_sampled_lora import SCALING, inputs
from tolerance import assert_as_accurate_as_torch
from torch.nn.functional import linear

from swag_kernels import backend, sampled_lora, sampled_lora_linear


def layer(features, out, dtype=torch.float32, bias=True):
    weight = (torch.randn(out, features) / max(features, 1) ** 0.5).to(dtype)
    return weight, torch.randn(out).to(dtype) if bias else None


def exact_and_plain(x, weight, bias, A, B):
    """In float64, and what a user would write in the tensors' own dtype."""
    double = [None if t is None else t.double() for t in (x, weight, bias, A, B)]
    results = []
    for x_, weight_, bias_, A_, B_ in (double, (x, weight, bias, A, B)):
        base = linear(x_, weight_, bias_)
        results.append(base + SCALING * torch.bmm(torch.bmm(x_.expand(len(A_), -1, -1), A_.mT), B_.mT))
    return results


@pytest.mark.parametrize("sizes", [(3, 5, 33, 17, 3), (2, 40, 64, 48, 16), (0, 3, 8, 8, 2), (2, 0, 8, 8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_samples", [None, 1])
def test_matches_the_reference(sizes, dtype, bias, x_samples):
    x, A, B, _ = inputs(*sizes, dtype, x_samples=x_samples)
    weight, bias = layer(sizes[2], sizes[3], dtype, bias)
    out = sampled_lora_linear(x, weight, bias, A, B, SCALING)
    exact, plain = exact_and_plain(x, weight, bias, A, B)
    assert_as_accurate_as_torch(out, plain, exact)


def test_is_the_layer_and_then_sampled_lora():
    x, A, B, _ = inputs(3, 7, 40, 24, 8)
    weight, bias = layer(40, 24)
    expected = sampled_lora(x, A, B, SCALING, linear(x, weight, bias))
    assert torch.equal(sampled_lora_linear(x, weight, bias, A, B, SCALING), expected)


def test_autograd():
    x, A, B, _ = inputs(3, 4, 6, 5, 2)
    tensors = [t.double().requires_grad_() for t in (x, *layer(6, 5), A, B)]
    assert torch.autograd.gradcheck(lambda *given: sampled_lora_linear(*given, SCALING), tensors)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_opcheck(name):
    x, A, B, _ = inputs(3, 4, 6, 5, 2)
    weight, bias = layer(6, 5)
    with backend(name):
        for given in ((x, weight, bias, A, B), (x[:1], weight, None, A, B)):
            torch.library.opcheck(torch.ops.swag_kernels.sampled_lora_linear, (*given, SCALING))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 7)}, r"expected x \[S or 1, M, in\], weight"),
        ({"weight": torch.ones(5)}, "weight must have 2 axes"),
        ({"weight": torch.ones(5, 6).half()}, "weight must have 2 axes and be torch.float32"),
        ({"bias": torch.ones(6)}, "bias None|bias \\[6\\]"),
        ({"bias": torch.ones(5).half()}, "bias must have 1 axes"),
        ({"A": torch.ones(3, 2, 7)}, "sampled_lora: expected x"),
        ({"B": torch.ones(3, 5, 2).half()}, "one floating dtype"),
        ({"x": torch.ones(4, 6)}, "expected x"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    x, A, B, _ = inputs(3, 4, 6, 5, 2)
    weight, bias = layer(6, 5)
    given = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B} | change
    with pytest.raises(ValueError, match=message):
        sampled_lora_linear(**given, scaling=SCALING)
