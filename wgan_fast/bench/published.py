"""Networks of published papers whose input gradient is penalised, in our own words, as small as one likes.

Each is built like its paper's: layers, scalings, initial values. Widths and depths are arguments.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled_leaky(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the variance: slope 0.2, times √2."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class EqualLinear(nn.Module):
    """A dense layer whose weight is N(0, 1) and scaled by 1/√fan-in wherever it runs."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.full((outputs,), bias))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, outputs]``."""
        return F.linear(x, self.weight * self.weight.shape[1] ** -0.5, self.bias)


class EqualConv2d(nn.Module):
    """A convolution whose weight is N(0, 1) and scaled by 1/√fan-in wherever it runs."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, down: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.blur = Blur((kernel + 1) // 2) if down else None
        self.stride, self.padding = (2, 0) if down else (1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, outputs, H', W']``."""
        x = x if self.blur is None else self.blur(x)
        weight = self.weight * self.weight[0].numel() ** -0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Blur(nn.Module):
    """Every channel by itself under a fixed, separable kernel; with ``up``, between zeros to twice the size."""

    def __init__(self, padding: int, taps: Sequence[float] = (1, 3, 3, 1), stride: int = 1, up: bool = False) -> None:
        super().__init__()
        line = torch.tensor(taps) / sum(taps)
        self.register_buffer("kernel", line.outer(line) * (4 if up else 1))
        self.padding, self.stride, self.up = padding, stride, up

    def forward(self, x: Tensor) -> Tensor:
        """Return images, filtered."""
        channels = x.shape[1]
        kernel = self.kernel.expand(channels, 1, -1, -1)  # type: ignore[operator]
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=self.padding, groups=channels)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=channels)


class MinibatchDeviation(nn.Module):
    """A further channel: the mean standard deviation over groups of samples, N/group apart from each other."""

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, C + 1, H, W]``."""
        N, C, H, W = x.shape
        group = min(self.group, N)
        deviation = (x.reshape(group, -1, C, H, W).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))
        return torch.cat([x, deviation.reshape(-1, 1, 1, 1).repeat(group, 1, H, W)], 1)


class ResidualDown(nn.Module):
    """Half the size: two convolutions beside one of 1x1, each halving behind a blur."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = EqualConv2d(inputs, inputs, 3), EqualConv2d(inputs, outputs, 3, down=True)
        self.skip = EqualConv2d(inputs, outputs, 1, down=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return images of half the side."""
        return (scaled_leaky(self.second(scaled_leaky(self.first(x)))) + self.skip(x)) / math.sqrt(2)  # type: ignore[no-any-return]


class Activated(nn.Module):
    """A layer and the leaky ReLU behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, activated."""
        return scaled_leaky(self.layer(x))


def stylegan2_discriminator(size: int = 16, channels: int = 8, group: int = 4) -> nn.Sequential:
    """Build StyleGAN2's residual discriminator, ``[N, 3, size, size]`` to ``[N, 1]``.

    Karras et al. 2020, arXiv:1912.04958. ``size`` is a power of 2, at least 8; N a multiple of ``group``, or less.
    Channels double wherever the size halves, up to eightfold.
    """
    halvings = int(math.log2(size)) - 2
    widths = [channels * min(2**i, 8) for i in range(halvings + 1)]
    return nn.Sequential(
        Activated(EqualConv2d(3, channels, 1)),
        *[ResidualDown(a, b) for a, b in pairwise(widths)],
        MinibatchDeviation(group),
        Activated(EqualConv2d(widths[-1] + 1, widths[-1], 3)),
        nn.Flatten(),
        Activated(EqualLinear(widths[-1] * 16, widths[-1])),
        EqualLinear(widths[-1], 1),
    )


class FixupBlock(nn.Module):
    """x plus 1x1, grouped 3x3 and 1x1 convolutions without normalisation; at first x alone, as the last is zero.

    The others are scaled by L^(-1/4), where L is the number of blocks (Zhang et al. 2019, arXiv:1901.09321).
    """

    def __init__(self, channels: int, groups: int, blocks: int, expansion: int = 2) -> None:
        super().__init__()
        inner = channels * expansion
        self.widen = nn.Conv2d(channels, inner, 1)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=groups)
        self.narrow = nn.Conv2d(inner, channels, 1, bias=False)
        for conv in (self.widen, self.mix):
            nn.init.kaiming_normal_(conv.weight, 0.2)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            conv.weight.data.mul_(blocks**-0.25)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return x + self.narrow(F.leaky_relu(self.mix(F.leaky_relu(self.widen(x), 0.2)), 0.2))  # type: ignore[no-any-return]


def r3gan_discriminator(size: int = 16, channels: int = 8, blocks: int = 1, groups: int = 4) -> nn.Sequential:
    """Build R3GAN's discriminator, ``[N, 3, size, size]`` to ``[N]``.

    Huang et al. 2024, arXiv:2501.05441. ``size`` is a power of 2, at least 4; every size has so many blocks.
    """
    stages = int(math.log2(size)) - 1
    widths = [channels * min(2**i, 4) for i in range(stages)]
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 1)]
    for i, width in enumerate(widths):
        layers += [FixupBlock(width, groups, blocks * stages) for _ in range(blocks)]
        if i + 1 < stages:
            layers.append(Blur(1, (1, 2, 1), stride=2))
            if widths[i + 1] != width:
                layers.append(nn.Conv2d(width, widths[i + 1], 1, bias=False))
    basis = nn.Conv2d(widths[-1], widths[-1], 4, groups=widths[-1], bias=False)
    return nn.Sequential(*layers, basis, nn.Flatten(), nn.Linear(widths[-1], 1, bias=False), nn.Flatten(0))


class StarGANDiscriminator(nn.Module):
    """PatchGAN with a classifier beside it: ``[N, 3, size, size]`` to (map ``[N, 1, h, w]``, logits ``[N, classes]``).

    Choi et al. 2018, arXiv:1711.09020, which penalises the gradient of the map as WGAN-GP does.
    """

    def __init__(self, size: int = 16, channels: int = 8, layers: int = 3, classes: int = 5) -> None:
        super().__init__()
        widths = [3, *[channels * 2**i for i in range(layers)]]
        self.body = nn.Sequential(
            *[m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.01))]
        )
        self.map = nn.Conv2d(widths[-1], 1, 3, 1, 1, bias=False)
        self.classes = nn.Conv2d(widths[-1], classes, size // 2**layers, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a map of scores ``[N, 1, h, w]`` and class logits ``[N, classes]``."""
        features = self.body(x)
        return self.map(features), self.classes(features).flatten(1)


class InteratomicPotential(nn.Module):
    """The energy ``[N]`` of atoms at positions ``[N, atoms, 3]``, whose negative gradient is the forces.

    Behler and Parrinello 2007, Phys. Rev. Lett. 98, 146401: Gaussians of the distances to an atom's neighbours, cut off
    smoothly and summed by element, an MLP that gives the atom's energy, and the sum over atoms. That forces are
    fitted as well is as in Schütt et al. 2017, arXiv:1706.08566.
    """

    def __init__(self, atoms: int = 5, elements: int = 2, basis: int = 8, width: int = 16, cutoff: float = 4.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.neighbours: Tensor
        self.element: Tensor
        self.centres: Tensor
        every = torch.arange(atoms)
        neighbours = torch.stack([every[every != atom] for atom in range(atoms)])
        self.register_buffer("neighbours", neighbours)
        self.register_buffer("element", F.one_hot(neighbours % elements, elements).to(torch.get_default_dtype()))
        self.register_buffer("centres", torch.linspace(0.5, cutoff, basis))
        self.atom = nn.Sequential(
            nn.Linear(basis * elements, width), nn.SiLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Return energies ``[N]``."""
        distance = (positions[:, self.neighbours] - positions[:, :, None]).norm(dim=-1)
        near = 0.5 * torch.cos(math.pi * (distance / self.cutoff).clamp(max=1)) + 0.5
        spread = self.centres[1] - self.centres[0]
        radial = torch.exp(-0.5 * ((distance[..., None] - self.centres) / spread) ** 2) * near[..., None]
        features = torch.einsum("nijb,ije->nibe", radial, self.element).flatten(2)
        return self.atom(features).sum((1, 2))  # type: ignore[no-any-return]
