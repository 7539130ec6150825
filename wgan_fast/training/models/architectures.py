"""The networks of Gulrajani et al. 2017 and a few small ones.

The architectures follow "Improved Training of Wasserstein GANs" (Gulrajani et al. 2017, arXiv:1704.00028) and the
code published with it, with four deliberate differences:

- Image generators end in tanh on MNIST too, because images are in [-1, 1] throughout this package.
- A convolution has no bias where batch normalisation later removes it.
- Stride-2 convolutions pad both sides by 2, where TensorFlow's "SAME" pads 1 before and 2 after: the sizes are
  equal, the sampling grid lies one pixel further.
- The first batch norm of the CIFAR DCGAN generator is per channel, like the others, and not per unit.

A generator maps `z` `[N, latent_dim]` to samples `[N, *D]`; a critic maps samples `[N, *D]` to one score each, `[N]`.
Both are plain modules without data-dependent control flow, so that `torch.export` captures them.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn


class Generator(nn.Sequential):
    """Layers that map latent vectors `[N, latent_dim]` to samples `[N, *D]`.

    Args:
        latent_dim: Length of the latent vector of one sample.
        *layers: The layers, applied in order.
    """

    def __init__(self, latent_dim: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.latent_dim = latent_dim


class Critic(nn.Sequential):
    """Layers that map samples `[N, *D]` to scores; the last of them gives one value per sample, `[N, 1]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[N]` of the samples `[N, *D]`."""
        for layer in self:
            x = layer(x)
        return x.squeeze(1)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with two 3x3 convolutions, as in the paper's CIFAR ResNet.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output and between the convolutions.
        resample: "up" doubles height and width (nearest neighbour, before the first convolution), "down" halves them
            (mean, after the second), None keeps them.
        norm: "batch", "layer" (statistics over one sample's channels, height and width; one scale and offset per
            channel) or None.
        activate_input: False leaves out the normalisation and the ReLU before the first convolution: for a block
            whose input is the image.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        resample: str | None = None,
        norm: str | None = None,
        activate_input: bool = True,
    ) -> None:
        super().__init__()
        # In the generator every path onwards ends in a batch norm, which removes what a bias adds.
        bias = norm != "batch"
        before = [nn.Upsample(scale_factor=2)] if resample == "up" else []
        after = [nn.AvgPool2d(2)] if resample == "down" else []
        self.residual = nn.Sequential(
            *([*_norm(norm, channels_in), nn.ReLU()] if activate_input else []),
            *before,
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias),
            *_norm(norm, channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias),
            *after,
        )
        if resample is None and channels_in == channels_out:
            self.shortcut = nn.Sequential()
        else:
            # A 1x1 convolution commutes with both kinds of resampling, so it runs where the image is smaller.
            self.shortcut = nn.Sequential(*after, nn.Conv2d(channels_in, channels_out, 1, bias=bias), *before)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut + residual, `[N, channels_out, H', W']`, of `x` `[N, channels_in, H, W]`."""
        out: Tensor = self.shortcut(x) + self.residual(x)
        return out


class _TextBlock(nn.Module):
    """Two width-5 convolutions after ReLUs, scaled by 0.3 and added to the input, `[N, C, L]` to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 5, padding=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.3 * self.residual(x)
        return out


def _norm(kind: str | None, channels: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(channels)]
    if kind == "layer":
        return [nn.GroupNorm(1, channels)]
    return []


def mlp_generator(sample_shape: Sequence[int], latent_dim: int, width: int) -> Generator:
    """Three hidden ReLU layers (gan_toy.py of the paper's code); ends in tanh where the samples are images.

    Args:
        sample_shape: Shape of one sample: `(D,)` for vectors, `(C, H, W)` for images, or any other.
        latent_dim: Length of the latent vector.
        width: Units in each hidden layer; the paper has 512.
    """
    return Generator(
        latent_dim,
        nn.Linear(latent_dim, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, math.prod(sample_shape)),
        nn.Unflatten(1, tuple(sample_shape)),
        *([nn.Tanh()] if len(sample_shape) == 3 else []),
    )


def mlp_critic(sample_shape: Sequence[int], width: int) -> Critic:
    """Three hidden ReLU layers on the flattened sample (gan_toy.py of the paper's code).

    Args:
        sample_shape: Shape of one sample, any.
        width: Units in each hidden layer; the paper has 512.
    """
    return Critic(
        nn.Flatten(),
        nn.Linear(math.prod(sample_shape), width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 1),
    )


def dense_generator(sample_shape: Sequence[int], latent_dim: int, width: int) -> Generator:
    """Hidden layers of 4, 8 and 16 times `width` units, each LeakyReLU(0.2) and then batch norm; tanh at the end.

    Args:
        sample_shape: Shape of one sample, any; the values are in [-1, 1].
        latent_dim: Length of the latent vector.
        width: A quarter of the first hidden layer; 64 gives 256-512-1024.
    """
    layers: list[nn.Module] = []
    units = latent_dim
    for hidden in (4 * width, 8 * width, 16 * width):
        layers += [nn.Linear(units, hidden), nn.LeakyReLU(0.2), nn.BatchNorm1d(hidden)]
        units = hidden
    return Generator(
        latent_dim,
        *layers,
        nn.Linear(units, math.prod(sample_shape)),
        nn.Unflatten(1, tuple(sample_shape)),
        nn.Tanh(),
    )


def _stages(size: Sequence[int]) -> int:
    """Count the halvings that bring the longer side of an image to 4 or less."""
    return max(1, math.ceil(math.log2(max(size))) - 2)


def _features(width: int, stage: int) -> int:
    """Channels at a stage of a DCGAN: they double away from the image, up to 8 times the width."""
    return width * min(1 << stage, 8)


def dcgan_generator(sample_shape: Sequence[int], latent_dim: int, width: int, *, batch_norm: bool = True) -> Generator:
    """Build a linear layer to 4x4 and transposed 5x5 convolutions of stride 2, ReLU between them, tanh at the end.

    Each convolution doubles height and width (less one where the target is odd): 3 of them make 28x28 and 32x32
    images, 4 make 64x64, 6 make 256x256.

    Args:
        sample_shape: Shape of one image, `(C, H, W)`, any size.
        latent_dim: Length of the latent vector.
        width: Channels before the last convolution (the paper's DIM); they double with every earlier one, up to 8
            times the width.
        batch_norm: Normalise the input of every convolution; the paper leaves this out on MNIST.
    """
    channels, *size = sample_shape
    stages = _stages(size)
    sizes = [size]  # of the feature maps, from the image back to the linear layer
    for _ in range(stages):
        sizes.append([(side + 1) // 2 for side in sizes[-1]])
    norm = "batch" if batch_norm else None
    features = _features(width, stages - 1)
    layers: list[nn.Module] = [
        nn.Linear(latent_dim, features * math.prod(sizes[-1])),
        nn.Unflatten(1, (features, *sizes[-1])),
    ]
    for stage in reversed(range(stages)):
        out = channels if stage == 0 else _features(width, stage - 1)
        # An odd side is one less than double: what the paper's code reaches by cropping 8x8 to 7x7.
        odd_height, odd_width = sizes[stage][0] % 2, sizes[stage][1] % 2
        layers += [
            *_norm(norm, features),
            nn.ReLU(),
            nn.ConvTranspose2d(
                features,
                out,
                kernel_size=5,
                stride=2,
                padding=2,
                output_padding=(1 - odd_height, 1 - odd_width),
                bias=stage == 0 or not batch_norm,
            ),
        ]
        features = out
    return Generator(latent_dim, *layers, nn.Tanh())


def dcgan_critic(
    sample_shape: Sequence[int],
    width: int,
    *,
    stages: int | None = None,
    layer_norm: bool = False,
    dropout: float = 0.0,
) -> Critic:
    """`stages` 5x5 convolutions of stride 2, each followed by LeakyReLU(0.2), and a linear layer.

    Args:
        sample_shape: Shape of one image, `(C, H, W)`, any size.
        width: Channels of the first convolution (the paper's DIM); they double with every later one, up to 8 times
            the width.
        stages: Number of convolutions; each halves height and width, rounding up. None means as many as bring the
            image to 4x4.
        layer_norm: Normalise the output of every convolution but the first over each sample, as the paper's code
            does at 64x64. Off by default: without it the critic is piecewise linear, which is fastest.
        dropout: Probability of dropping an activation after each LeakyReLU; 0 adds no dropout layer.
    """
    features, *size = sample_shape
    layers: list[nn.Module] = []
    for stage in range(stages or _stages(size)):
        out = _features(width, stage)
        layers.append(nn.Conv2d(features, out, kernel_size=5, stride=2, padding=2))
        if layer_norm and stage > 0:
            layers += _norm("layer", out)
        layers.append(nn.LeakyReLU(0.2))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        features, size = out, [(side + 1) // 2 for side in size]
    return Critic(*layers, nn.Flatten(), nn.Linear(features * math.prod(size), 1))


def resnet_generator(sample_shape: Sequence[int], latent_dim: int, width: int) -> Generator:
    """Build the CIFAR ResNet generator: a linear layer to 4x4, three upsampling residual blocks with batch norm, tanh.

    Args:
        sample_shape: `(C, 32, 32)`.
        latent_dim: Length of the latent vector.
        width: Channels of every block; the paper has 128.
    """
    return Generator(
        latent_dim,
        nn.Linear(latent_dim, width * 4 * 4),
        nn.Unflatten(1, (width, 4, 4)),
        ResidualBlock(width, width, resample="up", norm="batch"),
        ResidualBlock(width, width, resample="up", norm="batch"),
        ResidualBlock(width, width, resample="up", norm="batch"),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, sample_shape[0], 3, padding=1),
        nn.Tanh(),
    )


def resnet_critic(sample_shape: Sequence[int], width: int, *, layer_norm: bool = True) -> Critic:
    """Build the CIFAR ResNet critic: four residual blocks, the first two halving the image, then the spatial mean.

    Args:
        sample_shape: `(C, H, W)` with H and W divisible by 4; the paper has `(3, 32, 32)`.
        width: Channels of every block; the paper has 128.
        layer_norm: Layer normalisation in every block but the first, the paper's replacement for batch norm in
            critics. The paper's CIFAR code has this switch too, and has it off.
    """
    norm = "layer" if layer_norm else None
    return Critic(
        ResidualBlock(sample_shape[0], width, resample="down", activate_input=False),
        ResidualBlock(width, width, resample="down", norm=norm),
        ResidualBlock(width, width, norm=norm),
        ResidualBlock(width, width, norm=norm),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 1),
    )


def language_critic(sample_shape: Sequence[int], width: int) -> Critic:
    """Build the character-level 1-D ResNet critic of the paper's language model: five residual blocks, a linear layer.

    Args:
        sample_shape: `(V, L)`: texts of L characters as distributions over an alphabet of V.
        width: Channels of every block; the paper has 512.
    """
    characters, length = sample_shape
    return Critic(
        nn.Conv1d(characters, width, 1),
        *[_TextBlock(width) for _ in range(5)],
        nn.Flatten(),
        nn.Linear(width * length, 1),
    )


class PackedCritic(Critic):
    """CTGAN's critic for rows of a table (Xu et al. 2019, arXiv:1907.00503): one score for each packed group.

    Two hidden layers with LeakyReLU(0.2) and dropout.

    Args:
        columns: Values in a row.
        width: Units in each hidden layer; the paper has 256.
        group_size: Consecutive rows that make one decision (PacGAN); the paper has 10.
        dropout: Probability of dropping an activation; the paper has 0.5.
    """

    def __init__(self, columns: int, width: int, *, group_size: int = 10, dropout: float = 0.5) -> None:
        features, layers = columns * group_size, []
        for _ in range(2):
            layers += [nn.Linear(features, width), nn.LeakyReLU(0.2), nn.Dropout(dropout)]
            features = width
        super().__init__(*layers, nn.Linear(width, 1))
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[N // group_size]` of the rows `[N, columns]`."""
        return super().forward(x.reshape(-1, self.group_size * x.shape[1]))
