"""Networks that are told a sample's class: any generator, and any critic that ends in a linear layer.

A conditional generator maps noise ``[N, latent_dim]`` and labels ``[N]`` (int64, below the number of classes) to
samples ``[N, *D]``; a conditional critic maps samples and labels to one score each, ``[N]``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SPREAD = 3.0
"""Standard deviation of the embeddings at first, the noise's being 1: classes begin apart and not as one. On `digits`
the classifier agreed with the label of 97 % of the MLP's samples after 900 steps with 3, of 88 % with 1, at a Fréchet
distance of 1.50 against 2.22."""


class ConditionalGenerator(nn.Module):
    """A generator whose noise is joined by an embedding of the label, as long as the noise (Mirza and Osindero 2014).

    The embeddings are drawn from a normal distribution of standard deviation `SPREAD`, and trained.

    Args:
        latent_dim: Length of the noise.
        classes: Number of classes.
        make: Makes the generator of vectors of a given length: of the noise and the embedding.
    """

    def __init__(self, latent_dim: int, classes: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(classes, latent_dim)
        nn.init.normal_(self.embedding.weight, std=SPREAD)
        self.layers = make(2 * latent_dim)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return samples `[N, *D]` of the classes `[N]`, from noise `[N, latent_dim]`."""
        out: Tensor = self.layers(torch.cat((noise, self.embedding(labels)), dim=1))
        return out


class ProjectionCritic(nn.Module):
    """The projection discriminator of Miyato and Koyama 2018 (arXiv:1802.05637).

    With φ(x) the features that enter the critic's last layer, D(x, y) = wᵀφ(x) + b + v_yᵀφ(x): every class adds a
    direction v_y of its own. These begin as a linear layer's weights do.

    Args:
        critic: The critic without labels; its last layer is linear.
        classes: Number of classes.
    """

    def __init__(self, critic: nn.Sequential, classes: int) -> None:
        super().__init__()
        *features, last = critic
        assert isinstance(last, nn.Linear)
        self.features = nn.Sequential(*features)
        self.score = last
        self.projection = nn.Embedding(classes, last.in_features)
        bound = 1 / math.sqrt(last.in_features)
        nn.init.uniform_(self.projection.weight, -bound, bound)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the scores `[N]` of the samples `[N, *D]` as samples of the classes `[N]`."""
        features = self.features(x)
        scores: Tensor = self.score(features).squeeze(1) + (self.projection(labels) * features).sum(1)
        return scores
