"""What the Triton kernels load and store, counted in the interpreter, against the least that would do."""

import math

import pytest
import torch

import bytes_moved
from bytes_counter import Moved, counting
from bytes_moved import (
    COLUMNS,
    RANK,
    ROWS,
    SAMPLES,
    count_average,
    count_collect,
    count_draw,
    count_linear,
    count_sampled_lora,
    extended,
)
from harness import LORA_SIZES

FLOATS = [torch.float32, torch.float16]
# All bytes, with what is read again, as a multiple of the least. Every tile of columns of an expand reads h, four parts
# of r float32, beside the tile's 128 (r + 2) elements of B, base and y, or 64 (r + 2) of float32.
MOST = {"collect_kernel": 1.01, "draw_kernel": 1.03, "draw": 1.03}
MOST |= {"shrink_kernel": 1.01, "expand_kernel": 1.06, "sampled_lora": 1.04}


@pytest.fixture(autouse=True)
def in_the_interpreter(device):
    if device.type != "cpu":
        pytest.skip("counts in the interpreter")


def check(rows):
    """The rows by kernel; all but the scratch's within 5 % of the least."""
    rows = {row.kernel: row for row in rows}
    for row in rows.values():
        if row.kernel != "z_kernel":
            assert row.least <= row.first <= 1.05 * row.least, row
            assert row.first <= row.total <= MOST.get(row.kernel, math.inf) * row.least, row
    return rows


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", LORA_SIZES)
def test_collect_and_draw(size, dtype):
    rows = check(bytes_moved.arena_rows(size, dtype))
    assert rows["z_kernel"].total == 4 * RANK * SAMPLES
    weights = sum(a * b for a, b in LORA_SIZES[size])
    assert rows["collect_kernel"].least == weights * (20 + dtype.itemsize)


@pytest.mark.parametrize("size", LORA_SIZES)
def test_layers(size):
    """Each tile of a layer reads its rows of x, its columns of W, and A with the rank padded to a tile's least."""
    rows = check(bytes_moved.layer_rows(size, torch.float16))
    assert set(rows) == {"shrink_kernel", "expand_kernel", "sampled_lora", "sampled_lora_linear_kernel"}
    shapes = LORA_SIZES[size]
    tiles = sum(features * (b[0] // COLUMNS) for (_, features), b in zip(shapes[::2], shapes[1::2], strict=True))
    written = sum(b[0] * (ROWS + b[1]) for b in shapes[1::2])  # y, and B read once
    assert rows["sampled_lora_linear_kernel"].total == 2 * SAMPLES * (tiles * (ROWS + COLUMNS + 16) + written)


def test_layers_of_float32():
    check(bytes_moved.layer_rows("RoBERTa-base r=8 q,v", torch.float32))


@pytest.mark.parametrize("size", LORA_SIZES)
def test_average(size):
    """The second reading of the logits is the cache's: it comes soon after the first."""
    (row,) = check(bytes_moved.average_rows(size, torch.float16)).values()
    logits = SAMPLES * bytes_moved.CLASSES[size] * 2
    assert logits <= row.total - row.first <= 1.05 * logits


@pytest.mark.parametrize("samples", [7, 8])
def test_antithetic_pairs(samples):
    moved = count_draw((2048,), samples, torch.float32, antithetic=True)["draw_kernel"]
    assert moved.first <= moved.total <= 1.05 * 2048 * 4 * (2 + RANK + samples)


# Extended counts against counts of the whole.


def test_collect_of_a_whole_model():
    """All tensors of a size at once, without any extension."""
    numels = [a * b for a, b in LORA_SIZES["RoBERTa-base r=8 q,v"]]
    blocks = sum(numels) // 1024
    for dtype in FLOATS:
        whole = count_collect(tuple(numels), dtype)
        assert whole == extended(lambda n, dtype=dtype: count_collect((1024 * n,), dtype), blocks)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_draw_of_several_tensors(dtype):
    whole = count_draw((3 * 1024, 1024, 2 * 1024), 5, dtype)
    assert whole == extended(lambda n, samples: count_draw((1024 * n,), samples, dtype), 6, 5)


def test_all_samples_of_a_draw():
    whole = count_draw((1024,), SAMPLES, torch.float16)
    assert whole == extended(lambda samples: count_draw((1024,), samples, torch.float16), SAMPLES)


def test_all_samples_of_a_decode_step():
    shape = 768, 768, 8, torch.float16
    assert count_sampled_lora(SAMPLES, *shape) == extended(lambda s: count_sampled_lora(s, *shape), SAMPLES)


def test_samples_and_columns_of_a_layer():
    assert count_linear(4, 3, 128, 8) == extended(lambda s, n: count_linear(s, n, 128, 8), 4, 3)


def test_samples_and_rows_of_an_average():
    for classes in (150, 2048):
        whole = count_average(7, 3, classes, torch.float16)
        assert whole == extended(lambda s, b, c=classes: count_average(s, b, c, torch.float16), 7, 3)


# The counter.


def test_a_known_kernel():
    """4 elements loaded twice, of which 2 are stored first; 3 of 8 stored twice; an atomic addition."""
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def known_kernel(p_in, p_out, p_flag):
        o = tl.arange(0, 8)
        tl.store(p_in + o, 1.0, mask=o < 2)
        x = tl.load(p_in + o, mask=o < 4, other=0.0) + tl.load(p_in + o % 4, mask=o < 4, other=0.0)
        tl.store(p_out + o, x, mask=o < 3)
        tl.store(p_out + o, x, mask=o < 3)
        tl.load(p_out + o, mask=o < 0, other=0.0)
        tl.atomic_add(p_flag, 1)

    given = torch.ones(8), torch.ones(8, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    with counting() as moved:
        known_kernel[2,](*given)
        known_kernel[1,](*given)
    total, first = 2 * 4 + 4 * 4 * 2 + 3 * 2 * 2 + 2 * 4, 2 * 4 + 2 * 4 + 3 * 2 + 2 * 4
    assert dict(moved) == {"known_kernel": Moved(3 * total, 2 * first)}
    before = dict(moved)
    known_kernel[1,](*given)
    assert dict(moved) == before
