"""A WGAN-GP loop as it is usually written, with one line changed.

python examples/plain_loop.py
"""

import torch
from torch import Tensor, nn

import wgan_fast
from wgan_fast.data import load_data
from wgan_fast.metrics import sliced_wasserstein

LATENT = 8
WEIGHT = 0.1  # of the penalty, as in the paper's code for points of the plane


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    critic = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    return generator, critic


def compute_gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, weight: float) -> Tensor:
    """What is in most repositories."""
    alpha = torch.rand(len(real), 1, dtype=real.dtype)
    interpolates = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
    scores = critic(interpolates)
    (gradient,) = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)
    return weight * ((gradient.norm(2, dim=1) - 1) ** 2).mean()


def train(points: Tensor, steps: int, penalty=wgan_fast.gradient_penalty) -> tuple[nn.Module, nn.Module]:
    generator, critic = (network.to(points.dtype) for network in networks())
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(5):
            real = points[torch.randint(len(points), (256,))]
            fake = generator(torch.randn(256, LATENT, dtype=points.dtype)).detach()
            loss = critic(fake).mean() - critic(real).mean()
            # was: compute_gradient_penalty(critic, real, fake, weight=WEIGHT)
            loss = loss + penalty(critic, real, fake, weight=WEIGHT)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(256, LATENT, dtype=points.dtype))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator, critic


if __name__ == "__main__":
    torch.manual_seed(0)
    data = load_data("8gaussians")
    generator, _ = train(data.train.take(10_000), steps=1000)
    held_out = data.held_out.take(2000)
    print(f"distance to the data: {sliced_wasserstein(generator(torch.randn(2000, LATENT)), held_out):.3f}")
    print(f"of data to data:      {sliced_wasserstein(data.train.take(2000), held_out):.3f}")
