"""StyleGAN2's path length: a step in the styles should change the image by as much wherever it is taken.

Karras et al. 2020, arXiv:1912.04958, who add it to a generator's loss; here to an autoencoder's, whose error shows what
it costs. Styles are points: the term trains the synthesis and not what makes them.

python examples/path_length.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wgan_fast

LAYERS, STYLE = 3, 4
EVERY, DECAY = 4, 0.1  # the term counts fourfold at every fourth step; the paper's mean, of longer runs, moves by 0.01


class Synthesis(nn.Module):
    """Styles `[N, LAYERS, STYLE]` to images `[N, 1, 8, 8]`: each scales the channels that a convolution reads."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.randn(width, 4, 4))
        self.scales = nn.ModuleList(nn.Linear(STYLE, width) for _ in range(LAYERS))
        self.convs = nn.ModuleList(nn.Conv2d(width, out, 3, padding=1) for out in (width, width, 1))

    def forward(self, styles: Tensor) -> Tensor:
        x = self.constant.expand(len(styles), -1, -1, -1)
        for i, (scale, conv) in enumerate(zip(self.scales, self.convs)):
            x = conv(F.leaky_relu(x, 0.2) * (1 + scale(styles[:, i]))[:, :, None, None])
            x = F.interpolate(x, scale_factor=2) if i == 0 else x
        return x


def uneven(gradient: Tensor, mean: Tensor) -> Tensor:
    """How far lengths, root mean squares over layers, are from their running mean with this batch in it, squared."""
    lengths = gradient.square().sum(2).mean(1).sqrt()
    return (lengths - mean.lerp(lengths.mean(), DECAY)) ** 2


def train(images: Tensor, steps: int, weight: float, batch_size: int = 64) -> tuple[nn.Module, Synthesis]:
    layers = nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, LAYERS * STYLE), nn.Unflatten(1, (LAYERS, STYLE))
    encoder, synthesis, mean = nn.Sequential(*layers), Synthesis(), torch.zeros(())
    optimizer = torch.optim.Adam([*encoder.parameters(), *synthesis.parameters()], lr=2e-3)
    for step in range(steps):
        real = images[torch.randint(len(images), (batch_size,))]
        styles = encoder(real)
        loss = F.mse_loss(synthesis(styles), real)
        if step % EVERY == 0:
            noise = torch.randn_like(real) / real[0].numel() ** 0.5
            path = wgan_fast.gradient_penalty(
                synthesis, points=styles.detach(), score=lambda drawn, noise=noise: drawn * noise, penalty=uneven,
                penalty_args=(mean,), weight=weight * EVERY, return_norms=True,
            )  # fmt: skip
            mean = mean.lerp(path.norms.mean() / LAYERS**0.5, DECAY)
            loss = loss + path.penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder, synthesis


@torch.no_grad()
def measure(encoder: nn.Module, synthesis: Synthesis, images: Tensor) -> tuple[float, float]:
    """The error (root mean square), and how much changes by equal steps differ: their deviation over their mean."""
    styles, drawn = encoder(images), synthesis(encoder(images))
    steps = 0.001 * F.normalize(torch.randn(styles.shape), dim=(1, 2))
    changes = (synthesis(styles + steps) - drawn).flatten(1).norm(dim=1)
    return F.mse_loss(drawn, images).sqrt().item(), (changes.std() / changes.mean()).item()


if __name__ == "__main__":
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        error, spread = measure(*train(images, 600, weight), images)
        print(f"weight {weight}: error {error:.3f}, changes by equal steps differ by {spread:.0%}")
