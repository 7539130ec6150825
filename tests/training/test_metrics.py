"""The measures are what their definitions say."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from wgan_fast.errors import InputError
from wgan_fast.training import metrics


def directions(dimension: int, count: int, seed: int) -> np.ndarray:
    """The directions that POT draws, so that exact values can be computed for them."""
    ot = pytest.importorskip("ot")
    return ot.sliced.get_random_projections(dimension, count, seed)


def test_sliced_wasserstein_in_one_dimension_is_the_wasserstein_distance():
    # Sorted pairs are (0, 1), (1, 2) and (3, 6): W2 = sqrt((1 + 1 + 9) / 3), whatever the direction's sign.
    distance = metrics.sliced_wasserstein([[3.0], [0.0], [1.0]], [[1.0], [6.0], [2.0]], projections=7)
    assert distance == pytest.approx(math.sqrt(11 / 3), rel=1e-12)


def test_sliced_wasserstein_between_sets_of_different_sizes():
    # Half of b's mass (at 0) comes from a's two points (0, 2), the other half (at 4) likewise; in quarters of mass:
    # a = 0 0 2 2, b = 0 0 4 4, so W2^2 = (0 + 0 + 4 + 4) / 4.
    distance = metrics.sliced_wasserstein([[0.0], [2.0]], [[0.0], [0.0], [4.0], [4.0]])
    assert distance == pytest.approx(math.sqrt(2), rel=1e-12)


def test_sliced_wasserstein_of_a_translation_is_the_mean_square_of_its_projections():
    rng = np.random.default_rng(0)
    samples, shift = rng.normal(size=(33, 3, 5)), rng.normal(size=(3, 5))
    expected = np.sqrt(np.mean((shift.ravel() @ directions(15, 63, seed=4)) ** 2))
    distance = metrics.sliced_wasserstein(samples, samples + shift, projections=63, seed=4)
    assert distance == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_general_samples_matches_sorted_projections():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(63, 2)), 3 * rng.normal(size=(63, 2)) + 1
    rays = directions(2, 100, seed=0)
    expected = np.sqrt(np.mean((np.sort(a @ rays, axis=0) - np.sort(b @ rays, axis=0)) ** 2))
    assert metrics.sliced_wasserstein(a, b, projections=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sliced_wasserstein_takes_tensors_and_computes_in_double_precision(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(9, 1, 4, 4, dtype=dtype, requires_grad=True), torch.randn(7, 1, 4, 4, dtype=dtype)
    expected = metrics.sliced_wasserstein(a.detach().double().numpy(), b.double().numpy())
    assert metrics.sliced_wasserstein(a, b) == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1.0, 2.0]], [[1.0]]), {}, "samples of one size, got 2 and 1"),
        (([], [[1.0]]), {}, "a must hold at least one sample"),
        (([[1.0]], [[math.nan]]), {}, "b must be finite"),
        (([[1.0]], [[2.0]]), {"projections": 0}, "projections must be at least 1, got 0"),
    ],
)
def test_sliced_wasserstein_refuses_what_it_cannot_measure(arguments, options, message):
    with pytest.raises(InputError, match=message):
        metrics.sliced_wasserstein(*arguments, **options)


def test_missing_pot_is_said_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"needs POT: pip install 'wgan_fast\[train\]'"):
        metrics.sliced_wasserstein([[1.0]], [[2.0]])


# Fréchet distance


def textbook_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The formula of Heusel et al. 2017, with a matrix square root."""
    linalg = pytest.importorskip("scipy.linalg")
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.parametrize(("n", "m", "dimension"), [(63, 100, 7), (100, 1000, 33), (500, 63, 20)])
def test_frechet_distance_is_the_formula_with_a_matrix_square_root(n, m, dimension):
    rng = np.random.default_rng(n)
    a = rng.normal(size=(n, dimension))
    b = 0.5 * rng.normal(size=(m, dimension)) @ rng.normal(size=(dimension, dimension)) + 0.3
    # The root of a product of covariances is known to about the square root of its smallest eigenvalue's error.
    assert metrics.frechet_distance(a, b) == pytest.approx(textbook_frechet(a, b), rel=1e-7)


def test_frechet_distance_of_a_shift_and_of_a_scaling_is_known():
    a = np.random.default_rng(0).normal(size=(100, 3, 2))
    # Fewer samples than dimensions: the covariance is singular, and the distance still that of the means.
    few = a[:3]
    shift = np.arange(6.0).reshape(3, 2)
    assert metrics.frechet_distance(few, few + shift) == pytest.approx(55, rel=1e-9)
    centred = a - a.mean(0)
    expected = 4 * centred.reshape(100, 6).var(axis=0, ddof=1).sum()  # (3 - 1)^2 times the total variance
    assert metrics.frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")

    class Identity(nn.Module):
        num_features = 5

        def forward(self, x):
            return x

    a, b = torch.randn(200, 5).double(), 2 * torch.randn(100, 5).double() + 1
    measure = fid.FrechetInceptionDistance(feature=Identity())
    measure.update(a, real=True)
    measure.update(b, real=False)
    assert metrics.frechet_distance(a, b) == pytest.approx(measure.compute().item(), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0], [0.0, 1.0]], "a must hold at least 2 samples, got 1"),
        ([[1.0], [2.0]], [[1.0, 2.0], [0.0, 1.0]], "a and b must have samples of one size, got 1 and 2"),
        ([[1.0], [math.inf]], [[1.0], [2.0]], "a must be finite"),
    ],
)
def test_frechet_distance_refuses_what_it_cannot_measure(a, b, message):
    with pytest.raises(InputError, match=message):
        metrics.frechet_distance(a, b)


# Precision, recall, density, coverage


def textbook_manifold(real: np.ndarray, fake: np.ndarray, k: int) -> metrics.Manifold:
    """The definitions of Kynkäänniemi et al. 2019 and Naeem et al. 2020, sample by sample."""

    def radius(point, own):
        return sorted(np.linalg.norm(point - other) for other in own)[k]

    real_radii, fake_radii = [radius(x, real) for x in real], [radius(y, fake) for y in fake]
    inside = [[np.linalg.norm(x - y) < r for y in fake] for x, r in zip(real, real_radii)]
    reached = [any(np.linalg.norm(x - y) < r for y, r in zip(fake, fake_radii)) for x in real]
    return metrics.Manifold(
        precision=np.mean([any(row[j] for row in inside) for j in range(len(fake))]),
        recall=np.mean(reached),
        density=np.sum(inside) / (k * len(fake)),
        coverage=np.mean([any(row) for row in inside]),
    )


@pytest.mark.parametrize(("n", "m", "nearest"), [(63, 30, 5), (30, 63, 1), (50, 31, 3)])
def test_manifold_follows_the_definitions(n, m, nearest, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 13)
    rng = np.random.default_rng(nearest)
    real, fake = rng.normal(size=(n, 2)), 0.7 * rng.normal(size=(m, 2)) + 0.6
    expected = textbook_manifold(real, fake, nearest)
    assert len(set(expected)) == 4, "figures that coincide could be swapped"
    assert metrics.manifold(real, fake, nearest=nearest) == pytest.approx(expected, rel=1e-12)


def test_manifold_is_that_of_prdc():
    prdc = pytest.importorskip("prdc", reason="prdc is not installed")
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(1100, 8)), 0.8 * rng.normal(size=(300, 8)) + 0.2
    expected = prdc.compute_prdc(real, fake, 5)
    assert metrics.manifold(real, fake)._asdict() == pytest.approx(expected, rel=1e-12)


def test_manifold_tells_a_generator_of_one_mode_from_one_of_noise():
    rng = np.random.default_rng(0)
    centres = 10 * np.eye(4)
    real = centres[rng.integers(4, size=200)] + rng.normal(size=(200, 4))
    one_mode = metrics.manifold(real, centres[0] + rng.normal(size=(200, 4)))
    assert one_mode.precision > 0.9
    assert one_mode.coverage < 0.35
    noise = metrics.manifold(real, 30 * rng.normal(size=(200, 4)))
    assert max(noise.precision, noise.density, noise.coverage) < 0.1


@pytest.mark.parametrize("nearest", [0, 3])
def test_manifold_refuses_neighbours_that_there_are_not(nearest):
    with pytest.raises(InputError, match=f"less than the 3 samples of a set, got {nearest}"):
        metrics.manifold(np.zeros((3, 2)), np.ones((4, 2)), nearest=nearest)


MODES = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]


def test_mode_coverage_counts_samples_within_three_deviations_of_the_nearest_mode():
    samples = [
        [0.0, 1.4999],  # 2.9998 deviations from the first mode
        [0.9, -1.2],  # 3 exactly, up to rounding, taken in below by a hair
        [0.0, 1.5001],  # 3.0002
        [10.0, 1.0],  # the second mode
        [0.0, 8.0],  # 4 from the third, which stays uncovered
    ]
    samples[1] = [value * (1 - 1e-12) for value in samples[1]]
    coverage = metrics.mode_coverage(samples, MODES, std=0.5)
    assert coverage.counts == (2, 1, 0)
    assert (coverage.covered, coverage.total) == (2, 3)
    assert coverage.high_quality == 3 / 5
    # Nearest modes, far samples included: 3, 1 and 1 of 5.
    expected = 0.6 * math.log(1.8) + 0.4 * math.log(0.6)
    assert coverage.reverse_kl == pytest.approx(expected, rel=1e-12)


def test_reverse_kl_goes_from_zero_to_the_logarithm_of_the_number_of_modes():
    assert metrics.mode_coverage(MODES, MODES, std=1).reverse_kl == pytest.approx(0, abs=1e-15)
    assert metrics.mode_coverage(MODES[:1] * 4, MODES, std=1).reverse_kl == pytest.approx(math.log(3))


def test_mode_coverage_of_the_mixture_itself():
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(5.0)), axis=-1).reshape(-1, 2)
    samples = grid[rng.integers(25, size=10_000)] + 0.05 * rng.normal(size=(10_000, 2))
    coverage = metrics.mode_coverage(torch.from_numpy(samples).float(), grid, std=0.05)
    assert coverage.covered == 25
    # In two dimensions 1 - exp(-9 / 2) of a Gaussian lies within three deviations; five standard errors.
    share = 1 - math.exp(-4.5)
    assert abs(coverage.high_quality - share) < 5 * math.sqrt(share * (1 - share) / 10_000)
    # 2 N KL is chi-square distributed with 24 degrees of freedom: 65 is exceeded once in 100,000.
    assert coverage.reverse_kl < 65 / 20_000


def test_mode_coverage_is_exact_far_from_the_origin():
    samples = [[1e6, 1e6 + 0.0029], [1e6, 1e6 + 0.0031]]
    assert metrics.mode_coverage(samples, [[1e6, 1e6]], std=0.001).counts == (1,)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_mode_coverage_refuses_an_unusable_deviation(std):
    with pytest.raises(InputError, match="std must be positive and finite"):
        metrics.mode_coverage(MODES, MODES, std)


class CountingCritic(nn.Module):
    """Scores are the sums of the samples, plus 100 for every batch in training mode."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(3).eval()
        self.active = nn.Dropout()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.batches = []

    def forward(self, x):
        self.batches.append((len(x), torch.is_grad_enabled()))
        return self.scale * x.sum(1) + 100 * self.training


@pytest.mark.parametrize("batch_size", [1, 4, 7, 256])
def test_wasserstein_estimate_is_the_difference_of_the_mean_scores(batch_size):
    torch.manual_seed(0)
    real, fake = torch.randn(7, 3), torch.randn(10, 3)
    critic = CountingCritic()
    estimate = metrics.wasserstein_estimate(critic, real, fake, batch_size)
    expected = real.double().sum(1).mean() - fake.double().sum(1).mean()
    assert estimate == pytest.approx(expected.item(), abs=1e-6)  # the critic itself sums in float32
    assert max(n for n, _ in critic.batches) <= batch_size
    assert not any(grad for _, grad in critic.batches)


def test_wasserstein_estimate_restores_the_mode_of_every_module():
    critic = CountingCritic()
    metrics.wasserstein_estimate(critic, torch.randn(2, 3), torch.randn(2, 3))
    assert (critic.training, critic.frozen.training, critic.active.training) == (True, False, True)


def test_wasserstein_estimate_restores_the_modes_after_an_error():
    critic = CountingCritic()
    with pytest.raises(IndexError):
        metrics.wasserstein_estimate(critic, torch.randn(2), torch.randn(2))
    assert critic.training


@pytest.mark.parametrize(
    ("real", "fake", "batch_size", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), 4, "real must hold at least one sample"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 4, "fake must hold at least one sample"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0, "batch_size must be at least 1"),
    ],
)
def test_wasserstein_estimate_refuses_empty_sets(real, fake, batch_size, message):
    with pytest.raises(InputError, match=message):
        metrics.wasserstein_estimate(CountingCritic(), real, fake, batch_size)
