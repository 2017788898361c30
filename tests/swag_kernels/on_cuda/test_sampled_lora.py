"""What only these kernels have: several for one op, and tiles, slices, stages and clusters of their own."""

import pytest
import torch
from test_sampled_lora import SCALING, inputs, plain
from tolerance import assert_as_accurate_as_torch

from swag_kernels import reference, sampled_lora

TYPES = [torch.bfloat16, torch.float16]
# Few and many multiprocessors, with and without clusters: the decode kernel in a block or in a cluster, the prefill kernel.
GPUS = [(8, 1), (9, 1), (8, 1000), (9, 1000)]

# S, M, in, out, r beside the tiles of 16 and 32 rows, the slices of 32 elements in sixteenths, the groups of 32 columns and
# their stages, and each width of rank; more columns than all warps have at once.
SIZES = [
    (2, 1, 512, 32, 8),
    (1, 15, 544, 1024, 8),
    (2, 16, 520, 1056, 16),
    (1, 17, 64, 4128, 16),
    (2, 31, 1040, 288, 24),
    (1, 32, 1536, 256, 32),
    (2, 33, 8, 320, 40),
    (1, 64, 2048, 264, 64),
    (2, 50, 513, 257, 64),
    (3, 18, 31, 33, 1),
]


def check(device, x, A, B, base):
    exact = reference.sampled_lora(x.double(), A.double(), B.double(), SCALING, base.double())
    out = sampled_lora(x.to(device), A.to(device), B.to(device), SCALING, base.clone().to(device)).cpu()
    assert_as_accurate_as_torch(out, plain(x, A, B, base), exact)
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_kernel_gives_the_same_bits(device, imitate, sizes, dtype):
    given = inputs(*sizes, dtype)
    outs = []
    for major, multiprocessors in GPUS:
        imitate(major, multiprocessors)
        outs.append(check(device, *given))
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [8, 13])
def test_a_row_s_bits_depend_on_no_other_row(device, dtype, rank):
    """Alone, at any place of a tile, in a batch of any size: whatever kernel serves it."""
    S, M, features, out = 3, 40 if dtype != torch.float32 else 13, 544, 72
    x, A, B, base = (t.to(device) for t in inputs(S, M, features, out, rank, dtype))
    whole = sampled_lora(x, A, B, SCALING, base.clone())
    for rows in (slice(0, 1), slice(7, 8), slice(3, 11), slice(1, M)):
        one = slice(1, 2)
        part = sampled_lora(x[one, rows], A[one], B[one], SCALING, base[one, rows].clone())
        assert torch.equal(part, whole[one, rows])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("rank", [3, 6])
def test_infinity_stays_in_its_row_and_ranks_that_do_not_exist_add_nothing(device, dtype, rank, rows):
    """Three or six ranks of eight: the others' zeros must not meet an infinite h."""
    x, A, B, base = (t.to(device) for t in inputs(2, rows, 64, 40, rank, dtype))
    clean = sampled_lora(x, A, B, SCALING, base.clone())
    x[1, 2] = 0
    x[1, 2, 5], A[1, :, 5], B[1] = torch.inf, 1, 1
    expected = sampled_lora(x[1:, 3:4], A[1:], B[1:], SCALING, base[1:, 3:4].clone())
    out = sampled_lora(x, A, B, SCALING, base.clone())
    assert (out[1, 2] == torch.inf).all()
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, 3:4], expected[0])


@pytest.mark.parametrize("dtype", [*TYPES, torch.float32], ids=str)
def test_rows_that_are_16_bytes_but_do_not_start_there(device, dtype):
    """Then nothing is read 16 bytes at once."""
    S, M, features, out, r = 2, 20 if dtype != torch.float32 else 5, 64, 48, 8
    x, A, B, base = inputs(S, M, features, out, r, dtype)

    def shifted(t):
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        return memory[1:].view(t.shape).copy_(t)

    aligned = [t.to(device) for t in (x, A, B, base)]
    usual = sampled_lora(*aligned[:3], SCALING, aligned[3].clone())
    for index in range(4):
        given = [shifted(t) if i == index else t.clone() for i, t in enumerate(aligned)]
        assert torch.equal(sampled_lora(*given[:3], SCALING, given[3]), usual), index


@pytest.mark.parametrize("dtype", [torch.float32, *TYPES], ids=str)
def test_more_samples_than_one_grid_axis_but_x_has(device, dtype):
    if device.type == "cpu":
        S, rows = 300, 1
    else:
        S, rows = 70_000, 1
    check(device, *inputs(S, rows, 8, 8, 2, dtype, x_samples=1))
