from importlib import import_module

import pytest
import torch
from gpu_device import TRITON_DTYPES
from test_sampled_lora import SCALING, inputs
from test_sampled_lora_linear import exact_and_plain, layer
from tolerance import assert_as_accurate_as_torch

from swag_kernels import sampled_lora_linear

pytest.importorskip("triton")
module = import_module("swag_kernels.triton.sampled_lora_linear")
HALVES = [dtype for dtype in TRITON_DTYPES if dtype != torch.float32]
TILES = {tile: None for tile in (*module.TILES, *module.WIDE_TILES)}

# S, M, in, out, r: beside the tiles' sizes, more bands of tiles than one, ranks beside the padded ones.
SIZES = [(2, 32, 64, 8, 1), (3, 70, 192, 136, 8), (1, 700, 64, 24, 17), (2, 129, 128, 264, 32)]


def tensors(device, sizes, dtype, bias=True):
    x, A, B, _ = inputs(*sizes, dtype)
    given = x, *layer(sizes[2], sizes[3], dtype, bias), A, B
    exact, plain = exact_and_plain(*given)
    return [None if t is None else t.to(device) for t in given], exact, plain


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_fused_kernel(device, dtype, sizes, tile):
    for bias in (True, False):
        given, exact, plain = tensors(device, sizes, dtype, bias)
        out = module.fused(*given, SCALING, tile)
        assert_as_accurate_as_torch(out.cpu(), plain, exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strided_samples(device, dtype, monkeypatch):
    """By the op: A and B as SampledWeights holds them, and one A for all samples."""
    served = []
    original = module.fused
    monkeypatch.setattr(module, "fused", lambda *given: (served.append(given), original(*given))[1])
    S, M, features, out, r = 3, 40, 64, 48, 16
    buffer = torch.randn(S, 4096).to(device, dtype)
    A = buffer[:, 1024 : 1024 + r * features].view(S, r, features)
    B = buffer[:, 2048 : 2048 + out * r].view(S, out, r)
    (x, weight, bias, *_), _, _ = tensors(device, (S, M, features, out, r), dtype)
    for A_ in (A, A[:1].expand(S, r, features)):
        for given in ((x, weight, bias, A_, B), (x, weight, None, A_, B)):
            exact, plain = exact_and_plain(*(None if t is None else t.cpu() for t in given))
            assert_as_accurate_as_torch(sampled_lora_linear(*given, SCALING).cpu(), plain, exact)
    assert len(served) == 4 or device.type == "cuda"  # where it is used if it was timed as faster


@pytest.mark.parametrize(
    "sizes",
    [(2, 31, 64, 48, 8), (2, 40, 72, 48, 8), (2, 40, 64, 47, 8), (2, 40, 64, 48, 33), (2, 40, 64, 48, 65)],
    ids=str,
)
@pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)
def test_what_the_kernel_does_not_serve(device, dtype, sizes, monkeypatch):
    monkeypatch.delattr(module, "fused")
    given, exact, plain = tensors(device, sizes, dtype)
    assert_as_accurate_as_torch(sampled_lora_linear(*given, SCALING).cpu(), plain, exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_addresses_that_are_no_multiple_of_16(device, dtype, monkeypatch):
    (x, weight, bias, A, B), exact, plain = tensors(device, (2, 40, 64, 48, 8), dtype)
    monkeypatch.delattr(module, "fused")
    for shifted in range(5):
        given = [x, weight, bias, A, B]
        t = given[shifted]
        given[shifted] = torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)
        assert_as_accurate_as_torch(sampled_lora_linear(*given, SCALING).cpu(), plain, exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_infinity_is_not_multiplied_by_the_padding_of_the_rank(device, dtype):
    (x, weight, _, A, B), *_ = tensors(device, (1, 40, 64, 48, 17), dtype)
    A[:, -1] = torch.inf
    out = module.fused(x.abs(), weight, None, A, B.abs(), SCALING, module.TILES[0])
    assert (out == torch.inf).all()


def test_what_float16_holds_before_the_scaling_is_not_lost_by_it(device):
    (x, weight, _, A, B), *_ = tensors(device, (1, 40, 64, 48, 8), torch.float16)
    A, B = 700 * x.new_ones(A.shape), B / 1e3
    exact, plain = exact_and_plain(x.cpu(), weight.cpu(), None, A.cpu(), 60 * B.cpu())
    out = module.fused(x, weight, None, A, B, 60 * SCALING, module.TILES[0])
    assert exact.isfinite().all() and out.isfinite().all()
    assert (out.cpu() - exact).abs().max() <= 4 * (plain - exact).abs().max()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_non_finite_values_stay_in_their_row(device, dtype):
    given, *_ = tensors(device, (2, 40, 64, 48, 8), dtype)
    clean = module.fused(*given, SCALING, module.TILES[0])
    given[0][1, 2, 63] = torch.nan
    out = module.fused(*given, SCALING, module.TILES[0])
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    assert torch.equal(out, clean)


@pytest.mark.gpu
def test_the_choice(device):
    """Timed once for a class of calls; fixed where determinism is asked for, and while a graph is captured."""
    given, exact, plain = tensors(device, (4, 256, 512, 512, 8), torch.bfloat16)
    key = device, torch.bfloat16, 4, 256, 512, 512, 8, True
    before = torch.cuda.get_rng_state()
    chosen = module.fastest(*key)
    assert chosen is None or chosen in TILES
    assert module.fastest(*key) == chosen and torch.equal(torch.cuda.get_rng_state(), before)
    assert_as_accurate_as_torch(sampled_lora_linear(*given, SCALING).cpu(), plain, exact)
    try:
        torch.use_deterministic_algorithms(True)
        assert module.fastest(*key) is None
    finally:
        torch.use_deterministic_algorithms(False)
    module._timed.cache_clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert module.fastest(*key) is None
    assert not module._timed.cache_info().currsize


def test_the_two_steps_where_memory_does_not_suffice_for_timing(monkeypatch):
    """And the call after it tries again."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("of the GPU")

    key = torch.device("cuda"), torch.bfloat16, 4, 256, 512, 512, 8, True
    monkeypatch.setattr(module, "select", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    monkeypatch.setattr(module, "_timed", out_of_memory)
    assert module.fastest(*key) is None
    monkeypatch.setattr(module, "_timed", lambda *_: module.TILES[0])
    assert module.fastest(*key) == module.TILES[0]
