"""A WGAN-GP loop as it is usually written, with one line changed.

python examples/plain_loop.py
"""

import torch
from torch import Tensor, nn

import wgan_fast
from wgan_fast.training.data import Data, load_data
from wgan_fast.training.metrics import sliced_wasserstein

LATENT = 8
WEIGHT = 0.1  # of the penalty, as in the paper's code for points of the plane


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    critic = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    return generator, critic


def compute_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, weight: float) -> Tensor:
    """As most repositories have it; nothing calls it any more."""
    alpha = torch.rand(len(real), 1, dtype=real.dtype)
    interpolates = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
    scores = critic(interpolates)
    (gradient,) = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)
    return weight * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def train(points: Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    generator, critic = (network.to(points.dtype) for network in networks())
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(5):
            real = points[torch.randint(len(points), (256,))]
            fake = generator(torch.randn(256, LATENT, dtype=points.dtype)).detach()
            loss = critic(fake).mean() - critic(real).mean()
            # The line that changed; it was: loss = loss + compute_gradient_penalty(critic, real, fake, weight=WEIGHT)
            loss = loss + wgan_fast.gradient_penalty(critic, real, fake, weight=WEIGHT)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(256, LATENT, dtype=points.dtype))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator, critic


@torch.no_grad()
def report(generator: nn.Module, data: Data) -> str:
    """How far generated points are from points that were not trained on, and how far as many real ones are."""
    held_out = data.held_out.take(10_000)
    distance = sliced_wasserstein(generator(torch.randn(10_000, LATENT)), held_out)
    floor = sliced_wasserstein(data.train.take(10_000), held_out)
    return f"sliced Wasserstein distance to held-out points: {distance:.3f}, of real points: {floor:.3f}"


if __name__ == "__main__":
    torch.manual_seed(0)
    data = load_data("8gaussians")
    generator, _ = train(data.train.take(10_000), steps=1000)
    print(report(generator, data))
