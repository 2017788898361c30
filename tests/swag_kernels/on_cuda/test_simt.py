"""The shim that runs CUDA kernels on the CPU: right where a kernel is right, and it finds out where one is wrong."""

import ctypes
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCE = ROOT / "tests" / "simt" / "kernels.cu"
SCHEDULES = ("forward", "reversed", "random")
HALVES = (torch.bfloat16, torch.float16)
LANES = range(32)


class Kernels:
    """The functions of kernels.cu, which give an empty message if the launch went well."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def schedule(self, name, seed=0):
        self.library.schedule(SCHEDULES.index(name), ctypes.c_uint64(seed))

    def __getattr__(self, name):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p if name.startswith("run_") else None

        def call(*arguments):
            pointers = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)
            message = function(*pointers)
            return message.decode() if message is not None else None

        return call


@pytest.fixture(scope="session")
def library(build, folder):
    return Kernels(build.library(folder, [SOURCE], "kernels"))


@pytest.fixture
def kernels(library):
    library.schedule("forward")
    library.imitate(9, 4)
    return library


@pytest.fixture(params=SCHEDULES)
def scheduled(kernels, request):
    kernels.schedule(request.param, seed=1)
    return kernels


def block_sums(kernels, barrier, blocks=50):
    x = torch.randint(1000, (blocks, 128)).float()
    sums = torch.zeros(blocks)
    assert kernels.run_block_sum(barrier, blocks, x, sums) == ""
    return sums, x.sum(-1)


def test_block_reduction(scheduled):
    assert torch.equal(*block_sums(scheduled, barrier=True))


def test_missing_barrier(scheduled):
    assert not torch.equal(*block_sums(scheduled, barrier=False))


def test_seed(kernels):
    """The same seed gives the same order, another seed another one."""
    results = []
    for seed in (5, 5, 6):
        kernels.schedule("random", seed)
        results.append(block_sums(kernels, barrier=False)[0].isnan())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def times(kernels):
    """When each warp's threads came, [warps, 32], and when again after a shuffle."""
    first, second = torch.zeros(2, 2 * 3 * 2 * 3, 32, dtype=torch.int32)
    assert kernels.run_clock(2, 3, 2, 96, torch.zeros(1, dtype=torch.int32), first, second) == ""
    return first, second


def test_order(kernels):
    """Each warp as far as it gets."""
    kernels.schedule("forward")
    for time, begin in zip(times(kernels), (0, 32), strict=True):
        assert torch.equal(time, (64 * torch.arange(36)[:, None] + torch.arange(32) + begin).int())
    kernels.schedule("reversed")
    for time, begin in zip(times(kernels), (0, 32), strict=True):
        assert torch.equal(time, (64 * torch.arange(36)[:, None] + torch.arange(32) + begin).int().flip(0, 1))


def test_random_order(kernels):
    """Neighbours overtake each other, within a warp, between warps and between blocks."""
    kernels.schedule("random", seed=1)
    first, second = times(kernels)
    assert (first.max(1).values < second.min(1).values).all()
    assert torch.equal(torch.cat([first, second]).flatten().sort().values, torch.arange(2 * 36 * 32).int())
    block, warps = first.view(12, 96), first.view(12, 3, 32)
    assert not (block.diff() > 0).all() and not (block.diff() < 0).all()
    assert set((warps[:, 0, 0] < warps[:, 2, 0]).tolist()) == {True, False}
    assert set((block[:-1, 0] < block[1:, 0]).tolist()) == {True, False}
    assert (block[:-1].min(1).values < block[1:].max(1).values).any()  # side by side


RIGHT, NO_WAIT, SHORT_WAIT, NO_BARRIER_BEFORE_REFILL = range(4)


def wrong_neighbour_sums(kernels, fault):
    tiles, threads = 5, 96
    x, sums = torch.randint(1000, (tiles, threads, 4)).float(), torch.zeros(threads, 4)
    assert kernels.run_neighbour_sums(fault, x, tiles, sums) == ""
    return int((sums != x.sum(0).roll(45, 0)).sum())


def test_pipeline(scheduled):
    assert wrong_neighbour_sums(scheduled, RIGHT) == 0


@pytest.mark.parametrize(
    "fault, order", [(NO_WAIT, "reversed"), (SHORT_WAIT, "reversed"), (NO_BARRIER_BEFORE_REFILL, "forward")]
)
def test_faulty_pipeline(kernels, fault, order):
    for name in (order, "random"):
        kernels.schedule(name, seed=1)
        assert wrong_neighbour_sums(kernels, fault) > 100


DIVERGENCES = [
    ("barrier of half the threads", r"__syncthreads \(line \d+\)"),
    ("two barriers", r"waits in __syncthreads \(line \d+\) but others of its block in __syncthreads \(line \d+\)"),
    ("early exit", "thread 40 of block|threads of its block have ended"),
    ("shuffle of half the warp", r"__shfl_sync \(line \d+\)"),
    ("barrier against shuffle", r"from thread 0 waiting in __syncthreads .* from thread 16 waiting in __shfl_sync"),
    ("a part's mask", "calls __syncwarp for a part of its warp"),
    ("a flag that nobody sets", "no thread can go on; .* waiting in (load_acquire|__nanosleep)"),
]


@pytest.mark.parametrize("number", range(len(DIVERGENCES)), ids=[name for name, _ in DIVERGENCES])
def test_divergence(scheduled, number):
    message = scheduled.run_diverge(number)
    assert message.startswith("kernel (of the test) could not be launched: "), message
    assert message.endswith(" (cudaErrorLaunchFailure)")
    assert re.search(DIVERGENCES[number][1], message), message
    assert torch.equal(*block_sums(scheduled, barrier=True))  # the next launch is not harmed


@pytest.mark.parametrize("past", [0, 63])
def test_write_past_shared_memory(scheduled, past):
    assert "beyond its 64 bytes of shared memory" in scheduled.run_overrun(64, past)


@pytest.mark.parametrize(
    "number, right, wrong, message",
    [(0, 3, 4, "index outside"), (1, 30, 32, "shifts by more"), (2, 1, 2, "multiplies beyond")],
)
def test_undefined_behaviour(scheduled, number, right, wrong, message):
    assert scheduled.run_undefined(number, right) == ""
    assert re.search(rf"thread \d+ of block .* {message} .*\(kernels.cu:\d+\)", scheduled.run_undefined(number, wrong))


def test_misaligned_access(scheduled):
    x, y = torch.randn(132), torch.zeros(132)
    assert scheduled.run_copy_packs(x, y) == ""
    assert torch.equal(x[:128], y[:128])
    for misaligned in ((x[1:], y), (x, y[2:])):
        assert "uses a misaligned address (device.h:" in scheduled.run_copy_packs(*misaligned)


def pack(rows):
    """Pairs of 16-bit numbers as words, the first in the low half."""
    return rows.contiguous().view(torch.int16).view(torch.int32)


@pytest.mark.parametrize("dtype", HALVES)
def test_mma(scheduled, dtype):
    """Against the product in float64, through the layout that csrc/cuda/ptx.h states."""
    A, B, D = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    a, b, d = torch.zeros(32, 4, dtype=torch.int32), torch.zeros(32, 2, dtype=torch.int32), torch.zeros(32, 4)
    for lane in LANES:
        g, q = lane // 4, lane % 4
        for word, (row, k) in enumerate([(g, 2 * q), (g + 8, 2 * q), (g, 2 * q + 8), (g + 8, 2 * q + 8)]):
            a[lane, word] = pack(A[row, k : k + 2])[0]
        for word, k in enumerate([2 * q, 2 * q + 8]):
            b[lane, word] = pack(B[k : k + 2, g])[0]
        d[lane] = torch.cat([D[g, 2 * q : 2 * q + 2], D[g + 8, 2 * q : 2 * q + 2]])
    assert scheduled.run_multiply(dtype == torch.float16, a, b, d) == ""
    product = torch.zeros(16, 8)
    for lane in LANES:
        g, q = lane // 4, lane % 4
        product[g, 2 * q : 2 * q + 2], product[g + 8, 2 * q : 2 * q + 2] = d[lane, :2], d[lane, 2:]
    exact, size = D.double() + A.double() @ B.double(), D.double().abs() + A.double().abs() @ B.double().abs()
    assert ((product - exact).abs() <= 16 * 2**-24 * size).all()


@pytest.mark.parametrize("barrier", [True, False])
def test_load_matrices(scheduled, barrier):
    """What one lane writes and another reads takes a barrier between, as it does where lanes do not go in step."""
    elements = torch.randint(2**16, (40, 8)).to(torch.int16)  # rows of 16 bytes
    chosen = torch.randperm(40)[:32]
    found = torch.zeros(32, 4, dtype=torch.int32)
    assert scheduled.run_transpose(barrier, elements, 160, (16 * chosen).int(), found) == ""
    words = pack(elements)[chosen].view(4, 8, 4)  # matrix, row and pair of columns
    right = words.permute(1, 2, 0).reshape(32, 4)
    assert torch.equal(found, right) == barrier


@pytest.mark.parametrize(
    "row, message", [(8, "no multiple of 16"), (-16, "16 bytes at byte -16"), (640, "at byte 640")]
)
def test_load_matrices_from_elsewhere(scheduled, row, message):
    rows = torch.full((32,), row, dtype=torch.int32)
    found = torch.zeros(32, 4, dtype=torch.int32)
    assert message in scheduled.run_transpose(True, torch.zeros(640, dtype=torch.int8), 160, rows, found)


def test_cluster(scheduled):
    x, found = torch.randn(24), torch.zeros(24, 8)
    assert scheduled.run_exchange(True, 24, 8, x, found) == ""
    assert torch.equal(found.view(3, 8, 8), x.view(3, 1, 8).expand(3, 8, 8))


def test_block_that_leaves_its_cluster(scheduled):
    assert "which has ended" in scheduled.run_exchange(False, 16, 4, torch.randn(16), torch.zeros(16, 4))


def test_blocks_that_wait_for_each_other(scheduled):
    state, trace = torch.zeros(2, dtype=torch.int32), torch.zeros(15, dtype=torch.int32)
    assert scheduled.run_chain(15, state, trace) == ""
    assert state.tolist() == [15, 15] and trace.tolist() == [(3**i - 1) // 2 for i in range(1, 16)]


def test_blocks_that_wait_forever(scheduled):
    state, trace = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(15, dtype=torch.int32)
    assert "no thread can go on" in scheduled.run_chain(15, state, trace)


def test_blocks_side_by_side(scheduled):
    assert scheduled.run_meet(8) == ""
    assert "no thread can go on" in scheduled.run_meet(9)


@pytest.mark.parametrize("dtype", HALVES)
def test_conversions(kernels, dtype):
    """All numbers there are, the midpoints between neighbours and what is just beside those."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values, expected = torch.zeros(2**16), bits.view(dtype).float()
    kernels.from_bits(dtype == torch.float16, bits, values, ctypes.c_int64(2**16))
    assert torch.equal(values.nan_to_num(7e38), expected.nan_to_num(7e38))
    assert torch.equal(values.signbit(), expected.signbit())

    finite = expected[expected.isfinite()].sort().values
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    edges = torch.tensor([torch.finfo(torch.float32).max, float("inf"), float("nan"), 65519.0, 65520.0, 65521.0, 1e-45])
    exact = torch.cat([finite, middles, edges, -edges])
    floats = torch.cat(
        [exact, exact.nextafter(torch.tensor(9e37)), exact.nextafter(torch.tensor(-9e37)), torch.randn(1000)]
    )
    rounded = torch.zeros(len(floats), dtype=torch.int16)
    kernels.to_bits(dtype == torch.float16, floats, rounded, ctypes.c_int64(len(floats)))
    ours, torchs = rounded.view(dtype), floats.to(dtype)
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(rounded[~ours.isnan()], torchs[~ours.isnan()].view(torch.int16))


@pytest.mark.parametrize(
    "grid, threads, shared, cluster, message",
    [
        ((1, 1, 1), 1024, 0, 1, ""),
        ((1, 1, 1), 1025, 0, 1, "the number of threads is 1025, not 1 to 1024"),
        ((1, 1, 1), 0, 0, 1, "the number of threads is 0"),
        ((0, 1, 1), 32, 0, 1, "gridDim.x is 0, not 1 to 2147483647"),
        ((2**31, 1, 1), 32, 0, 1, "gridDim.x is 2147483648"),
        ((1, 65535, 1), 1, 0, 1, ""),
        ((1, 65536, 1), 1, 0, 1, "gridDim.y is 65536, not 1 to 65535"),
        ((1, 1, 65536), 1, 0, 1, "gridDim.z is 65536"),
        ((1, 1, 1), 32, 227 << 10, 1, ""),
        ((1, 1, 1), 32, (227 << 10) + 1, 1, "a block cannot have 232449 bytes"),
        ((6, 1, 1), 32, 0, 3, ""),
        ((7, 1, 1), 32, 0, 3, "gridDim.x is no multiple of the cluster's size"),
        ((16, 1, 1), 32, 0, 16, "the cluster's size is 16, not 1 to 8"),
    ],
)
def test_limits_of_a_launch(kernels, grid, threads, shared, cluster, message):
    found = kernels.run_nothing(*map(ctypes.c_uint, grid), threads, ctypes.c_size_t(shared), cluster)
    assert message in found and bool(message) == bool(found)


def test_limits_of_an_older_device(kernels):
    kernels.imitate(8, 4)
    assert kernels.run_nothing(1, 1, 1, 32, ctypes.c_size_t(99 << 10), 1) == ""
    assert "a block cannot have" in kernels.run_nothing(1, 1, 1, 32, ctypes.c_size_t(100 << 10), 1)
    assert "the cluster's size is 2, not 1 to 1" in kernels.run_nothing(2, 1, 1, 32, ctypes.c_size_t(0), 2)


def test_shared_memory_that_was_not_asked_for(kernels):
    assert kernels.run_with_shared_memory(ctypes.c_size_t(48 << 10)) == "cudaSuccess"
    assert kernels.run_with_shared_memory(ctypes.c_size_t((48 << 10) + 1)) == "cudaErrorInvalidConfiguration"


def test_size_of_parameters(kernels):
    assert kernels.run_with_parameters(False) == ""
    assert "32765 bytes of parameters" in kernels.run_with_parameters(True)


def test_launch_from_another_thread(scheduled):
    results = [block_sums(scheduled, barrier=True)]
    thread = threading.Thread(target=lambda: results.append(block_sums(scheduled, barrier=True)))
    thread.start()
    thread.join()
    assert torch.equal(*results[0]) and torch.equal(*results[1])


SANITIZED = """
import ctypes, sys
kernels = ctypes.CDLL(sys.argv[1])
kernels.schedule(int(sys.argv[2]), ctypes.c_uint64(1))
x, y = (ctypes.c_float * 1000)(), (ctypes.c_float * 1000)()
for name in ('block_sum', 'diverge', 'neighbour_sums'):
    getattr(kernels, 'run_' + name).restype = ctypes.c_char_p
assert all(map(kernels.run_diverge, range(7))) and not kernels.run_block_sum(True, 7, x, y)  # fibers that a fault left are used again
assert not kernels.run_neighbour_sums(0, x, 2, y)
{call}
print("done")
"""
CASES = [
    ("inside", "kernels.run_copy(x, y, 1000); kernels.run_copy_packs(x, y); kernels.run_overrun(64, -1)", None),
    ("global memory", "kernels.run_copy(x, y, 1001)", "heap-buffer-overflow"),
    ("shared memory", "kernels.run_overrun(64, 0)", "heap-buffer-overflow"),
    ("asynchronous copy", "kernels.run_neighbour_sums(0, x, 3, y)", "heap-buffer-overflow"),
]


@pytest.mark.parametrize("order", range(len(SCHEDULES)), ids=SCHEDULES)
@pytest.mark.parametrize("call, error", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_sanitized(build, folder, sanitized, order, call, error):
    path = build.library(folder, [SOURCE], "kernels", sanitize=True)
    command = [sys.executable, "-c", SANITIZED.format(call=call), str(path), str(order)]
    # Python's own allocator would hide where an array ends.
    environment = os.environ | sanitized | {"PYTHONMALLOC": "malloc"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if error is None:
        assert result.returncode == 0 and result.stdout == "done\n", result.stderr
    else:
        assert result.returncode and error in result.stderr, result.stderr
