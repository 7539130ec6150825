"""Networks of published papers: the penalty and the whole step as plain autograd has them, on four passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import textbook
import torch
from critic_steps import PENALTIES, assert_equal_figures, textbook_step
from published_critics import (
    InteratomicPotential,
    SignedDistance,
    TextCritic,
    r3gan_discriminator,
    stylegan2_discriminator,
)
from torch import Tensor, nn

from wgan_fast import CriticStep, PenaltyConfig, explain, gradient_penalty


def gaussian(*shape: int) -> tuple[Tensor, Tensor]:
    real, fake = textbook.random_pair(*shape)
    return real, fake


def molecules(atoms: int = 5) -> tuple[Tensor, Tensor]:
    """Atoms on a spiral, no two of them near each other, and displaced: within the cutoff and beyond it."""
    at = torch.arange(atoms, dtype=torch.float64)
    spiral = torch.stack([torch.cos(1.5 * at), torch.sin(1.5 * at), 0.8 * at], 1)
    return spiral + 0.1 * torch.randn(3, atoms, 3).double(), spiral + 0.2 * torch.randn(3, atoms, 3).double()


def texts(length: int = 16, characters: int = 12) -> tuple[Tensor, Tensor]:
    letters = torch.randint(characters, (3, length))
    real = nn.functional.one_hot(letters, characters).double()
    return real, torch.randn(3, length, characters).double().softmax(2)


@dataclass(frozen=True)
class Published:
    """A network, samples for it, and how its batches must go through it: None where they may go either way."""

    make: Callable[[], nn.Module]
    samples: Callable[[], tuple[Tensor, Tensor]]
    schedule: str | None = "batched"

    def network(self) -> nn.Module:
        """The network in float64, off the initial values at which some of its layers are zero."""
        torch.manual_seed(1)
        network = self.make().double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return network

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(2)
        real, fake = self.samples()
        return real, fake, torch.rand(len(real), dtype=torch.float64)


NETWORKS = {
    "stylegan2": Published(stylegan2_discriminator, lambda: gaussian(8, 3, 16, 16), "split"),
    "stylegan2, one group": Published(lambda: stylegan2_discriminator(8, 4), lambda: gaussian(3, 3, 8, 8), "split"),
    "r3gan": Published(r3gan_discriminator, lambda: gaussian(3, 3, 16, 16)),
    "interatomic potential": Published(InteratomicPotential, molecules, None),
    "signed distance": Published(SignedDistance, lambda: gaussian(7, 3)),
    "text": Published(TextCritic, texts),
}
CONFIGS = {name: PENALTIES[name] for name in ("wgan_gp", "r1")}


@pytest.fixture(params=NETWORKS)
def published(request: pytest.FixtureRequest) -> Published:
    return NETWORKS[request.param]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PenaltyConfig:
    return CONFIGS[request.param]


def options(config: PenaltyConfig) -> dict[str, Any]:
    return {"weight": config.weight, "target": config.target}


def test_four_passes_run_it(published: Published) -> None:
    explanation = explain(published.network(), published.batch()[0])
    assert (explanation.engine, explanation.reason) == ("four_pass", None)
    assert published.schedule in (explanation.schedule, None)


def test_the_penalty_and_its_gradients_are_those_of_autograd(published: Published, config: PenaltyConfig) -> None:
    network, (real, fake, alpha) = published.network(), published.batch()
    points = textbook.points_at(config.at, real, fake, alpha)
    expected = textbook.penalty(network, points, **options(config))
    theirs = textbook.gradients(expected, network)
    assert any(gradient.any() for gradient in theirs.values())
    for _ in range(2):
        ours = gradient_penalty(network, real, fake, at=config.at, alpha=alpha, engine="four_pass", **options(config))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
        textbook.assert_equal_gradients(textbook.gradients(ours, network), theirs)


def test_the_step_and_its_gradients_are_those_of_autograd(published: Published, config: PenaltyConfig) -> None:
    network, (real, fake, alpha) = published.network(), published.batch()
    loss = "non_saturating" if config.at == "real" else "wasserstein"
    expected = textbook_step(network, real, fake, alpha, loss=loss, config=config)
    theirs = textbook.gradients(expected["loss"], network)
    step = CriticStep(network, loss=loss, penalty=config, engine="four_pass")
    for _ in range(2):
        network.zero_grad()
        assert_equal_figures(step(real, fake, alpha), expected)
        textbook.assert_equal_gradients(textbook.gradients_left_in(network), theirs)


def test_initial_values_that_are_zero_are_no_exception(config: PenaltyConfig) -> None:
    torch.manual_seed(1)
    network, (real, fake, alpha) = r3gan_discriminator().double(), NETWORKS["r3gan"].batch()
    points = textbook.points_at(config.at, real, fake, alpha)
    theirs = textbook.gradients(textbook.penalty(network, points, **options(config)), network)
    ours = gradient_penalty(network, real, fake, at=config.at, alpha=alpha, engine="four_pass", **options(config))
    textbook.assert_equal_gradients(textbook.gradients(ours, network), theirs)
