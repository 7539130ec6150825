"""Networks of your own for the command line: run it where this file lies.

wgan-fast train --data mnist5k --model own_model:build --steps 500
"""

import math

from torch import Tensor, nn


class Generator(nn.Module):
    """Maps noise [N, latent_dim] to samples; the trainer reads the noise's length from the attribute."""

    latent_dim = 16

    def __init__(self, sample_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(self.latent_dim, 64), nn.ReLU(), nn.Linear(64, math.prod(sample_shape)))
        self.sample_shape = sample_shape

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).tanh().view(-1, *self.sample_shape)


def build(sample_shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Called with the shape of one sample, such as (1, 28, 28); returns the generator and the critic."""
    units = math.prod(sample_shape)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(units, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    return Generator(sample_shape), critic
