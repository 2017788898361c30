"""The integers of the random stream bit for bit, and the normals made from them to a few units in the last place."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swag_kernels import native, reference

_C = pytest.importorskip("swag_kernels._C")

word = st.integers(0, 2**32 - 1)

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        0x0000000000000000,
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        0xFFFFFFFFFFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counters, key):
    counters = np.ascontiguousarray(counters, dtype=np.uint32)
    words = np.empty_like(counters)
    _C.philox(counters.ctypes.data, key, words.ctypes.data, counters.shape[1])
    return words


def normal(words):
    words = np.ascontiguousarray(words, dtype=np.uint32)
    normals = np.full(words.shape, np.nan, dtype=np.float32)
    _C.normal(words.ctypes.data, normals.ctypes.data, words.shape[1])
    return normals


def box_muller(words):
    """Box–Muller in float64 on the stream's float32 uniforms, the angle reduced before it meets the rounded 2π."""
    u = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32), np.float32(1 - 2**-24))
    u0, u1 = u[0::2].astype(np.float64), u[1::2].astype(np.float64)
    radius = np.sqrt(-2 * np.log(u0))
    quarter = np.rint(4 * u1)
    angle = 2 * np.pi * (u1 - quarter / 4)
    c, s, quarter = np.cos(angle), np.sin(angle), quarter.astype(int) % 4
    pairs = radius * np.choose(quarter, [c, -s, -c, s]), radius * np.choose(quarter, [s, c, -s, -c])
    return np.stack(pairs, axis=1).reshape(4, -1)


def words_with_corners(n=200_000):
    words = np.random.default_rng(0).integers(0, 2**32, (4, n), dtype=np.uint64).astype(np.uint32)
    near = np.arange(1000, dtype=np.uint32)
    words[0, :1000] = ~near  # u → 1, where ln u vanishes
    words[0, 1000:2000] = near  # u → 0, the largest radius
    words[0, 2000:3000] = np.uint32(3037000500) + near - np.uint32(500)  # u = √½, where the logarithm changes exponent
    for quarter in range(8):  # zeros and extrema of the sine, and the ends of each polynomial
        words[1, 1000 * quarter : 1000 * (quarter + 1)] = np.uint32(quarter * 2**29) + near * 256 - np.uint32(500 * 256)
    return words


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
@pytest.mark.parametrize("n", [1, 16, 37])
def test_known_answers(isa, counter, key, answer, n):
    words = philox(np.array(counter)[:, None].repeat(n, axis=1), key)
    assert (words == np.array(answer)[:, None]).all()


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_known_answers_of_the_reference(counter, key, answer):
    assert reference.philox(torch.tensor(counter)[:, None], key).flatten().tolist() == list(answer)


@given(st.lists(st.tuples(word, word, word, word), min_size=1, max_size=40), st.integers(0, 2**64 - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_are_the_reference_s(isa, counters, key):
    counters = np.array(counters).T
    assert (philox(counters, key) == reference.philox(torch.from_numpy(counters), key).numpy()).all()


def test_normals_are_within_a_few_units_in_the_last_place(isa):
    words = words_with_corners()
    normals, truth = normal(words), box_muller(words)
    assert np.isfinite(normals).all()
    unit = np.spacing(np.abs(truth).astype(np.float32)).astype(np.float64)
    assert (np.abs(normals - truth) / unit).max() < 4


def test_reference_normals():
    words = words_with_corners(20_000)
    normals = reference.normal(torch.from_numpy(words.astype(np.int64))).numpy().T
    np.testing.assert_allclose(normals, box_muller(words), rtol=1e-12, atol=1e-14)


def test_normals_have_the_same_bits_on_every_instruction_set():
    words = words_with_corners()
    bits = []
    for name in native.supported_isas():
        with native.use_isa(name):
            bits.append(normal(words).view(np.uint32))
    assert all((b == bits[0]).all() for b in bits)


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17, 33])
def test_odd_numbers_of_words(isa, n):
    words = words_with_corners()[:, -n:]
    np.testing.assert_array_equal(normal(words), normal(words_with_corners())[:, -n:])


def test_normals_are_normal():
    """Kolmogorov–Smirnov distance of 800 000 normals, below its 99.9 % quantile 1.95/√n, and lag correlations within 4/√n."""
    words = philox(np.stack([np.arange(200_000), *np.zeros((3, 200_000), int)]), 7)
    n = normal(words).T.flatten().astype(np.float64)
    ordered = torch.from_numpy(np.sort(n))
    cdf = torch.special.ndtr(ordered).numpy()
    empirical = np.arange(len(n)) / len(n)
    assert np.abs(cdf - empirical).max() < 1.95 / len(n) ** 0.5
    for lag in (1, 2, 3, 4, 8):
        assert abs(np.mean(n[lag:] * n[:-lag])) < 4 / len(n) ** 0.5
