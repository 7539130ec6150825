"""WGAN-GP with Hugging Face Accelerate: several processes, mixed precision and GPUs as `accelerate config` says.

pip install accelerate
accelerate launch examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from plain_loop import LATENT, WEIGHT, networks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wgan_fast
from wgan_fast.data import load_data
from wgan_fast.metrics import sliced_wasserstein


def train(points: Tensor, steps: int, accelerator: Accelerator) -> nn.Module:
    generator, critic = networks()
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    loader = DataLoader(TensorDataset(points), batch_size=256, shuffle=True, drop_last=True)
    generator, critic, generator_optimizer, critic_optimizer, loader = accelerator.prepare(
        generator, critic, generator_optimizer, critic_optimizer, loader
    )
    step = 0
    while step < steps:
        for index, (real,) in enumerate(loader, 1):
            noise = torch.randn(len(real), LATENT, device=accelerator.device)
            fake = generator(noise).detach()
            loss = critic(fake).mean() - critic(real).mean()
            loss = loss + wgan_fast.gradient_penalty(critic, real, fake, weight=WEIGHT)
            critic_optimizer.zero_grad()
            accelerator.backward(loss)
            critic_optimizer.step()
            if index % 5 == 0 and step < steps:
                loss = -critic(generator(noise)).mean()
                generator_optimizer.zero_grad()
                accelerator.backward(loss)
                generator_optimizer.step()
                step += 1
    return accelerator.unwrap_model(generator)


if __name__ == "__main__":
    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    data = load_data("8gaussians")
    generator = train(data.train.take(10_240), 1000, accelerator)
    samples = generator(torch.randn(2000, LATENT, device=accelerator.device))
    accelerator.print(f"distance to the data: {sliced_wasserstein(samples, data.held_out.take(2000)):.3f}")
