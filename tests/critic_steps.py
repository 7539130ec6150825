"""A critic step as the textbook has it, and what is compared."""

from typing import Any

import textbook
import torch
from textbook import CRITIC_LOSSES
from torch import Tensor, nn

from wgan_fast import CriticStepResult, PenaltyConfig

PENALTIES = {
    "wgan_gp": PenaltyConfig.wgan_gp(),
    "wgan_lp": PenaltyConfig(weight=3.5, target=0.25, one_sided=True),
    "r1": PenaltyConfig.r1(),
    "r2": PenaltyConfig.r2(),
    "both": PenaltyConfig(weight=0.5, target=0.0, at="both"),
    "dragan": PenaltyConfig.dragan(),
    "none": None,
}


def dense_critic(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1)).to(dtype)


def points_of(config: PenaltyConfig, real: Tensor, fake: Tensor, alpha: Tensor) -> list[Tensor]:
    """The points as the textbook has them, with DRAGAN's noise drawn as the step will draw it from the same state."""
    with torch.random.fork_rng():
        noise = torch.rand(real.shape, dtype=alpha.dtype)
    return textbook.points_at(config.at, real, fake, alpha, noise)


def textbook_step(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    *,
    loss: str = "wasserstein",
    config: PenaltyConfig | None = PENALTIES["wgan_gp"],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The figures of one step, as a training script computes them; "loss" has a graph."""
    real_scores, fake_scores = critic(real, *args, **(kwargs or {})), critic(fake.detach(), *args, **(kwargs or {}))
    value = CRITIC_LOSSES[loss](real_scores, fake_scores)
    penalty, norm = torch.zeros_like(value), torch.full_like(value, torch.nan)
    if config is not None:
        points = points_of(config, real, fake, alpha)
        options = {"group_size": config.group_size, "args": args, "kwargs": kwargs}
        penalty = textbook.penalty(
            critic, points, weight=config.weight, target=config.target, one_sided=config.one_sided, **options
        )
        norm = torch.cat([textbook.gradient_norms(critic, x, **options) for x in points]).mean()
    return {
        "loss": value + penalty,
        "penalty": penalty,
        "wasserstein": real_scores.mean() - fake_scores.mean(),
        "real_score": real_scores.mean(),
        "fake_score": fake_scores.mean(),
        "gradient_norm": norm,
    }


def assert_equal_figures(result: CriticStepResult, expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    # Scores are of order 1 and their means may cancel: an absolute slack of 4 units in the last place of 1.
    for name in CriticStepResult._fields:
        actual = getattr(result, name)
        assert actual.shape == ()
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected[name].detach(), rtol=rtol, atol=1e-15, equal_nan=True, msg=name)
