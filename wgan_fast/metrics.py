"""Measures of a trained generator: distance to the data, modes covered, and what the critic says."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from wgan_fast.errors import InputError

_Samples = Tensor | ArrayLike


def _rows(samples: _Samples, name: str) -> NDArray[np.float64]:
    """Flatten samples to a finite `[N, D]` matrix."""
    if isinstance(samples, Tensor):
        samples = samples.detach().double().cpu().numpy()
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim < 1 or array.size == 0:
        raise InputError(f"{name} must hold at least one sample, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} must be finite, got NaN or infinity")
    return array.reshape(len(array), -1)


def _same_dimension(a: NDArray[np.float64], b: NDArray[np.float64], names: str) -> None:
    if a.shape[1] != b.shape[1]:
        raise InputError(f"{names} must have samples of one size, got {a.shape[1]} and {b.shape[1]} values per sample")


def sliced_wasserstein(a: _Samples, b: _Samples, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance between two sets of samples (Bonneel et al. 2015), with POT.

    The root mean, over random directions, of the squared Wasserstein distance between the projections. It does not
    depend on a critic, needs no features of another network, and costs O(projections · N · (D + log N)).

    Args:
        a: Samples, `[N, *D]`; flattened, in float64.
        b: Samples, `[M, *D]`.
        projections: Number of random directions.
        seed: Seed of the directions: the same seed gives the same directions for the same D.

    Returns:
        The distance, in the units of the samples. Between samples of the same distribution it is not 0 but shrinks
        with their number: compare it with that between two real sets of the same size.

    Raises:
        InputError: The samples are empty, not finite or of different sizes, or projections is below 1.
        ImportError: POT is not installed.
    """
    if projections < 1:
        raise InputError(f"projections must be at least 1, got {projections}")
    rows_a, rows_b = _rows(a, "a"), _rows(b, "b")
    _same_dimension(rows_a, rows_b, "a and b")
    try:
        import ot
    except ImportError as error:
        raise ImportError("sliced_wasserstein needs POT: pip install 'wgan_fast[train]'") from error
    return float(ot.sliced_wasserstein_distance(rows_a, rows_b, n_projections=projections, seed=seed))


@dataclass(frozen=True)
class ModeCoverage:
    """How generated samples spread over the modes of a known mixture.

    Attributes:
        covered: Modes with at least one high-quality sample.
        total: Modes of the mixture.
        high_quality: Share of the samples that are within three standard deviations of their nearest mode.
        counts: High-quality samples per mode.
        reverse_kl: Kullback-Leibler divergence of the samples' distribution over nearest modes from the uniform one,
            in nats: 0 for equal shares, log(total) for a single mode.
    """

    covered: int
    total: int
    high_quality: float
    counts: tuple[int, ...]
    reverse_kl: float


def mode_coverage(samples: _Samples, modes: _Samples, std: float) -> ModeCoverage:
    """Count the modes of an isotropic Gaussian mixture with equal weights that samples reach.

    The measures of VEEGAN (Srivastava et al. 2017, arXiv:1705.07761) and PacGAN (Lin et al. 2018,
    arXiv:1712.04086): a sample is of high quality when it lies within three standard deviations of its nearest mode,
    and a mode is covered when at least one high-quality sample is nearest to it. The reverse KL divergence counts
    all samples.

    Args:
        samples: Generated samples, `[N, D]`.
        modes: Centres of the mixture, `[K, D]`.
        std: Standard deviation of every component, in the units of the samples.

    Returns:
        The coverage.

    Raises:
        InputError: The samples or modes are empty, not finite or of different sizes, or std is not positive.
    """
    if not (math.isfinite(std) and std > 0):
        raise InputError(f"std must be positive and finite, got {std}")
    rows, centres = _rows(samples, "samples"), _rows(modes, "modes")
    _same_dimension(rows, centres, "samples and modes")
    # Not through the inner product, which cancels for points much closer to each other than to the origin.
    distances = torch.cdist(
        torch.from_numpy(rows), torch.from_numpy(centres), compute_mode="donot_use_mm_for_euclid_dist"
    )
    distance, nearest = (tensor.numpy() for tensor in distances.min(dim=1))
    good = distance <= 3 * std
    counts = np.bincount(nearest[good], minlength=len(centres))
    shares = np.bincount(nearest, minlength=len(centres)) / len(rows)
    present = shares[shares > 0]
    return ModeCoverage(
        covered=int((counts > 0).sum()),
        total=len(centres),
        high_quality=float(good.mean()),
        counts=tuple(counts.tolist()),
        reverse_kl=float((present * np.log(present * len(centres))).sum()),
    )


def wasserstein_estimate(critic: nn.Module, real: Tensor, fake: Tensor, batch_size: int = 256) -> float:
    """The critic's estimate of the Wasserstein distance, mean D(real) - mean D(fake).

    The critic runs in evaluation mode and without gradients; the modes of its modules are restored. For a critic
    with unit gradient norm this is the estimate of Arjovsky et al. 2017 (arXiv:1701.07875); on held-out samples it
    shows whether the critic overfits (Gulrajani et al. 2017, arXiv:1704.00028, on detecting overfitting).

    Args:
        critic: Maps `[N, *D]` to one score per sample.
        real: Real samples, `[N, *D]`; moved to the critic's device batch by batch.
        fake: Generated samples, `[M, *D]`.
        batch_size: Samples per forward.

    Returns:
        The estimate.

    Raises:
        InputError: real or fake is empty, or batch_size is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    for name, samples in (("real", real), ("fake", fake)):
        if len(samples) == 0:
            raise InputError(f"{name} must hold at least one sample, got shape {list(samples.shape)}")
    modes = [(module, module.training) for module in critic.modules()]
    critic.eval()
    try:
        return _mean_score(critic, real, batch_size) - _mean_score(critic, fake, batch_size)
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _mean_score(critic: nn.Module, samples: Tensor, batch_size: int) -> float:
    device = next((p.device for p in critic.parameters()), samples.device)
    scores = [critic(batch.to(device)).double() for batch in torch.split(samples, batch_size)]
    return float(torch.cat(scores).mean())
