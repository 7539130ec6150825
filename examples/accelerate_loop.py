"""WGAN-GP with Hugging Face Accelerate: processes and GPUs as `accelerate config` says.

With mixed precision, Accelerate wraps the critic's forward pass. The penalty then takes autograd, and says so.

pip install 'wgan_fast[train,integrations]'
accelerate launch examples/accelerate_loop.py
"""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from plain_loop import LATENT, WEIGHT, networks, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wgan_fast
from wgan_fast.training.data import load_data


def endlessly(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        for (real,) in loader:
            yield real


def train(points: Tensor, steps: int, accelerator: Accelerator) -> nn.Module:
    generator, critic = networks()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True, drop_last=True)
    generator, critic, generator_optimizer, critic_optimizer, loader = accelerator.prepare(
        generator, critic, generator_optimizer, critic_optimizer, loader
    )
    batches = endlessly(loader)
    for _ in range(steps):
        for _ in range(5):
            real = next(batches)
            noise = torch.randn(len(real), LATENT, device=accelerator.device)
            fake = generator(noise).detach()
            loss = critic(fake).mean() - critic(real).mean()
            loss = loss + wgan_fast.gradient_penalty(critic, real, fake, weight=WEIGHT)
            critic_optimizer.zero_grad()
            accelerator.backward(loss)
            critic_optimizer.step()
        loss = -critic(generator(noise)).mean()
        generator_optimizer.zero_grad()
        accelerator.backward(loss)
        generator_optimizer.step()
    return accelerator.unwrap_model(generator)


if __name__ == "__main__":
    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    data = load_data("8gaussians")
    generator = train(data.train.take(10_240), 1000, accelerator)
    accelerator.print(report(generator.cpu(), data))
