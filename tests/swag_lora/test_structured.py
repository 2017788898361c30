import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from swag_kernels import arena_size, draw, segment_table
from swag_lora.structured import draw_orthogonal, orthogonal_normals

RANK, SEEDS = 5, 1000


@pytest.fixture(scope="module")
def blocks():
    """z of the first two blocks under many seeds, ``[SEEDS, 2, RANK pairs, RANK]``."""
    return torch.stack([orthogonal_normals(2 * RANK, RANK, seed) for seed in range(SEEDS)]).unflatten(1, (2, RANK))


@pytest.fixture
def state():
    """mean, std, deviations and layout of a small posterior."""
    layout = segment_table([600, 1500, 7])
    size = arena_size(layout)
    held = torch.cat([torch.arange(offset, offset + numel) for offset, numel, _ in layout.tolist()])
    mean, std, deviations = torch.zeros(size), torch.zeros(size), torch.zeros(RANK, size)
    mean[held], std[held] = torch.randn(len(held)), torch.rand(len(held))
    deviations[:, held] = torch.randn(RANK, len(held))
    return mean, std, deviations, layout


def drawn(state, num_samples, first_sample=0, seed=3, dtype=torch.float32, diag_scale=0.7, low_rank_scale=0.4):
    mean, std, deviations, layout = state
    return draw_orthogonal(
        mean,
        std,
        deviations,
        num_samples,
        seed=seed,
        first_sample=first_sample,
        diag_scale=diag_scale,
        low_rank_scale=low_rank_scale,
        layout=layout,
        dtype=dtype,
    )


def diagonal(state, num_samples, seed=3):
    """Antithetic samples of `draw` without the low-rank part."""
    mean, std, _, layout = state
    return draw(
        mean,
        std,
        None,
        num_samples,
        seed=seed,
        first_sample=0,
        diag_scale=0.7,
        low_rank_scale=0.0,
        antithetic=True,
        layout=layout,
        dtype=torch.float32,
    )


def kolmogorov_smirnov(values, cdf):
    """√n times the largest distance of the empirical distribution function (last axis) from ``cdf``."""
    n = values.shape[-1]
    expected = cdf(values.sort(-1).values)
    steps = torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * torch.maximum(expected - steps, steps + 1 / n - expected).amax(-1)


def quantiles_of_lengths(z):
    """P(χ_R ≤ |z|) over the last axis."""
    return torch.special.gammainc(torch.full(z.shape[:-1], z.shape[-1] / 2, dtype=z.dtype), z.square().sum(-1) / 2)


def test_each_z_alone_is_standard_normal(blocks):
    """Over 1000 seeds, for each pair: its coordinates, two projections and its squared length. 80 statistics below 2.6,
    each with probability 1 − 3e-6."""
    z = blocks.flatten(1, 2).permute(1, 2, 0)  # [pairs, R, seeds]
    mixed = torch.stack(((z[:, 0] + z[:, 1]) / math.sqrt(2), (z.sum(1)) / math.sqrt(RANK)), 1)
    assert kolmogorov_smirnov(torch.cat((z, mixed), 1), torch.special.ndtr).max() < 2.6
    assert kolmogorov_smirnov(quantiles_of_lengths(z.mT), lambda u: u).max() < 2.6


def test_each_z_alone_has_the_moments_of_a_normal(blocks):
    """Mean, covariance and fourth moment over seeds, within 5 standard errors."""
    for z in blocks.flatten(1, 2).unbind(1):
        assert z.mean(0).abs().max() < 5 / math.sqrt(SEEDS)
        error = z.T @ z / SEEDS - torch.eye(RANK)
        assert (error / (1 + torch.eye(RANK)).sqrt()).abs().max() < 5 / math.sqrt(SEEDS)
        assert (z.pow(4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / SEEDS)


def test_blocks_are_orthogonal_and_one_another_independent(blocks):
    gram = blocks @ blocks.mT
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-12
    across = (blocks[:, 0] @ blocks[:, 1].mT).square().mean((0, 1, 2))
    assert abs(across - RANK) < 0.1 * RANK  # E (z·z')² = R for independent normals


@pytest.mark.parametrize("rank", [2, 6, 19])
@pytest.mark.parametrize("first, pairs", [(0, 2), (4, 4), (96, 32), (64, 64)])
def test_lengths_take_each_of_equally_probable_intervals_once(rank, first, pairs):
    quantiles = quantiles_of_lengths(orthogonal_normals(pairs, rank, 11, first))
    assert (quantiles * pairs).long().sort().values.tolist() == list(range(pairs))


@pytest.mark.parametrize("rank", [2, 6, 19])
def test_long_and_short_alternate(rank):
    quantiles = quantiles_of_lengths(orthogonal_normals(64, rank, 11)).view(-1, 2)
    torch.testing.assert_close(quantiles.sum(1), torch.ones_like(quantiles[:, 0]), rtol=0, atol=1e-9)


def test_averages_of_quadratic_forms_vary_less_than_independent_ones():
    """What pairs do not cancel is even in z, first of all zᵀHz; here H has eigenvalues 1 … 5."""
    weights = torch.arange(1.0, RANK + 1, dtype=torch.float64)

    def variance(z):  # [repetitions, pairs, R]
        return (z.square() @ weights).mean(1).var().item()

    ours = torch.stack([orthogonal_normals(16, RANK, seed) for seed in range(200)])
    independent = torch.randn(3000, 16, RANK, dtype=torch.float64)
    for pairs, gain in ((2, 2.0), (4, 3.0), (16, 5.0)):
        assert variance(independent[:, :pairs]) > gain * variance(ours[:, :pairs])


def test_z_depends_on_seed_pair_and_rank_alone():
    all_of_them = orthogonal_normals(40, RANK, 2**63 + 5)
    for first, pairs in ((0, 1), (3, 4), (5, 5), (17, 23), (39, 1)):
        assert torch.equal(orthogonal_normals(pairs, RANK, 2**63 + 5, first), all_of_them[first : first + pairs])
    assert not torch.isclose(orthogonal_normals(40, RANK, 5), all_of_them).any()
    assert not torch.isclose(orthogonal_normals(40, RANK + 1, 2**63 + 5)[:, :RANK], all_of_them).all(1).any()


def test_z_stays_what_it_was():
    """A sample's name is a promise: these digits change only with the definition of the method."""
    z = orthogonal_normals(2, 3, 7, first_pair=2)
    expected = [[0.145112323, 0.892366196, -0.750168689], [0.213021113, 1.526922323, 1.171644833]]
    torch.testing.assert_close(z, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_has_the_same_bits_whatever_else_is_drawn(state, dtype):
    whole = drawn(state, 29, dtype=dtype)
    assert whole.dtype == dtype and not whole.isnan().any()
    for first, samples in ((0, 1), (1, 1), (1, 8), (7, 2), (8, 8), (13, 16), (28, 1)):
        assert torch.equal(drawn(state, samples, first, dtype=dtype), whole[first : first + samples])
    assert not torch.equal(drawn(state, 29, seed=4, dtype=dtype), whole)
    assert torch.equal(whole, drawn(state, 29).to(dtype))


def test_a_sample_has_the_same_bits_on_any_number_of_threads(state):
    one, threads = drawn(state, 8), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(drawn(state, 8), one)
    finally:
        torch.set_num_threads(threads)


def test_pairs_mirror_each_other_exactly(state):
    mean, *others = state
    samples = drawn((torch.zeros_like(mean), *others), 10).view(5, 2, -1)
    assert torch.equal(samples[:, 0], -samples[:, 1])
    assert samples[:, 0].abs().amax(1).min() > 0
    middle = drawn(state, 10).view(5, 2, -1).double().mean(1)
    assert (middle - mean).abs().max() <= torch.finfo(torch.float32).eps * drawn(state, 10).abs().max()


def test_the_diagonal_part_is_that_of_antithetic_draws(state):
    mean, std, deviations, layout = state
    flat = torch.zeros_like(mean), std, deviations, layout
    assert torch.equal(drawn(flat, 9, low_rank_scale=0.0), diagonal(flat, 9))
    z = orthogonal_normals(5, RANK, 3).repeat_interleave(2, 0)[:9]
    z[1::2] *= -1
    exact = diagonal(state, 9).double() + 0.4 * (z @ deviations.double())
    torch.testing.assert_close(drawn(state, 9).double(), exact, rtol=1e-5, atol=1e-5)


def test_without_scale_a_sample_is_the_mean(state):
    assert torch.equal(drawn(state, 3, diag_scale=0.0, low_rank_scale=0.0), state[0].expand(3, -1))


def test_covariance_of_many_draws():
    """3000 pairs: mean and covariances of nine weights within 5 standard errors of independent samples."""
    layout = segment_table([9])
    size, pairs = arena_size(layout), 3000
    std, deviations = torch.zeros(size), torch.zeros(3, size)
    std[:9], deviations[:, :9] = torch.rand(9), torch.randn(3, 9)
    samples = drawn((torch.zeros(size), std, deviations, layout), 2 * pairs)[::2, :9].double()
    d = deviations[:, :9].double()
    covariance = (0.7 * std[:9].double()).square().diag() + 0.16 * d.T @ d
    variance = covariance.diagonal()
    error = samples.T @ samples / pairs - covariance
    assert (error / ((variance.outer(variance) + covariance.square()) / pairs).sqrt()).abs().max() < 5
    assert (samples.mean(0) / (variance / pairs).sqrt()).abs().max() < 5


def test_beside_the_samples_a_few_rows_are_held():
    layout = segment_table([2**16])
    size = arena_size(layout)
    state = torch.zeros(size), torch.rand(size), torch.randn(RANK, size), layout
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        drawn(state, 64)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak <= 4 * size * (64 + 6)


@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_than_two_deviations(state, rank):
    mean, std, deviations, layout = state
    with pytest.raises(ValueError, match=f'at least two deviations, got {rank}: use method="antithetic"'):
        drawn((mean, std, deviations[:rank], layout), 2)
