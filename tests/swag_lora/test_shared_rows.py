"""A tensor that stands for S copies of its rows acts as the copies would, whatever is done to it."""

import pytest
import torch
import torch.nn.functional as F

from swag_lora.shared_rows import SharedRows, share

S, B, T, H = 4, 3, 5, 6


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], autouse=True)
def mode(request):
    with request.param():
        yield request.param


def pair():
    rows = torch.randn(B, T, H)
    return share(rows, S), rows.repeat(S, 1, 1), rows


def same(shared, wide):
    assert shared.shape == wide.shape and shared.dtype == wide.dtype
    assert torch.equal(shared.clone().add(0), wide)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[:, 0],
        lambda x: x[:, 1:3, ::2],
        lambda x: x[..., -1:],
        lambda x: torch.tanh(x),
        lambda x: F.gelu(x[:, 0]),
        lambda x: x.double(),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.detach().clone(),
    ],
)
def test_what_stays_shared(call):
    shared, wide, rows = pair()
    result = call(shared)
    assert isinstance(result, SharedRows) and torch.equal(result.rows, call(rows))
    same(result, call(wide))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[1:],
        lambda x: x[0],
        lambda x: x + torch.arange(float(S * B))[:, None, None],
        lambda x: x.view(S, B, -1).sum(0),
        lambda x: x.mean(0),
        lambda x: x.transpose(0, 1),
        lambda x: torch.cat([x, x], 1),
        lambda x: F.layer_norm(x, (H,)),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: x[torch.arange(S * B), torch.arange(S * B) % T],
        lambda x: torch.where(x > 0, x, 0.0),
    ],
)
def test_what_takes_all_rows(call):
    shared, wide, _ = pair()
    assert not isinstance(call(shared), SharedRows)
    torch.testing.assert_close(call(shared), call(wide), rtol=0, atol=0)


MASK = torch.arange(S * B * T * H).view(S * B, T, H) % 3 == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.__setitem__((slice(None), 0), 0),
        lambda x: x.__setitem__(MASK, 7),
        lambda x: x.masked_fill_(MASK, 1),
        lambda x: x.add_(torch.arange(float(S * B))[:, None, None]),
        lambda x: x[:, 1:][..., :2].zero_(),
        lambda x: x.view(S * B, -1)[:, 3].fill_(5),
        lambda x: x.detach().mul_(MASK),
        lambda x: torch.mul(torch.ones_like(x), 3, out=x),
    ],
)
def test_writes_in_place(write):
    shared, wide, rows = pair()
    before = rows.clone()
    write(shared), write(wide)
    assert shared.rows is None, "the samples may have been set apart"
    same(shared, wide)
    same(shared[:, 1], wide[:, 1])
    assert torch.equal(rows, before)


def test_copies_where_gradients_are_recorded(mode):
    with torch.inference_mode(False), torch.enable_grad():
        rows = torch.randn(B, H, requires_grad=True)
        wide = share(rows, S)
        assert not isinstance(wide, SharedRows)
        wide.sum().backward()
        assert torch.equal(rows.grad, torch.full_like(rows, S))
