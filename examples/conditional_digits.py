"""A generator and a critic that are told which digit it is.

python examples/conditional_digits.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wgan_fast
from wgan_fast.training.plots import save_grid

LATENT = 16
CLASSES = 10


class Conditional(nn.Module):
    """An MLP of its input and the class, one-hot."""

    def __init__(self, inputs: int, outputs: int, *end: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs + CLASSES, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, outputs), *end,
        )  # fmt: skip

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layers(torch.cat((x, F.one_hot(labels, CLASSES).to(x.dtype)), dim=1))


def digits() -> tuple[Tensor, Tensor]:
    """Images `[1797, 64]` in [-1, 1] and classes `[1797]`."""
    data = load_digits()
    return torch.from_numpy(data.data).float() / 8 - 1, torch.from_numpy(data.target)


def train(images: Tensor, labels: Tensor, steps: int, batch_size: int = 128) -> Conditional:
    generator, critic = Conditional(LATENT, 64, nn.Tanh()), Conditional(64, 1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=5e-4, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(3):
            rows = torch.randint(len(images), (batch_size,))
            real, classes = images[rows], labels[rows]
            fake = generator(torch.randn(batch_size, LATENT), classes).detach()
            loss = critic(fake, classes).mean() - critic(real, classes).mean()
            loss = loss + wgan_fast.gradient_penalty(critic, real, fake, critic_args=(classes,))
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(batch_size, LATENT), classes), classes).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator


@torch.no_grad()
def generate(generator: Conditional, labels: Tensor) -> Tensor:
    return generator(torch.randn(len(labels), LATENT), labels)


def nearest_class(images: Tensor) -> Tensor:
    """The digit whose mean image is nearest, `[N]`."""
    real, labels = digits()
    means = torch.stack([real[labels == digit].mean(0) for digit in range(CLASSES)])
    return torch.cdist(images, means).argmin(1)


if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = digits()
    generator = train(images, labels, steps=2000)
    samples = generate(generator, labels)
    for name, drawn in (("generated", samples), ("real", images)):
        share = (nearest_class(drawn) == labels).double().mean()
        print(f"{share:.0%} of the {name} digits are nearest to the mean image of what they should be")
    save_grid(generate(generator, torch.arange(CLASSES).repeat(10)).view(-1, 1, 8, 8), "digits.png", columns=CLASSES)
    print("digits.png: a column for each digit")
