"""Adversarial losses as pairs of functions of the critic's raw scores: ``loss.critic`` and ``loss.generator``.

A score is the critic's output before any sigmoid, shape ``[N]`` or ``[N, 1]``. Every loss is a mean over
samples, taken in float32 for half-precision scores, and differentiable to any order where its formula is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .precision import accumulation_dtype


@dataclass(frozen=True)
class AdversarialLoss:
    """What the critic and the generator minimise.

    Attributes:
        name: How configurations refer to the loss.
        critic: ``(real_scores [N], fake_scores [N]) -> 0-dim``.
        generator: ``(fake_scores [N]) -> 0-dim``.
    """

    name: str
    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _mean(scores: Tensor) -> Tensor:
    return scores.mean(dtype=accumulation_dtype(scores.dtype))


def _wasserstein_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return _mean(fake_scores) - _mean(real_scores)


def _wasserstein_generator(fake_scores: Tensor) -> Tensor:
    return -_mean(fake_scores)


def _non_saturating_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return _mean(F.softplus(-real_scores)) + _mean(F.softplus(fake_scores))


def _non_saturating_generator(fake_scores: Tensor) -> Tensor:
    return _mean(F.softplus(-fake_scores))


def _least_squares_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return 0.5 * (_mean((real_scores - 1).square()) + _mean(fake_scores.square()))


def _least_squares_generator(fake_scores: Tensor) -> Tensor:
    return 0.5 * _mean((fake_scores - 1).square())


def _hinge_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return _mean(F.relu(1 - real_scores)) + _mean(F.relu(1 + fake_scores))


wasserstein = AdversarialLoss("wasserstein", _wasserstein_critic, _wasserstein_generator)
"""E[D(fake)] - E[D(real)]: the negated Wasserstein-1 estimate (Arjovsky et al. 2017, arXiv:1701.07875)."""

non_saturating = AdversarialLoss("non_saturating", _non_saturating_critic, _non_saturating_generator)
"""Binary cross-entropy on logits with the generator's log D trick (Goodfellow et al. 2014, arXiv:1406.2661)."""

least_squares = AdversarialLoss("least_squares", _least_squares_critic, _least_squares_generator)
"""Squared distance of scores to the labels 1 (real) and 0 (fake) (Mao et al. 2017, arXiv:1611.04076)."""

hinge = AdversarialLoss("hinge", _hinge_critic, _wasserstein_generator)
"""Hinge critic with a linear generator loss (Lim and Ye 2017, arXiv:1705.02894)."""

LOSSES = {loss.name: loss for loss in (wasserstein, non_saturating, least_squares, hinge)}


def get_loss(loss: str | AdversarialLoss) -> AdversarialLoss:
    """Resolve a loss by name; a loss itself passes through.

    Raises:
        ValueError: For a name that is not in ``LOSSES``.
        TypeError: For anything that is neither a name nor an ``AdversarialLoss``.
    """
    if isinstance(loss, AdversarialLoss):
        return loss
    if not isinstance(loss, str):
        raise TypeError(f"loss must be a name or an AdversarialLoss, got {type(loss).__name__}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss]
