"""The measures are what their definitions say."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from wgan_fast import metrics
from wgan_fast.errors import InputError


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
