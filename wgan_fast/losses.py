"""Adversarial losses as pairs of functions of the critic's raw scores: ``loss.critic`` and ``loss.generator``.

A score is the critic's output before any sigmoid, shape ``[N]`` or ``[N, 1]``. Every loss is a mean over
samples, computed in float32 for half-precision scores, and differentiable to any order where its formula is.
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


def _wide(scores: Tensor) -> Tensor:
    # Before the formula, not only before the mean: in float16 a score of 256 overflows when squared.
    return scores.to(accumulation_dtype(scores.dtype))


def _wasserstein_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return _wide(fake_scores).mean() - _wide(real_scores).mean()


def _wasserstein_generator(fake_scores: Tensor) -> Tensor:
    return -_wide(fake_scores).mean()


def _non_saturating_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    # softplus(-s) = -logsigmoid(s), but PyTorch's softplus is the identity above 20: 1e-9 off in the gradient.
    return -F.logsigmoid(_wide(real_scores)).mean() - F.logsigmoid(-_wide(fake_scores)).mean()


def _non_saturating_generator(fake_scores: Tensor) -> Tensor:
    return -F.logsigmoid(_wide(fake_scores)).mean()


def _least_squares_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return 0.5 * ((_wide(real_scores) - 1).square().mean() + _wide(fake_scores).square().mean())


def _least_squares_generator(fake_scores: Tensor) -> Tensor:
    return 0.5 * (_wide(fake_scores) - 1).square().mean()


def _hinge_critic(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    return F.relu(1 - _wide(real_scores)).mean() + F.relu(1 + _wide(fake_scores)).mean()


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
