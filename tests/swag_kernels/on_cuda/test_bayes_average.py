"""What only these kernels have: one for rows whose samples fit on the chip, several in a block, and one for all others,
which goes through parts of rows, tiles of classes, runs of samples and blocks that wait for each other."""

import pytest
import torch
from average_checks import FIELDS, check, stream

from swag_kernels import AverageState, bayes_average_, cuda

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def is_large(dtype, samples, batch, classes):
    return cuda._kernels().cuda_bayes_average_workspace(cuda._DTYPES[dtype], samples, batch, classes, 1) > 0


@pytest.mark.parametrize("samples, classes", [(1, 12_270), (2, 8180), (24, 978), (600, 36)])
def test_the_last_row_that_fits_on_the_chip_and_the_first_that_does_not(device, samples, classes):
    for more in (0, 1):
        assert is_large(torch.float32, samples, 1, classes + more) == bool(more)
        check(3 * torch.randn(samples, 4, classes + more), device=device)


# S, B, C of short rows: as many to a block as it takes, one more, a block that is not full; lanes that share a row.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(32, 64, 2), (32, 65, 2), (5, 67, 16), (4, 67, 17), (9, 33, 33), (3, 33, 520)], ids=str
)
def test_several_rows_in_a_block(device, sizes, dtype):
    assert not is_large(dtype, *sizes)
    check((3 * torch.randn(sizes)).to(dtype), device=device)


# S, B, C beside the runs of 8 samples, the 256 whose terms a block holds, the parts of 2048 and 4096 classes and their
# quarters, the tiles of 512 and 1024; multiples of 8 classes, which are loaded 8 or 4 at once, and others.
LARGE = [
    (1, 4, 12_296),
    (2, 4, 8184),
    (2, 4, 8192),
    (2, 4, 8200),
    (2, 4, 8193),
    (2, 4, 9215),
    (2, 4, 9218),
    (3, 4, 12_296),
    (7, 4, 3072),
    (8, 4, 3080),
    (9, 4, 3100),
    (16, 4, 2048),
    (16, 4, 4097),
    (26, 4, 1000),
    (256, 4, 96),
    (258, 4, 97),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_parts_tiles_and_runs(device, sizes, dtype):
    assert is_large(dtype, *sizes)
    check((3 * torch.randn(sizes)).to(dtype), antithetic=sizes[0] % 2 == 0, device=device)


@pytest.mark.parametrize("classes", [32, 33])
def test_more_rows_than_are_scanned_ahead(device, classes):
    """Then scans and tiles take turns, and a tile waits for what another block is scanning."""
    assert is_large(torch.float32, 700, 6, classes)
    check(3 * torch.randn(700, 6, classes), device=device)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5000, 5001])
def test_large_probabilities_are_as_accurate_as_small_ones(device, classes, dtype, antithetic):
    """Of some classes in some samples, so that runs take both ways."""
    logits = torch.randn(12, 4, classes)
    for row in range(4):
        for sample in range(12 - 3 * row):
            logits[sample, row, [17, 600 + 8 * row, 4097, classes - 1][row]] += 9 + row
    check(logits.to(dtype), 6, antithetic, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5000, 5001])
def test_the_first_of_equal_logits_gets_the_vote(device, classes, dtype):
    """check() compares the votes: of many equal ones, and of two, in a pack, a lane, a part or not even that."""
    check(torch.randint(0, 3, (6, 3, classes)).to(dtype), device=device)
    logits = torch.zeros(10, 1, classes)
    for sample in range(10):
        first = 8 * sample
        logits[sample, :, [first, first + [1, 7, 8, 32, 255, 256, 1024, 2048, 4096, 4800][sample]]] = 2.0
    check(logits.to(dtype), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5000, 5001])
def test_tiny_probabilities_and_excluded_classes(device, classes, dtype):
    """Those that only their logarithm holds, those that are none in some or all samples, and whole parts of a row."""
    logits = torch.randn(6, 10, classes)
    logits[:, 0, 100:200] -= 150
    logits[:, 0, 4000:] -= 70
    logits[:, 1, 64:1111], logits[:, 1, -1] = -torch.inf, -torch.inf
    logits[2:4, 2, 2040:] = -torch.inf
    few = torch.ones(classes, dtype=torch.bool)
    few[[0, 700, 1400, 2100, 3200, 4096, 4500, classes - 1]] = False
    logits[:, 3:, few], logits[:, 3:, 4500] = -torch.inf, 3.0
    logits = logits.to(dtype)
    check(logits, device=device)
    check(logits, 2, True, device=device)
    state = stream(logits, 3, device=device)
    assert (state.log_sum[1, 64:1111] == -torch.inf).all() and not state.m2[1, 64:1111].any()
    assert state.votes[3, ~few].sum() == 6


@pytest.mark.parametrize("lowest", [-1e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("classes", [40, 9000])
def test_logits_near_the_end_of_the_range(device, classes, lowest):
    logits = torch.full((4, 3, classes), lowest)
    logits[:, 1, : classes // 2] = 1.0
    logits[:, 2, -1] = -lowest
    check(logits, device=device)


@pytest.mark.parametrize("classes", [5000, 5001])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_undefined_long_rows_are_nan_and_leave_the_others_alone(device, classes, value):
    logits = torch.randn(4, 4, classes)
    clean = stream(logits, device=device)
    logits[1, 2] = value
    logits[3, 1, -1] = abs(value)
    state, reference = stream(logits, device=device), stream(logits, name="reference")
    for field in ("log_sum", "m2", "mean_entropy"):
        out = getattr(state, field)
        assert out[[1, 2]].isnan().all(), field
        assert torch.equal(out[[0, 3]], getattr(clean, field)[[0, 3]]), field
    assert torch.equal(state.votes.cpu(), reference.votes)


@pytest.mark.parametrize(
    "sizes", [(16, 70, 3), (5, 9, 150), (1, 5, 12_300), (4, 5, 5000), (4, 5, 5001), (600, 6, 40)], ids=str
)
def test_bits_depend_on_no_other_row(device, sizes):
    """Whatever shares the block, and wherever the rows begin."""
    logits = 3 * torch.randn(sizes)
    whole = stream(logits, device=device)
    for rows in ([1], [sizes[1] - 1], [4, 2, 0]):
        part = stream(logits[:, rows].contiguous(), device=device)
        for field in FIELDS:
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows]), field


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 3, 64), (4, 3, 5008)], ids=str)
def test_misaligned_tensors(device, sizes, dtype):
    """Logits from any element on, and a state as well."""
    logits = (3 * torch.randn(sizes)).to(dtype)
    moved = torch.cat((logits.new_zeros(1), logits.flatten()))[1:].view(sizes).to(device)
    expected = stream(logits, device=device)
    for inner in (logits.to(device), moved):
        state = AverageState(*sizes[1:], device=device)
        state.m2 = torch.zeros(state.m2.numel() + 1, device=device)[1:].view(sizes[1:])
        bayes_average_(state, inner)
        for field in FIELDS:
            torch.testing.assert_close(getattr(state, field), getattr(expected, field), rtol=1e-5, atol=1e-6)


def test_more_blocks_than_a_launch_takes(device):
    """Addresses that nothing reads, as nothing is launched."""
    samples, batch, classes = 2**16, 2**18, 2
    logits, log_sum, m2, votes, entropy, count, workspace = (2**48 + i * 2**45 for i in range(7))
    state = log_sum, m2, votes, entropy, count
    with pytest.raises(ValueError, match=r"bayes_average \(S=65536, B=262144, C=2\) needs 4295229440 blocks"):
        cuda._kernels().cuda_bayes_average(logits, 1, samples, batch, classes, *state, 1, workspace, 0)
