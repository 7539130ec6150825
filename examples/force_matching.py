"""A potential learned from energies and forces: the model's negative input gradient is fitted, too.

python examples/force_matching.py
"""

import torch
from torch import Tensor, nn

import wgan_fast

CUBE = 1.1 * torch.cartesian_prod(*[torch.arange(2.0)] * 3)
ATOMS = len(CUBE)
OTHERS = (torch.arange(ATOMS)[:, None] + torch.arange(1, ATOMS)) % ATOMS


class Potential(nn.Module):
    """The energy `[N]` of atoms `[N, ATOMS, 3]`: an MLP of each atom's distances, spread over Gaussians, and a sum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.7, 2.5, 16))
        layers = nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        self.atom = nn.Sequential(*layers)

    def forward(self, positions: Tensor) -> Tensor:
        distance = (positions[:, OTHERS] - positions[:, :, None]).norm(dim=-1, keepdim=True)
        return self.atom(torch.exp(-20 * (distance - self.centres) ** 2).sum(2)).sum((1, 2))


def true_energy(positions: Tensor) -> Tensor:
    """Lennard-Jones's potential with softer powers: a pair costs r⁻⁸ - 2r⁻⁴, least at a distance of 1."""
    first, second = torch.triu_indices(ATOMS, ATOMS, 1)
    power = (positions[:, first] - positions[:, second]).square().sum(-1) ** -2
    return (power**2 - 2 * power).sum(1)


def clusters(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shaken cubes: positions `[count, ATOMS, 3]`, energies `[count]` and forces like the positions."""
    positions = (CUBE + 0.08 * torch.randn(count, ATOMS, 3)).requires_grad_()
    energies = true_energy(positions)
    (gradient,) = torch.autograd.grad(energies.sum(), positions)
    return positions.detach(), energies.detach(), -gradient


def train(steps: int, weight: float = 1.0, batch_size: int = 64) -> Potential:
    positions, energies, forces = clusters(1000)
    model = Potential()
    model.atom[-1].bias.data.fill_(energies.mean() / ATOMS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(positions), (batch_size,))
        matched = wgan_fast.gradient_penalty(
            model, points=positions[rows], weight=weight, penalty_args=(forces[rows],), return_scores=True,
            penalty=lambda gradient, forces: ((gradient + forces) ** 2).flatten(1).sum(1),
        )  # fmt: skip
        loss = matched.penalty + ((matched.scores - energies[rows]) ** 2).mean()  # both of one forward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def errors(model: Potential) -> tuple[float, float]:
    """How far energies and forces of new clusters are off (root mean square), over how much they vary."""
    positions, energies, forces = clusters(500)
    learned = model(positions.requires_grad_())
    (gradient,) = torch.autograd.grad(learned.sum(), positions)
    energy = (learned - energies).norm() / (energies - energies.mean()).norm()
    return energy.item(), ((gradient + forces).norm() / forces.norm()).item()


if __name__ == "__main__":
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        energy, force = errors(train(2000, weight))
        print(f"weight {weight} on forces: energies are off by {energy:.0%} of their spread, forces by {force:.0%}")
