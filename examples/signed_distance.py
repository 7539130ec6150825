"""The distance to a surface, learned from points on it: elsewhere only the gradient's norm is known, and that is 1.

python examples/signed_distance.py
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wgan_fast

RADIUS, TUBE = 0.6, 0.3  # of a torus around the z axis


class SignedDistance(nn.Module):
    """An MLP of points `[N, 3]`, at first about the distance to a sphere (Gropp et al. 2020, arXiv:2002.10099)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, width) for inputs in (3, width, width))
        for layer in self.layers:
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / width))
            nn.init.zeros_(layer.bias)
        self.last = nn.Linear(width, 1)
        nn.init.constant_(self.last.weight, math.sqrt(math.pi / width))
        nn.init.constant_(self.last.bias, -RADIUS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.softplus(layer(x), beta=100)
        return self.last(x)


def true_distance(x: Tensor) -> Tensor:
    """How far points `[N, 3]` are from the torus, `[N, 1]`; less than 0 within."""
    return (torch.hypot(x[:, 0], x[:, 1]) - RADIUS).hypot(x[:, 2]).sub(TUBE)[:, None]


def surface(count: int) -> Tensor:
    """Points on the torus, `[count, 3]`."""
    u, v = 2 * math.pi * torch.rand(2, count)
    ring = RADIUS + TUBE * v.cos()
    return torch.stack([ring * u.cos(), ring * u.sin(), TUBE * v.sin()], 1)


def around(count: int) -> Tensor:
    """Points of the cube that holds the torus, `[count, 3]`."""
    return 2 * torch.rand(count, 3) - 1


def train(steps: int, batch_size: int = 256) -> SignedDistance:
    cloud = surface(10_000)  # all that is known
    network = SignedDistance()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        points = torch.cat([cloud[torch.randint(len(cloud), (batch_size,))], around(batch_size)])
        eikonal = wgan_fast.gradient_penalty(network, points=points, weight=0.1, return_scores=True)
        loss = eikonal.scores[:batch_size].abs().mean() + eikonal.penalty  # of one forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def error(network: SignedDistance) -> float:
    """The mean error of the distance, over the cube."""
    points = around(10_000)
    return (network(points) - true_distance(points)).abs().mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    before, after = error(SignedDistance()), error(train(steps=3000))
    print(f"mean error of the distance: {before:.3f} for a sphere, {after:.3f} for what was learned")
