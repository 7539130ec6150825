"""Further networks of published papers, in our own words, for tests alone; those that are timed are the benchmark's."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wgan_fast.bench.published import (
    Blur as Blur,
)
from wgan_fast.bench.published import (
    EqualLinear as EqualLinear,
)
from wgan_fast.bench.published import (
    InteratomicPotential as InteratomicPotential,
)
from wgan_fast.bench.published import (
    StarGANDiscriminator as StarGANDiscriminator,
)
from wgan_fast.bench.published import (
    r3gan_discriminator as r3gan_discriminator,
)
from wgan_fast.bench.published import (
    scaled_leaky as scaled_leaky,
)
from wgan_fast.bench.published import (
    stylegan2_discriminator as stylegan2_discriminator,
)


class SignedDistance(nn.Module):
    """The signed distance ``[N, 1]`` of points ``[N, 3]`` to a surface, at first about that of a sphere.

    Gropp et al. 2020, arXiv:2002.10099: softplus with β = 100, the points again in the middle, the geometric initial
    values of Atzmon and Lipman 2020, arXiv:1911.10414.
    """

    def __init__(self, width: int = 32, layers: int = 4, radius: float = 1.0) -> None:
        super().__init__()
        self.middle = layers // 2
        inputs = [3, *[width] * layers]
        outputs = [width - 3 if i + 1 == self.middle else width for i in range(layers)] + [1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inputs, outputs, strict=True))
        for layer in self.layers:
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / layer.out_features))
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.layers[-1].weight, math.sqrt(math.pi / width), 1e-5)
        nn.init.constant_(self.layers[-1].bias, -radius)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers[:-1]):
            if i == self.middle:
                h = torch.cat([h, x], 1) / math.sqrt(2)
            h = F.softplus(layer(h), beta=100)
        return self.layers[-1](h)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels a style scales, sample by sample, and whose outputs keep their variance.

    With ``grouped`` every sample has its own weights, and the batch is the groups of one convolution; otherwise the
    input is scaled before a common convolution and its output after it, which is the same.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, style: int, demodulate: bool, grouped: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.style = EqualLinear(style, inputs, bias=1.0)
        self.demodulate, self.grouped = demodulate, grouped

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style, weight, padding = self.style(w), self.weight * self.weight[0].numel() ** -0.5, self.weight.shape[-1] // 2
        gain = torch.rsqrt(style.square() @ weight.square().sum((2, 3)).T + 1e-8) if self.demodulate else None
        if not self.grouped:
            y = F.conv2d(x * style[:, :, None, None], weight, padding=padding)
            return y if gain is None else y * gain[:, :, None, None]
        N = x.shape[0]
        each = weight * style[:, None, :, None, None]
        each = each if gain is None else each * gain[:, :, None, None, None]
        y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), each.flatten(0, 1), padding=padding, groups=N)
        return y.view(N, -1, *y.shape[2:])


class StyledLayer(nn.Module):
    """A modulated convolution, noise from a buffer, a bias and the activation."""

    def __init__(self, inputs: int, outputs: int, size: int, style: int, grouped: bool, up: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, style, True, grouped)
        self.up = Blur(1, up=True) if up else nn.Identity()
        self.register_buffer("noise", torch.randn(size, size))
        self.strength, self.bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(outputs, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return scaled_leaky(self.conv(self.up(x), w) + self.noise * self.strength + self.bias)


class StyleGenerator(nn.Module):
    """Styles ``[N, layers, style]`` to images ``[N, 3, size, size]``, for path length regularisation.

    Karras et al. 2020, arXiv:1912.04958: modulated convolutions on a learned constant, and colours summed over sizes.
    ``layers`` is 2 log₂(size) − 2.
    """

    def __init__(self, size: int = 16, channels: int = 8, style: int = 6, grouped: bool = False) -> None:
        super().__init__()
        sizes = [4 * 2**i for i in range(int(math.log2(size)) - 1)]
        self.layers = 2 * len(sizes)
        self.constant = nn.Parameter(torch.randn(channels, 4, 4))
        self.convs = nn.ModuleList(
            StyledLayer(channels, channels, s, style, grouped, up)
            for s in sizes
            for up in ((True, False) if s > 4 else (False,))
        )
        self.colours = nn.ModuleList(ModulatedConv2d(channels, 3, 1, style, False, grouped) for _ in sizes)
        self.bias = nn.Parameter(torch.zeros(3, 1, 1))
        self.up = Blur(1, up=True)

    def forward(self, w: Tensor) -> Tensor:
        x = self.constant.expand(w.shape[0], -1, -1, -1)
        x = self.convs[0](x, w[:, 0])
        image = self.colours[0](x, w[:, 1])
        for i, colour in enumerate(self.colours[1:]):
            x = self.convs[2 * i + 1](x, w[:, 2 * i + 1])
            x = self.convs[2 * i + 2](x, w[:, 2 * i + 2])
            image = self.up(image) + colour(x, w[:, 2 * i + 3])
        return image + self.bias


class TwoHeads(nn.Module):
    """A projection critic that also shows its features: images, labels to ``{"out": [N, 1], "features": [...]}``.

    Miyato and Koyama 2018, arXiv:1802.05637; the features are what feature matching compares (Salimans et al. 2016,
    arXiv:1606.03498). Without labels it is not conditional.
    """

    def __init__(self, channels: int = 8, layers: int = 2, classes: int = 5) -> None:
        super().__init__()
        widths = [3, *[channels * 2**i for i in range(layers)]]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)) for a, b in pairwise(widths)
        )
        self.score, self.label = nn.Linear(widths[-1], 1), nn.Embedding(classes, widths[-1])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        pooled = x.sum((2, 3))
        out = self.score(pooled)
        if labels is not None:
            out = out + (pooled * self.label(labels)).sum(1, keepdim=True)
        return {"out": out, "features": features}


class MultiScale(nn.Module):
    """PatchGANs on an image and its halves, conditioned on a picture: a list of maps, the finest first.

    Wang et al. 2018, arXiv:1711.11585 (pix2pixHD): instance normalisation, no weights shared between scales. Without a
    condition ``conditions`` is 0.
    """

    def __init__(self, channels: int = 8, scales: int = 2, layers: int = 2, conditions: int = 0) -> None:
        super().__init__()
        self.critics = nn.ModuleList(self._patches(3 + conditions, channels, layers) for _ in range(scales))
        self.halve = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    @staticmethod
    def _patches(inputs: int, channels: int, layers: int) -> nn.Sequential:
        widths = [inputs, *[channels * 2**i for i in range(layers)]]
        stages: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            stages += [nn.Conv2d(a, b, 4, 2 if i + 1 < layers else 1, 2)]
            stages += [nn.InstanceNorm2d(b)] if i else []
            stages += [nn.LeakyReLU(0.2)]
        return nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 4, 1, 2))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        x = x if condition is None else torch.cat([x, condition], 1)
        maps = []
        for i, critic in enumerate(self.critics):
            x = self.halve(x) if i else x
            maps.append(critic(x))
        return maps


class GraphCritic(nn.Module):
    """Scores ``[N, 1]`` of molecules: bonds ``[N, n, n, bonds]`` and atoms ``[N, n, atoms]``, a tuple or two arguments.

    De Cao and Kipf 2018, arXiv:1805.11973 (MolGAN): relational graph convolutions, the first of the bonds being none,
    and a gated sum over atoms. Both parts of a sample are continuous between real and generated, and penalised.
    """

    def __init__(self, atoms: int = 4, bonds: int = 3, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        inputs = [atoms, *[width + atoms] * (layers - 1)]
        self.own = nn.ModuleList(nn.Linear(a, width) for a in inputs)
        self.by_bond = nn.ModuleList(nn.Linear(a, width * (bonds - 1)) for a in inputs)
        self.gate, self.value = nn.Linear(width + atoms, width), nn.Linear(width + atoms, width)
        self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, *graph: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        adjacency, nodes = graph if len(graph) == 2 else graph[0]
        bonds = adjacency[..., 1:].permute(0, 3, 1, 2)
        hidden = nodes
        for own, by_bond in zip(self.own, self.by_bond):
            messages = by_bond(hidden).unflatten(2, (bonds.shape[1], -1)).transpose(1, 2)
            hidden = torch.cat([torch.tanh(own(hidden) + (bonds @ messages).sum(1)), nodes], 2)
        return self.score(torch.tanh((torch.sigmoid(self.gate(hidden)) * torch.tanh(self.value(hidden))).sum(1)))


class TextCritic(nn.Module):
    """Scores ``[N, 1]`` of texts ``[N, length, characters]``: one-hot where real, probabilities where generated.

    Gulrajani et al. 2017, arXiv:1704.00028, the character model: residual blocks of 1-d convolutions without
    normalisation, whose branch counts 0.3.
    """

    def __init__(self, length: int = 16, characters: int = 12, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv1d(characters, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 5, padding=2), nn.ReLU(), nn.Conv1d(width, width, 5, 1, 2))
            for _ in range(blocks)
        )
        self.score = nn.Linear(length * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.transpose(1, 2))
        for block in self.blocks:
            h = h + 0.3 * block(h)
        return self.score(h.flatten(1))
