"""What only the Triton kernel has: a generator and normals of its own, and configurations."""

from importlib import import_module
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from gpu_device import assert_same_bits
from test_draw import options, posterior
from test_philox import KNOWN_ANSWERS, box_muller, normal, words_with_corners

from swag_kernels import draw, segment_table
from swag_kernels.triton.normal import box_muller as triton_box_muller

NUMELS = [1500, 3, 0, 1025]


@triton.jit
def philox_kernel(p_counter, p_words, seed_low, seed_high, number, B: tl.constexpr):
    o = tl.arange(0, B)
    m = o < number
    seed = (seed_high.to(tl.uint64) << 32) | seed_low.to(tl.uint64)
    c0 = tl.load(p_counter + o, mask=m).to(tl.uint32, bitcast=True)
    c1 = tl.load(p_counter + number + o, mask=m).to(tl.uint32, bitcast=True)
    c2 = tl.load(p_counter + 2 * number + o, mask=m).to(tl.uint32, bitcast=True)
    c3 = tl.load(p_counter + 3 * number + o, mask=m).to(tl.uint32, bitcast=True)
    x0, x1, x2, x3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(p_words + o, x0.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + number + o, x1.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + 2 * number + o, x2.to(tl.int32, bitcast=True), mask=m)
    tl.store(p_words + 3 * number + o, x3.to(tl.int32, bitcast=True), mask=m)


@triton.jit
def normal_kernel(p_words, p_normals, number, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < number
    for pair in tl.static_range(2):
        x0 = tl.load(p_words + 2 * pair * number + o, mask=m).to(tl.uint32, bitcast=True)
        x1 = tl.load(p_words + (2 * pair + 1) * number + o, mask=m).to(tl.uint32, bitcast=True)
        n0, n1 = triton_box_muller(x0, x1)
        tl.store(p_normals + 2 * pair * number + o, n0, mask=m)
        tl.store(p_normals + (2 * pair + 1) * number + o, n1, mask=m)


def as_int32(words):
    return torch.as_tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_known_answers(device, counter, key, answer):
    """Random123's vectors; the kernels of this package go through the same ``tl.philox``."""
    counters = as_int32(counter)[:, None].repeat(1, 7).contiguous().to(device)
    words = torch.empty_like(counters)
    philox_kernel[(1,)](counters, words, key & 0xFFFFFFFF, key >> 32, 7, B=8)
    assert torch.equal(words.cpu(), as_int32(answer)[:, None].repeat(1, 7))


def test_normals(device):
    """Within a few units in the last place of float64, and the bits of the CPU's kernels."""
    words = words_with_corners(20_000)
    number = words.shape[1]
    out = torch.empty(words.shape, device=device)
    integers = as_int32(words.astype("int64")).to(device)
    normal_kernel[triton.cdiv(number, 1024),](integers, out, number, B=1024, enable_fp_fusion=False)
    truth = torch.from_numpy(box_muller(words))
    spacing = torch.nextafter(truth.float().abs(), torch.tensor(float("inf"))) - truth.float().abs()
    assert ((out.cpu().double() - truth).abs() / spacing).max() < 4
    assert_same_bits(out, torch.from_numpy(normal(words)))


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_configuration_gives_the_same_bits(device, antithetic, monkeypatch):
    """Whatever a program holds in registers, reads again or makes at once."""
    module = import_module("swag_kernels.triton.draw")
    layout = segment_table(NUMELS)
    state = posterior(layout, 10)
    settings = options(layout, antithetic=antithetic, first_sample=1)

    def drawn():
        return draw(*(t.to(device) for t in state), 3, **settings).cpu()

    own = drawn()
    for held, (group, elements) in product(module.HELD_RANKS, ((1, 512), (1, 1024), (2, 1024))):
        tile = {"HELD": held, "GROUP": group, "B_N": elements}
        monkeypatch.setattr(module, "tile_of", lambda *_, tile=tile: tile)
        assert torch.equal(drawn(), own), tile
