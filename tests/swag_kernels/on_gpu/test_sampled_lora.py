import pytest
import torch
from gpu_device import DTYPES, trusted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sampled_lora import SCALING, SIZES, inputs, plain, plain_backward
from tolerance import assert_as_accurate_as_torch

from swag_kernels import sampled_lora
from swag_kernels.reference import sampled_lora as exact_lora
from swag_kernels.reference import sampled_lora_backward as exact_backward


def check(device, x, A, B, base):
    exact = exact_lora(x.double(), A.double(), B.double(), SCALING, base.double())
    out = sampled_lora(x.to(device), A.to(device), B.to(device), SCALING, base.clone().to(device))
    assert out.dtype == base.dtype
    assert_as_accurate_as_torch(out.cpu(), plain(x, A, B, base), exact)


def check_backward(device, grad, x, A, B):
    exact = exact_backward(*(t.double() for t in (grad, x, A, B)), SCALING)
    moved = [t.to(device) for t in (grad, x, A, B)]
    outs = torch.ops.swag_kernels.sampled_lora_backward(*moved, SCALING)
    for out, same, truth in zip(outs, plain_backward(grad, x, A, B), exact, strict=True):
        assert_as_accurate_as_torch(out.cpu(), same, truth)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(device, dtype, sizes):
    check(device, *inputs(*sizes, dtype))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", [False, True])
def test_backward_matches_the_reference(device, dtype, sizes, broadcast):
    x, A, B, base = inputs(*sizes, dtype, x_samples=1 if broadcast else None)
    check_backward(device, torch.randn_like(base), x, A, B)


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_of_another_dtype(device, dtype, base_dtype):
    x, A, B, base = inputs(3, 9, 65, 50, 8, dtype, base_dtype)
    check(device, x, A, B, base)
    check_backward(device, torch.randn_like(base), x, A, B)


@pytest.mark.parametrize("x_samples", [1, 4])
@pytest.mark.parametrize("base_samples", [1, 4])
def test_broadcast(device, x_samples, base_samples):
    check(device, *inputs(4, 6, 40, 70, 8, torch.float32, x_samples=x_samples, base_samples=base_samples))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(device, dtype):
    """A and B as SampledWeights holds them, at odd offsets; one A for all samples (stride 0); transposed strides."""
    S, M, features, out, r = 4, 5, 33, 47, 4
    buffer = torch.randn(S, 1001).to(device, dtype)
    A = buffer[:, 3 : 3 + r * features].view(S, r, features)
    B = buffer[:, 301 : 301 + out * r].view(S, out, r)
    x, _, _, base = inputs(S, M, features, out, r, dtype)
    for x_, A_, base_ in (
        (x, A, base),
        (x, A[:1].expand(S, r, features), base),
        (x[:1].expand(S, M, features), A, base),
        (x.mT.contiguous().mT, A, base.mT.contiguous().mT),
        (x.permute(1, 2, 0).contiguous().permute(2, 0, 1), A, base),
    ):
        exact = exact_lora(x_.double(), A_.cpu().double(), B.cpu().double(), SCALING, base_.double())
        result = sampled_lora(x_.to(device), A_, B, SCALING, base_.clone().to(device))
        assert_as_accurate_as_torch(result.cpu(), plain(x_, A_.cpu(), B.cpu(), base_), exact)
        check_backward(device, torch.randn_like(base_), x_, A_.cpu(), B.cpu())


def test_nothing_outside_the_result_is_written(device):
    x, A, B, base = (t.to(device) for t in inputs(3, 5, 20, 33, 4))
    guarded = torch.full((5 * 99 + 64,), 7.0, device=device)
    inside = guarded[32 : 32 + 3 * 5 * 33].view(3, 5, 33).copy_(base)
    assert sampled_lora(x, A, B, SCALING, inside) is inside
    assert torch.equal(inside, sampled_lora(x, A, B, SCALING, base))
    assert (guarded[:32] == 7).all() and (guarded[32 + 3 * 5 * 33 :] == 7).all()


def test_non_finite_values_stay_in_their_row(device):
    x, A, B, base = (t.to(device) for t in inputs(2, 4, 50, 40, 8))
    clean = sampled_lora(x, A, B, SCALING, base.clone())
    x[1, 2, 49] = torch.nan
    out = sampled_lora(x, A, B, SCALING, base.clone())
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    S=st.integers(1, 5),
    M=st.integers(1, 20),
    features=st.integers(1, 150),
    out=st.integers(1, 150),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_any_size(device, S, M, features, out, r, dtype):
    check(device, *inputs(4 * S, M, features, out, r, trusted(device, dtype)))


def test_autograd(device):
    """Through the op, with x and base broadcast."""
    double = [t.double().requires_grad_() for t in inputs(3, 4, 5, 6, 2, x_samples=1, base_samples=1)]
    single = [t.detach().float().to(device).requires_grad_() for t in double]
    weights = torch.randn(3, 4, 6)
    for tensors in (double, single):
        (sampled_lora(*tensors[:3], SCALING, tensors[3]) * weights.to(tensors[0])).sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.cpu().double(), b.grad, rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    x, A, B, base = (t.to(device) for t in inputs(4, 3, 8, 6, 2, x_samples=1))
    ops = torch.ops.swag_kernels
    torch.library.opcheck(ops.sampled_lora, (x.requires_grad_(), A, B.requires_grad_(), 0.7, base))
    torch.library.opcheck(ops.sampled_lora_, (x.detach(), A, B.detach(), 0.7, base))
