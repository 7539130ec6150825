"""What is timed: a critic, one batch of real and fake samples, and a penalty."""

import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from .. import reference
from ..checks import check_scores
from ..errors import InputError
from ..points import PenaltyConfig, draw_alpha
from ..training import models
from ..training.networks import channels_last, copy_of, to_channels_last
from .published import StarGANDiscriminator, r3gan_discriminator, stylegan2_discriminator

SEED = 0
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

PENALTIES: dict[str, PenaltyConfig | None] = {
    "wgan-gp": PenaltyConfig.wgan_gp(),
    "r1-r2": PenaltyConfig(weight=5.0, target=0.0, at="both"),
    "r1": PenaltyConfig(weight=5.0, target=0.0, at="real"),
    "none": None,
}
"""What can be penalised; R1 and R1 + R2 with γ = 10, which is w = 5 (Mescheder et al. 2018)."""


@dataclass(frozen=True)
class Workload:
    """One critic step to compute.

    Attributes:
        name: Which critic.
        title: What it is, in words.
        penalty_name: A key of ``PENALTIES``.
        critic: The critic; ``penalty.group_size`` consecutive samples get one score.
        real: Real samples ``[N, *D]``.
        fake: Fake samples of the same shape.
        alpha: α per sample ``[N]``, for checks; a timed step draws its own.
        penalty: What is penalised; None for the Wasserstein loss alone.
    """

    name: str
    title: str
    penalty_name: str
    critic: nn.Module
    real: Tensor
    fake: Tensor
    alpha: Tensor
    penalty: PenaltyConfig | None

    @property
    def key(self) -> str:
        """What results are filed under: critic, penalty and batch size."""
        return f"{self.name}/{self.penalty_name}/{self.real.shape[0]}"

    @property
    def group_size(self) -> int:
        """Samples to one score."""
        return getattr(self.critic, "group_size", 1)

    def draw_alpha(self) -> Tensor:
        """Draw α ~ U[0, 1] on the samples' device, ``[N]``, one value to a group."""
        return draw_alpha(self.real, None, self.group_size)

    def interpolates(self, alpha: Tensor) -> Tensor:
        """x̂ ``[N, *D]``."""
        return reference.interpolate(self.real, self.fake, alpha)

    def redrawn(self, seed: int) -> "Workload":
        """Return the same critic on another batch; what is drawn by ``SEED`` is the batch that ``build`` gives."""
        generator = torch.Generator().manual_seed(seed)
        real, fake = torch.randn(2, *self.real.shape, generator=generator).to(self.real)
        alpha = draw_alpha(self.real.cpu(), generator, self.group_size).to(self.alpha)
        return replace(self, real=real, fake=fake, alpha=alpha)

    def double(self) -> "Workload":
        """Return the workload in float64, on a copy of the critic."""
        real, fake, alpha = (tensor.double() for tensor in (self.real, self.fake, self.alpha))
        return replace(self, critic=copy_of(self.critic).double(), real=real, fake=fake, alpha=alpha)

    def channels_last(self) -> "Workload":
        """Return the workload with images and a copied critic in channels-last memory; with other samples as it is."""
        if self.real.dim() != 4:
            return self
        critic = copy_of(self.critic)
        to_channels_last(critic)
        return replace(self, critic=critic, real=channels_last(self.real), fake=channels_last(self.fake))


@contextmanager
def repeatable(critic: nn.Module) -> Iterator[None]:
    """Switch off for a check what two ways to write a step do not share: dropout's masks and power iterations."""
    layers = [layer for layer in critic.modules() if _varies(layer) and layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _varies(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return isinstance(layer, (*_DROPOUTS, _SpectralNorm)) or any(isinstance(hook, SpectralNorm) for hook in hooks)


@dataclass(frozen=True)
class CriticSpec:
    """A critic that the benchmark knows by name.

    Attributes:
        title: What it is, in words.
        sample_shape: Shape of one sample.
        batch_size: Samples in a batch, unless told otherwise.
        make: Builds it.
    """

    title: str
    sample_shape: tuple[int, ...]
    batch_size: int
    make: Callable[[], nn.Module]


def _model(title: str, batch_size: int, width: int, model: str, *shape: int) -> CriticSpec:
    return CriticSpec(title, shape, batch_size, lambda: models.build(model, shape, width=width)[1])


CRITICS = {
    "toy-mlp": _model("MLP on points, 4 layers of 512", 256, 512, "toy-mlp", 2),
    "tabular-mlp": CriticSpec(
        "CTGAN's critic, 10 rows packed, dropout", (230,), 500, partial(models.PackedCritic, 230, 256)
    ),
    "amp": CriticSpec("discriminator of motions for RL, MLP 40-512-256-1", (40,), 128, lambda: _layers(40, 512, 256)),
    "phase-space": CriticSpec(
        "critic of particles' momenta, MLP 7-400-400-400-1", (7,), 1024, lambda: _layers(7, 400, 400, 400)
    ),
    "dcgan-28": _model("DCGAN, 1x28x28, width 64", 64, 64, "mnist-dcgan", 1, 28, 28),
    "resnet-32": _model("ResNet + layer norm, 3x32x32, width 64", 32, 64, "cifar-resnet", 3, 32, 32),
    "dcgan-64": _model("DCGAN, 3x64x64, width 64", 64, 64, "dcgan64", 3, 64, 64),
    "language": CriticSpec(
        "1-D ResNet, 32 of 96 characters, width 128", (96, 32), 64, partial(models.language_critic, (96, 32), 128)
    ),
    "stylegan2-64": CriticSpec(
        "StyleGAN2's discriminator, 3x64x64, width 32", (3, 64, 64), 16, partial(stylegan2_discriminator, 64, 32)
    ),
    "r3gan-32": CriticSpec(
        "R3GAN's discriminator, 3x32x32, width 64", (3, 32, 32), 32, partial(r3gan_discriminator, 32, 64)
    ),
}
"""Widths are the papers' where a CPU can bear it: 128 for the ResNet and 512 for text are not among those."""

_FAMILIES: dict[str, Callable[..., CriticSpec]] = {
    r"mlp-(\d+)x(\d+)": lambda layers, width: CriticSpec(
        f"MLP on points, {layers} hidden layers of {width}", (2,), 256, partial(_mlp, layers, width)
    ),
    r"dcgan-28x(\d+)": lambda width: _model(f"DCGAN, 1x28x28, width {width}", 64, width, "mnist-dcgan", 1, 28, 28),
    r"resnet-(\d+)": lambda side: CriticSpec(
        f"ResNet + layer norm, 3x{side}x{side}, width 64", (3, side, side), 32,
        partial(models.resnet_critic, (3, side, side), 64),
    ),
    r"stargan-(\d+)x(\d+)": lambda side, width: CriticSpec(
        f"StarGAN's map of scores, 3x{side}x{side}, width {width}", (3, side, side), 16, partial(_stargan, side, width)
    ),
    r"stylegan2-(\d+)x(\d+)": lambda side, width: CriticSpec(
        f"StyleGAN2's discriminator, 3x{side}x{side}, width {width}", (3, side, side), 16,
        partial(stylegan2_discriminator, side, width),
    ),
}  # fmt: skip


def spec(name: str) -> CriticSpec | None:
    """Find a critic by name: a key of ``CRITICS``, or one of ``_FAMILIES`` such as "mlp-4x256" with any numbers."""
    if name in CRITICS:
        return CRITICS[name]
    for pattern, make in _FAMILIES.items():
        match = re.fullmatch(pattern, name)
        if match is not None and all(map(int, match.groups())):
            return make(*map(int, match.groups()))
    return None


def _mlp(layers: int, width: int) -> nn.Module:
    return _layers(2, *[width] * layers)


def _layers(*sizes: int) -> nn.Module:
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1), nn.Flatten(0))


def _stargan(size: int, width: int) -> nn.Module:
    critic = StarGANDiscriminator(size, width)
    return nn.Sequential(critic.body, critic.map, nn.Flatten())


def build(
    name: str,
    *,
    penalty: str = "wgan-gp",
    batch_size: int | None = None,
    sample_shape: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> Workload:
    """Make a workload, the same at every call.

    Args:
        name: As for ``spec``, or ``module:function`` for a critic of your own: the function takes nothing and returns
            the module.
        penalty: A key of ``PENALTIES``.
        batch_size: None means the critic's own in ``CRITICS``; 64 for a critic of your own.
        sample_shape: Shape of one sample; only for a critic of your own, and required there.
        device: Where it lives.

    Raises:
        InputError: An argument is not usable.
    """
    if penalty not in PENALTIES:
        raise InputError(f"penalty must be one of {', '.join(PENALTIES)}, got {penalty!r}")
    if ":" in name:
        if sample_shape is None:
            raise InputError(f"critic {name!r} needs the shape of one sample, such as --shape 3x32x32")
        chosen = CriticSpec(name, tuple(sample_shape), 64, partial(_own_critic, name))
    else:
        known = spec(name)
        if known is None:
            known_names = ", ".join(CRITICS)
            raise InputError(
                f"model must be one of {known_names}, mlp-LAYERSxWIDTH, dcgan-28xWIDTH, resnet-SIZE, "
                "stargan-SIZExWIDTH, stylegan2-SIZExWIDTH, "
                f"or module:function, got {name!r}"
            )
        chosen = known
        if sample_shape is not None and tuple(sample_shape) != chosen.sample_shape:
            raise InputError(f"shape is for a critic of your own; {name!r} takes {list(chosen.sample_shape)}")
    N = chosen.batch_size if batch_size is None else batch_size
    if N < 1:
        raise InputError(f"batch_size must be at least 1, got {N}")
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        critic = chosen.make().to(device).train()
    real, fake = torch.randn(2, N, *chosen.sample_shape, generator=generator).to(device)
    group_size = getattr(critic, "group_size", 1)
    if N % group_size:
        raise InputError(f"batch_size must be a multiple of {group_size}, the rows that {name} packs, got {N}")
    if ":" in name:
        _try(name, critic, real, group_size)
    alpha = draw_alpha(real.cpu(), generator, group_size).to(device)
    config = PENALTIES[penalty]
    if config is not None:
        config = replace(config, group_size=group_size)
    return Workload(name, chosen.title, penalty, critic, real, fake, alpha, config)


def _own_critic(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module of one's own can raise anything
        raise InputError(f"critic {name!r} cannot be imported: {_first_line(error)}") from error
    try:
        critic = function() if callable(function) else None
    except Exception as error:
        raise InputError(f"critic {name!r} cannot be made: {_first_line(error)}") from error
    if not isinstance(critic, nn.Module):
        raise InputError(f"critic {name!r}: the function must return an nn.Module, got {type(critic).__name__}")
    return critic


def _try(name: str, critic: nn.Module, samples: Tensor, group_size: int) -> None:
    """Hold a critic of one's own against the shape that was given for it, before anything is made of it."""
    devices = [samples.device] if samples.is_cuda else []
    try:
        # A copy: batch norm's running statistics must not know of this.
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            check_scores(copy_of(critic)(samples), samples, group_size, one=True)
    except Exception as error:
        shape = "x".join(map(str, samples.shape[1:]))
        raise InputError(f"critic {name!r} fails on samples of shape {shape}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
