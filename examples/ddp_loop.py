"""The plain loop in several processes with DistributedDataParallel: k processes train what one does.

torchrun --nproc-per-node=2 examples/ddp_loop.py

With 5 for the number of steps it prints what `--nproc-per-node=1` does, to ten digits; with more, rounding grows.
"""

import sys

import torch
import torch.distributed as dist
from plain_loop import LATENT, WEIGHT, networks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import wgan_fast
from wgan_fast.training.data import load_data
from wgan_fast.training.metrics import sliced_wasserstein

BATCH = 256


def train(points: Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    torch.manual_seed(0)  # every process draws the whole batch and keeps its rows
    generator, critic = (DistributedDataParallel(network.to(points.dtype)) for network in networks())
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(5):
            real = points[torch.randint(len(points), (BATCH,))][rows]
            fake = generator(torch.randn(BATCH, LATENT, dtype=points.dtype)[rows]).detach()
            alpha = torch.rand(BATCH, dtype=points.dtype)[rows]
            loss = critic(fake).mean() - critic(real).mean()
            loss = loss + wgan_fast.gradient_penalty(critic, real, fake, alpha=alpha, weight=WEIGHT)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        # The critic without its wrapper: its gradients are not wanted, and need not be averaged.
        loss = -critic.module(generator(torch.randn(BATCH, LATENT, dtype=points.dtype)[rows])).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator.module, critic.module


def main(steps: int) -> None:
    dist.init_process_group("gloo")
    data = load_data("8gaussians")
    generator, critic = train(data.train.take(10_000).double(), steps)
    samples = generator(torch.randn(2000, LATENT, dtype=torch.float64))
    if dist.get_rank() == 0:
        print(f"distance to the data: {sliced_wasserstein(samples, data.held_out.take(2000)):.12f}")
        total = sum(parameter.abs().sum().item() for parameter in critic.parameters())
        print(f"sum of the critic's weights: {total:.12f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
