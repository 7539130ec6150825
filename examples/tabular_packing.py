"""A table as in CTGAN: the critic judges ten rows at a time, so that a generator of few different rows stands out.

Packing: Lin et al. 2018 (PacGAN, arXiv:1712.04086); on tables: Xu et al. 2019 (CTGAN, arXiv:1907.00503).
The table: 569 tumours, 30 measurements each, from scikit-learn.

python examples/tabular_packing.py
"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import wgan_fast
from wgan_fast.training.metrics import sliced_wasserstein

PACK = 10
LATENT = 32


class PackedCritic(nn.Module):
    """Maps N rows to N / PACK scores."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PACK * columns, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows.view(-1, PACK * rows.shape[1]))


def table() -> Tensor:
    """The measurements `[569, 30]`, every column with mean 0 and deviation 1."""
    values = torch.from_numpy(load_breast_cancer().data).float()
    return (values - values.mean(0)) / values.std(0)


def train(rows: Tensor, steps: int) -> nn.Module:
    columns = rows.shape[1]
    generator = nn.Sequential(
        nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, columns)
    )
    critic = PackedCritic(columns)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    critic_step = wgan_fast.CriticStep(critic, penalty=wgan_fast.PenaltyConfig(group_size=PACK))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=5e-4, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(3):
            real = rows[torch.randperm(len(rows))[:250]]
            critic_step(real, generator(torch.randn(250, LATENT)).detach())  # leaves the gradients in place
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(250, LATENT))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = table()[torch.randperm(569)]
    train_rows, held_out = rows[:400], rows[400:]
    generator = train(train_rows, steps=2000)
    with torch.no_grad():
        samples = generator(torch.randn(169, LATENT))
    distance, floor = sliced_wasserstein(samples, held_out), sliced_wasserstein(train_rows[:169], held_out)
    print(f"sliced Wasserstein distance to held-out rows: {distance:.3f}, of real rows: {floor:.3f}")
