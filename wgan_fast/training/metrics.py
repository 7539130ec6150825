"""Measures of a trained generator: distance to the data, modes covered, and what the critic says.

`quality` applies the ones that need features to those of a classifier.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..errors import InputError

_Samples = Tensor | ArrayLike

_BLOCK = 1024  # rows of a matrix of distances that are held at a time


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


def frechet_distance(a: _Samples, b: _Samples) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv:1706.08500).

    d² = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), the quantity that FID takes of Inception's features. With
    Σ = RᵀR, the trace of the root is the sum of the singular values of R_a R_bᵀ: no root of a matrix that may be
    singular is taken, and nothing complex appears.

    Args:
        a: Features, `[N, *D]`, N at least 2; flattened, in float64.
        b: Features, `[M, *D]`, M at least 2.

    Returns:
        d², in the squared units of the features. It is biased upwards for few samples: compare it with that between
        two real sets of the same size.

    Raises:
        InputError: The features are fewer than two, not finite or of different sizes.
    """
    rows_a, rows_b = _rows(a, "a"), _rows(b, "b")
    _same_dimension(rows_a, rows_b, "a and b")
    means, roots = [], []
    for name, rows in (("a", rows_a), ("b", rows_b)):
        if len(rows) < 2:
            raise InputError(f"{name} must hold at least 2 samples, got {len(rows)}")
        means.append(rows.mean(axis=0))
        roots.append(np.linalg.qr((rows - means[-1]) / math.sqrt(len(rows) - 1)).R)
    root_a, root_b = roots
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    # The trace of a covariance RᵀR is the squared Frobenius norm of R.
    squared = ((means[0] - means[1]) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * shared
    return max(float(squared), 0.0)


class Manifold(NamedTuple):
    """How two sets of features lie in one another's neighbourhoods.

    Attributes:
        precision: Share of the generated samples that lie in the neighbourhood of a real one.
        recall: Share of the real samples that lie in the neighbourhood of a generated one.
        density: Real neighbourhoods that a generated sample lies in, over k; its mean is 1 for equal distributions.
        coverage: Share of the real samples whose neighbourhood holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: _Samples, fake: _Samples, *, nearest: int = 5) -> Manifold:
    """Precision, recall, density and coverage of generated samples.

    Precision and recall are those of Kynkäänniemi et al. 2019 (arXiv:1904.06991), density and coverage those of Naeem
    et al. 2020 (arXiv:2002.09797), whose reference code, `prdc`, this agrees with. The neighbourhood of a sample is
    the open ball that reaches to its k-th nearest neighbour in its own set.

    Args:
        real: Features of real samples, `[N, *D]`; flattened, in float64.
        fake: Features of generated samples, `[M, *D]`.
        nearest: k, less than N and M.

    Returns:
        The four shares. They depend on N and M: compare them with those between two real sets of the same size.

    Raises:
        InputError: The features are empty, not finite or of different sizes, or nearest is not in 1..min(N, M) − 1.
    """
    rows_real, rows_fake = _rows(real, "real"), _rows(fake, "fake")
    _same_dimension(rows_real, rows_fake, "real and fake")
    fewest = min(len(rows_real), len(rows_fake))
    if not 1 <= nearest < fewest:
        raise InputError(f"nearest must be at least 1 and less than the {fewest} samples of a set, got {nearest}")
    a, b = torch.from_numpy(rows_real), torch.from_numpy(rows_fake)
    radii_a, radii_b = _radii(a, nearest), _radii(b, nearest)
    within = torch.zeros(len(b), dtype=torch.int64)  # of how many real neighbourhoods
    recalled = covered = 0
    for rows, radii in zip(torch.split(a, _BLOCK), torch.split(radii_a, _BLOCK)):
        distances = _distances(rows, b)
        inside = distances < radii[:, None]
        within += inside.sum(0)
        recalled += int((distances < radii_b).any(1).sum())
        covered += int(inside.any(1).sum())
    return Manifold(
        precision=float((within > 0).double().mean()),
        recall=recalled / len(a),
        density=float(within.double().mean()) / nearest,
        coverage=covered / len(a),
    )


def _radii(rows: Tensor, nearest: int) -> Tensor:
    """Distance from each sample to its k-th nearest neighbour; the sample itself comes first."""
    return torch.cat([_distances(part, rows).kthvalue(nearest + 1, dim=1).values for part in torch.split(rows, _BLOCK)])


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not through the inner product, which cancels for points much closer to each other than to the origin.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
    distances = _distances(torch.from_numpy(rows), torch.from_numpy(centres))
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


def wasserstein_estimate(
    critic: nn.Module, real: Tensor, fake: Tensor, batch_size: int = 256, *, labels: Tensor | None = None
) -> float:
    """Return the critic's estimate of the Wasserstein distance, mean D(real) - mean D(fake).

    The critic runs in evaluation mode and without gradients; the modes of its modules are restored. For a critic
    with unit gradient norm this is the estimate of Arjovsky et al. 2017 (arXiv:1701.07875); on held-out samples it
    shows whether the critic overfits (Gulrajani et al. 2017, arXiv:1704.00028, on detecting overfitting).

    Args:
        critic: Maps `[N, *D]` to one score per sample.
        real: Real samples, `[N, *D]`; moved to the critic's device, and floats to its dtype, batch by batch.
        fake: Generated samples, `[M, *D]`.
        batch_size: Samples per forward.
        labels: For a critic that takes them: the classes of both, `[N]`, N being M then.

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
        return _mean_score(critic, real, batch_size, labels) - _mean_score(critic, fake, batch_size, labels)
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _mean_score(critic: nn.Module, samples: Tensor, batch_size: int, labels: Tensor | None) -> float:
    like = next((p for p in critic.parameters() if p.is_floating_point()), samples)
    dtype = like.dtype if samples.is_floating_point() else samples.dtype
    further = [()] * len(samples) if labels is None else [(y,) for y in torch.split(labels.to(like.device), batch_size)]
    scores = [
        critic(batch.to(like.device, dtype), *y).double() for batch, y in zip(torch.split(samples, batch_size), further)
    ]
    return float(torch.cat(scores).mean())
