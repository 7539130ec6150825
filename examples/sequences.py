"""One-dimensional sequences: elevation profiles of the Jacksboro fault (real terrain, part of Matplotlib).

python examples/sequences.py
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

import wgan_fast
from wgan_fast.training.metrics import sliced_wasserstein

LATENT = 16
LENGTH = 64


def profiles() -> Tensor:
    """Pieces of the map's rows, `[N, 1, LENGTH]`, from west to east, each less its mean, in units of 100 m."""
    elevation = torch.from_numpy(get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype("float32")) / 100
    pieces = elevation.unfold(1, LENGTH, LENGTH).reshape(-1, 1, LENGTH)
    return pieces - pieces.mean(2, keepdim=True)


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(
        nn.Linear(LATENT, 32 * 16), nn.ReLU(), nn.Unflatten(1, (32, 16)),
        nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose1d(16, 1, 4, stride=2, padding=1),
    )  # fmt: skip
    critic = nn.Sequential(
        nn.Conv1d(1, 16, 5, stride=2, padding=2), nn.LeakyReLU(0.2),
        nn.Conv1d(16, 32, 5, stride=2, padding=2), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(32 * 16, 1),
    )  # fmt: skip
    return generator, critic


def train(sequences: Tensor, steps: int) -> nn.Module:
    generator, critic = networks()
    penalty = wgan_fast.GradientPenalty(critic)  # planned once for all batches
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.0, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=5e-4, betas=(0.0, 0.9))
    for _ in range(steps):
        for _ in range(5):
            real = sequences[torch.randint(len(sequences), (64,))]
            fake = generator(torch.randn(64, LATENT)).detach()
            loss = critic(fake).mean() - critic(real).mean() + penalty(real, fake)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(64, LATENT))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator


def save_lines(sequences: dict[str, Tensor], path: str) -> None:
    figure, panels = plt.subplots(1, len(sequences), sharex=True, sharey=True, figsize=(10, 4), layout="constrained")
    for panel, (name, lines) in zip(panels, sequences.items()):
        panel.plot(lines.squeeze(1).T, linewidth=0.8)
        panel.set_title(name)
    figure.savefig(path)


if __name__ == "__main__":
    torch.manual_seed(0)
    real = profiles()[torch.randperm(len(profiles()))]
    generator = train(real[:1500], steps=2000)
    with torch.no_grad():
        samples = generator(torch.randn(500, LATENT))
    held_out = real[1500:2000]
    distance, floor = sliced_wasserstein(samples, held_out), sliced_wasserstein(real[:500], held_out)
    print(f"sliced Wasserstein distance to held-out profiles: {distance:.3f}, of real ones: {floor:.3f}")
    save_lines({"real": held_out[:20], "generated": samples[:20]}, "profiles.png")
    print("profiles.png: twenty of each")
