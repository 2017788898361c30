import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_as_accurate_as_torch

from swag_kernels import backend, native, sampled_lora
from swag_kernels.reference import sampled_lora as exact_lora
from swag_kernels.reference import sampled_lora_backward as exact_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALING = 0.7

# S, M, in, out, r: odd, tiny, empty; more rows than one block, more features than one chunk, ranks beside a tile's.
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 5, 33, 17, 3),
    (2, 7, 100, 130, 16),
    (5, 1, 768, 300, 8),
    (2, 16, 2100, 200, 9),
    (1, 300, 64, 48, 12),
    (9, 3, 70, 33, 64),
    (2, 17, 64, 1032, 16),
    (1, 20, 40, 600, 5),
    (1, 2, 40, 30, 600),
    (0, 3, 8, 8, 2),
    (2, 0, 8, 8, 2),
    (2, 3, 0, 8, 2),
    (2, 3, 8, 0, 2),
]


def inputs(S, M, features, out, r, dtype=torch.float32, base_dtype=None, x_samples=None, base_samples=None):
    x = torch.randn(S if x_samples is None else x_samples, M, features)
    A = torch.randn(S, r, features) / max(features, 1) ** 0.5
    B = torch.randn(S, out, r)
    base = torch.randn(S if base_samples is None else base_samples, M, out)
    return x.to(dtype), A.to(dtype), B.to(dtype), base.to(base_dtype or dtype)


def plain(x, A, B, base):
    """What a user would write: torch.bmm and torch.baddbmm in the dtype of x."""
    samples = len(A)
    hidden = torch.bmm(x.expand(samples, *x.shape[1:]), A.mT)
    update = torch.bmm(hidden, B.mT)
    return torch.add(base, update.to(base.dtype), alpha=SCALING)


def check(x, A, B, base):
    exact = exact_lora(x.double(), A.double(), B.double(), SCALING, base.double())
    out = sampled_lora(x, A, B, SCALING, base.clone())
    assert out.dtype == base.dtype
    assert_as_accurate_as_torch(out, plain(x, A, B, base), exact)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(isa, dtype, sizes):
    x, A, B, base = inputs(*sizes[:-1], sizes[-1] + 1, dtype)
    sampled_lora(x.fill_(torch.nan), A, B, SCALING, base)  # leaves NaN in the memory that the next call works in
    check(*inputs(*sizes, dtype))


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_of_another_dtype(isa, dtype, base_dtype):
    check(*inputs(3, 9, 65, 50, 8, dtype, base_dtype))


@pytest.mark.parametrize("x_samples", [1, 4])
@pytest.mark.parametrize("base_samples", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_broadcast(isa, dtype, x_samples, base_samples):
    check(*inputs(4, 6, 40, 70, 8, dtype, x_samples=x_samples, base_samples=base_samples))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_views_of_one_buffer(isa, dtype):
    """A and B as SampledWeights holds them, at odd offsets; then one A for all samples (stride 0)."""
    S, M, features, out, r = 4, 5, 33, 47, 4
    buffer = torch.randn(S, 1001).to(dtype)
    A = buffer[:, 3 : 3 + r * features].view(S, r, features)
    B = buffer[:, 301 : 301 + out * r].view(S, out, r)
    x, _, _, base = inputs(S, M, features, out, r, dtype)
    assert A.data_ptr() % 8 == torch.empty(0, dtype=dtype).element_size() * 3 % 8 and not A.is_contiguous()
    check(x, A, B, base)
    check(x, A[:1].expand(S, r, features), B, base)
    check(x.mT.contiguous().mT, A, B, base.mT.contiguous().mT)
    samples_innermost = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    check(samples_innermost, A, B, base.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def test_nothing_outside_the_result_is_written(isa):
    x, A, B, base = inputs(3, 5, 20, 33, 4)
    guarded = torch.full((5 * 99 + 64,), 7.0)
    inside = guarded[32 : 32 + 3 * 5 * 33].view(3, 5, 33).copy_(base)
    assert sampled_lora(x, A, B, SCALING, inside) is inside
    torch.testing.assert_close(inside, sampled_lora(x, A, B, SCALING, base), rtol=0, atol=0)
    assert (guarded[:32] == 7).all() and (guarded[32 + 3 * 5 * 33 :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_nothing_but_the_operands(isa, threads, dtype):
    """One row of one sample has the same bits alone, in any batch, at any place, and with any number of threads."""
    S, M, features, out, r = 11, 140, 1500, 210, 12
    x, A, B, base = inputs(S, M, features, out, r, dtype)
    threads(1)
    whole = sampled_lora(x, A, B, SCALING, base.clone())
    for number in (2, 3, 16):
        threads(number)
        assert torch.equal(sampled_lora(x, A, B, SCALING, base.clone()), whole)
        order = torch.randperm(S)
        assert torch.equal(sampled_lora(x[order], A[order], B[order], SCALING, base[order]), whole[order])
        for s, m in ((0, 0), (4, 5), (10, 139)):
            one = slice(s, s + 1), slice(m, m + 1)
            assert torch.equal(sampled_lora(x[one], A[one[0]], B[one[0]], SCALING, base[one].clone()), whole[one])
    fresh = sampled_lora(x[:1], A, B, SCALING, base[:1])
    assert torch.equal(fresh[0], whole[0])


def test_non_finite_values_stay_in_their_row(isa):
    x, A, B, base = inputs(2, 4, 50, 40, 8)
    clean = sampled_lora(x, A, B, SCALING, base.clone())
    x[1, 2, 49] = torch.nan
    out = sampled_lora(x, A, B, SCALING, base.clone())
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@settings(max_examples=60, deadline=None, derandomize=True)  # the tolerance is a matter of luck for one in a thousand
@given(
    S=st.integers(1, 5),
    M=st.integers(1, 20),
    features=st.integers(1, 150),
    out=st.integers(1, 150),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(native.supported_isas() if native.missing() is None else []),
    seed=st.integers(0, 2**16),
)
def test_any_size(S, M, features, out, r, dtype, name, seed):
    torch.manual_seed(seed)
    with native.use_isa(name):
        check(*inputs(8 * S, M, features, out, r, dtype))  # enough elements for plain torch's error to be a typical one


def backward_inputs(S, M, features, out, r, dtype, base_dtype=None, x_samples=None):
    x, A, B, base = inputs(S, M, features, out, r, dtype, base_dtype, x_samples)
    return torch.randn(S, M, out).to(base.dtype), x, A, B


def plain_backward(grad, x, A, B):
    """The gradients that plain torch gives in the dtype of x."""
    wide = grad.to(x.dtype) if grad.dtype != x.dtype else grad
    hidden, d_hidden = torch.matmul(x, A.mT), SCALING * torch.matmul(wide, B)
    return (
        torch.matmul(d_hidden, A).sum_to_size(x.shape),
        torch.matmul(d_hidden.mT, x.expand(len(A), *x.shape[1:])),
        SCALING * torch.matmul(wide.mT, hidden),
    )


def check_backward(grad, x, A, B):
    exact = exact_backward(*(t.double() for t in (grad, x, A, B)), SCALING)
    outs = torch.ops.swag_kernels.sampled_lora_backward(grad, x, A, B, SCALING)
    for out, same, truth in zip(outs, plain_backward(grad, x, A, B), exact, strict=True):
        assert_as_accurate_as_torch(out, same, truth)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", [False, True])
def test_backward_matches_the_reference(isa, dtype, sizes, broadcast):
    check_backward(*backward_inputs(*sizes, dtype, x_samples=1 if broadcast else None))


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_with_base_of_another_dtype(isa, dtype, base_dtype):
    check_backward(*backward_inputs(3, 9, 65, 50, 8, dtype, base_dtype))


def test_backward_of_views(isa):
    """An expanded x is not a broadcast x: it has a gradient for every sample."""
    grad, x, A, B = backward_inputs(4, 5, 33, 47, 4, torch.float32)
    check_backward(grad, x[:1].expand(4, 5, 33), A[:1].expand(4, 4, 33), B)
    check_backward(grad.mT.contiguous().mT, x.mT.contiguous().mT, A.mT.contiguous().mT, B.mT.contiguous().mT)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_backward_bits_do_not_depend_on_threads(isa, threads, dtype):
    arguments = backward_inputs(5, 140, 300, 200, 12, dtype, x_samples=1)
    threads(1)
    one = torch.ops.swag_kernels.sampled_lora_backward(*arguments, SCALING)
    for number in (2, 3):
        threads(number)
        for a, b in zip(torch.ops.swag_kernels.sampled_lora_backward(*arguments, SCALING), one, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("x_samples, base_samples", [(3, 3), (1, 3), (3, 1), (1, 1)])
def test_gradients(x_samples, base_samples):
    double = [
        t.double().requires_grad_() for t in inputs(3, 4, 5, 6, 2, x_samples=x_samples, base_samples=base_samples)
    ]
    assert torch.autograd.gradcheck(lambda x, A, B, base: sampled_lora(x, A, B, SCALING, base), double)

    single = [t.detach().float().requires_grad_() for t in double]
    weights = torch.randn(3, 4, 6)
    for tensors in (double, single):
        (sampled_lora(*tensors[:3], SCALING, tensors[3]) * weights).sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(name, dtype):
    x, A, B, base = inputs(4, 3, 8, 6, 2, dtype, x_samples=1)
    with backend(name):
        torch.library.opcheck(
            torch.ops.swag_kernels.sampled_lora, (x.requires_grad_(), A, B.requires_grad_(), 0.7, base)
        )
        torch.library.opcheck(torch.ops.swag_kernels.sampled_lora_, (x.detach(), A, B.detach(), 0.7, base))


def test_compiles_without_a_graph_break():
    x, A, B, base = inputs(3, 4, 8, 6, 2)

    def layer(x, A, B, base):
        return sampled_lora(x, A, B, SCALING, base * 2).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x, A, B, base), layer(x, A, B, base))
    leaves = [t.clone().requires_grad_() for t in (x, A, B, base)]
    compiled(*leaves).sum().backward()
    expected = torch.autograd.grad(layer(*leaves).sum(), leaves)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
