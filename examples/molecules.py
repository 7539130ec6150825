"""Small molecules as graphs: a sample is two tensors, bonds and atoms, and the penalty is over both at once.

De Cao and Kipf 2018 (MolGAN, arXiv:1805.11973), on made-up molecules of up to six atoms. A molecule is valid if it
hangs together and no atom has more bonds than its kind allows: 9% of graphs put together at random are, none of an
untrained generator's, and 71% of the trained one's. Half of those (52%) are unique, and 93% of these new.

python examples/molecules.py
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wgan_fast

VALENCE = torch.tensor([0, 4, 3, 2])  # of no atom, carbon, nitrogen, oxygen
BONDS = 3  # none, single, double
ATOMS = 6
LATENT = 16

Graphs = tuple[Tensor, Tensor]  # bonds [N, ATOMS, ATOMS, BONDS] and atoms [N, ATOMS, kinds], one-hot


def molecule() -> tuple[Tensor, Tensor]:
    """Orders of bonds `[ATOMS, ATOMS]` and kinds of atoms `[ATOMS]`: a tree, then rings and double bonds where free."""
    atoms, bonds = torch.zeros(ATOMS, dtype=torch.long), torch.zeros(ATOMS, ATOMS, dtype=torch.long)
    count = random.randint(3, ATOMS)
    atoms[:count] = torch.tensor(random.choices((1, 2, 3), weights=(6, 2, 2), k=count))

    def free(atom: int) -> bool:
        return bool(bonds[atom].sum() < VALENCE[atoms[atom]])

    for atom in range(1, count):
        open_to_it = [earlier for earlier in range(atom) if free(earlier)]
        if not open_to_it:
            return molecule()
        earlier = random.choice(open_to_it)
        bonds[atom, earlier] = bonds[earlier, atom] = 1
    for _ in range(2):
        first, second = random.sample(range(count), 2)
        if free(first) and free(second) and bonds[first, second] < BONDS - 1:
            bonds[first, second] += 1
            bonds[second, first] += 1
    return bonds, atoms


def molecules(count: int) -> Graphs:
    bonds, atoms = zip(*(molecule() for _ in range(count)))
    return F.one_hot(torch.stack(bonds), BONDS).float(), F.one_hot(torch.stack(atoms), len(VALENCE)).float()


class Generator(nn.Module):
    """Noise `[N, LATENT]` to graphs, drawn by Gumbel-softmax: one-hot, with the gradient of the soft choice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LATENT, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU())
        self.bonds, self.atoms = nn.Linear(256, ATOMS**2 * BONDS), nn.Linear(256, ATOMS * len(VALENCE))

    def forward(self, noise: Tensor) -> Graphs:
        hidden = self.layers(noise)
        drawn = F.gumbel_softmax(self.bonds(hidden).view(-1, ATOMS, ATOMS, BONDS), hard=True)
        above = drawn * torch.ones(ATOMS, ATOMS).triu(1)[..., None]  # the diagonal
        to_itself = torch.eye(ATOMS)[..., None] * F.one_hot(torch.tensor(0), BONDS)  # no bond
        atoms = F.gumbel_softmax(self.atoms(hidden).view(-1, ATOMS, len(VALENCE)), hard=True)
        return above + above.transpose(1, 2) + to_itself, atoms


class Critic(nn.Module):
    """Scores `[N, 1]`: two rounds in which atoms hear from their neighbours along each kind of bond, then a sum."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(nn.Linear((1 + BONDS) * size, width) for size in (len(VALENCE), width))
        self.score = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, graphs: Graphs) -> Tensor:
        bonds, atoms = graphs
        by_kind = bonds.permute(0, 3, 1, 2)  # [N, BONDS, ATOMS, ATOMS]
        for layer in self.rounds:
            heard = (by_kind @ atoms[:, None]).transpose(1, 2).flatten(2)
            atoms = F.leaky_relu(layer(torch.cat((atoms, heard), 2)), 0.2)
        return self.score(atoms.sum(1))


def train(graphs: Graphs, steps: int, batch_size: int = 64) -> Generator:
    generator, critic = Generator(), Critic()
    critic_step = wgan_fast.CriticStep(critic)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        for _ in range(3):
            rows = torch.randint(len(graphs[0]), (batch_size,))
            with torch.no_grad():
                fake = generator(torch.randn(batch_size, LATENT))
            critic_step(tuple(part[rows] for part in graphs), fake)  # one α, one norm over bonds and atoms
            critic_optimizer.step()
        loss = -critic(generator(torch.randn(batch_size, LATENT))).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return generator


def valid(graphs: Graphs) -> Tensor:
    """Which are molecules `[N]`: no atom over its valence, at least two atoms, and all of them connected."""
    orders, atoms = graphs[0].argmax(-1), graphs[1].argmax(-1)
    there = atoms > 0
    within = (orders.sum(2) <= VALENCE[atoms]).all(1)  # no atom: no bond
    reached = F.one_hot(there.int().argmax(1), ATOMS).bool()
    for _ in range(ATOMS):
        reached = reached | (reached[:, :, None] & (orders > 0)).any(1)
    return within & (there.sum(1) > 1) & (reached == there).all(1)


def measure(drawn: Graphs, known: Graphs) -> tuple[float, float, float]:
    """Shares of graphs that are valid; of these, that differ from each other; of these, that are not among `known`."""
    keep = valid(drawn)
    found, before = (
        {bytes(row) for row in torch.cat([part.argmax(-1).flatten(1) for part in graphs], 1).byte().numpy()}
        for graphs in (tuple(part[keep] for part in drawn), known)
    )
    return keep.double().mean().item(), len(found) / max(1, int(keep.sum())), len(found - before) / max(1, len(found))


def apart(graphs: Graphs) -> Graphs:
    """As many graphs of which every bond and every atom is one of another molecule at that place."""
    bonds, atoms = (part.clone() for part in graphs)
    for first in range(ATOMS):
        atoms[:, first] = atoms[torch.randperm(len(atoms)), first]
        for second in range(first):
            bonds[:, first, second] = bonds[:, second, first] = bonds[torch.randperm(len(bonds)), first, second]
    return bonds, atoms


@torch.no_grad()
def draw(generator: Generator, count: int = 1000) -> Graphs:
    return generator(torch.randn(count, LATENT))


if __name__ == "__main__":
    random.seed(0)
    torch.manual_seed(0)
    graphs = molecules(2000)
    drawn = {
        "with bonds and atoms put together at random": apart(graphs),
        "untrained": draw(Generator()),
        "trained": draw(train(graphs, steps=800)),
    }
    for name, some in drawn.items():
        share, unique, new = measure(some, graphs)
        print(f"{name}: {share:.1%} of the graphs are valid, {unique:.0%} of these unique, {new:.0%} of these new")
