"""WGAN-GP as training scripts write it, and the critics on which the package is compared with it.

Nothing here imports the penalty, the losses or the reference of ``wgan_fast``: a mistake there cannot hide here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wgan_fast.training import models

CLASSES = 3
PAC = 3


def generator(seed: int) -> torch.Generator:
    """Random numbers of their own, on the device where the tests make their tensors."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def interpolates(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha.view(-1, *[1] * (real.dim() - 1))
    return alpha * real + (1 - alpha) * fake


def dragan_points(real: Tensor, alpha: Tensor, noise: Tensor) -> Tensor:
    """x + α · 0.5 · σ(x) · u with the standard deviation of NumPy, ``batch.std()``."""
    sigma = (real - real.mean()).pow(2).mean().sqrt()
    return real + alpha.view(-1, *[1] * (real.dim() - 1)) * (0.5 * sigma * noise)


def gradient_norms(critic: Callable[..., Tensor], x: Tensor, group_size: int = 1, args: Any = (), kwargs: Any = None):
    x = x.detach().clone().requires_grad_(True)
    scores = critic(x, *args, **(kwargs or {}))
    gradients = torch.autograd.grad(
        outputs=scores, inputs=x, grad_outputs=torch.ones_like(scores), create_graph=True, retain_graph=True
    )[0]
    return gradients.reshape(x.shape[0] // group_size, -1).norm(2, dim=1)


def penalty(
    critic: Callable[..., Tensor],
    points: list[Tensor],
    *,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    group_size: int = 1,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    total = 0
    for x in points:
        excess = gradient_norms(critic, x, group_size, args, kwargs) - target
        if one_sided:
            excess = torch.max(excess, torch.zeros_like(excess))
        total = total + weight * (excess**2).mean()
    return total


def points_at(at: str, real: Tensor, fake: Tensor, alpha: Tensor, noise: Tensor | None = None) -> list[Tensor]:
    return {
        "interpolates": lambda: [interpolates(real, fake, alpha)],
        "real": lambda: [real],
        "fake": lambda: [fake],
        "both": lambda: [real, fake],
        "perturbed": lambda: [dragan_points(real, alpha, noise)],
    }[at]()


def sigmoid_cross_entropy(scores: Tensor, label: float) -> Tensor:
    return nn.BCEWithLogitsLoss()(scores, torch.full_like(scores, label))


CRITIC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wasserstein": lambda real, fake: fake.mean() - real.mean(),
    "non_saturating": lambda real, fake: sigmoid_cross_entropy(real, 1.0) + sigmoid_cross_entropy(fake, 0.0),
    "least_squares": lambda real, fake: 0.5 * ((real - 1) ** 2).mean() + 0.5 * (fake**2).mean(),
    "hinge": lambda real, fake: (
        torch.max(1 - real, torch.zeros_like(real)).mean() + torch.max(1 + fake, torch.zeros_like(fake)).mean()
    ),
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "wasserstein": lambda fake: -fake.mean(),
    "non_saturating": lambda fake: sigmoid_cross_entropy(fake, 1.0),
    "least_squares": lambda fake: 0.5 * ((fake - 1) ** 2).mean(),
    "hinge": lambda fake: -fake.mean(),
}


class ConditionalCritic(nn.Module):
    """A projection critic: labels enter through an embedding, as a positional argument."""

    def __init__(self, features: int = 5, width: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.body = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.LeakyReLU(0.2))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, labels: Tensor, *, scale: float = 1.0) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden) + scale * (hidden * self.embedding(labels)).sum(dim=1, keepdim=True)


class PackedCritic(nn.Module):
    """One decision per ``PAC`` consecutive rows, as CTGAN's discriminator."""

    def __init__(self, features: int = 5, width: int = 7) -> None:
        super().__init__()
        self.packed = PAC * features
        self.layers = nn.Sequential(
            nn.Linear(self.packed, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(-1, self.packed))


@dataclass(frozen=True)
class Case:
    """A critic, what it takes, and a batch size that is odd."""

    make: Callable[[], nn.Module]
    sample_shape: tuple[int, ...]
    batch: int = 7
    group_size: int = 1
    kwargs: dict[str, Any] = field(default_factory=dict)

    def critic(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The critic with weights 1.5 times those of PyTorch's initialisation, which make the norms vary more."""
        torch.manual_seed(1)
        critic = self.make().to(dtype)
        with torch.no_grad():
            for parameter in critic.parameters():
                parameter.mul_(1.5)
        return critic

    def samples(self, dtype: torch.dtype = torch.float64, batch: int | None = None) -> tuple[Tensor, Tensor]:
        random = generator(2)
        shape = (self.batch if batch is None else batch, *self.sample_shape)
        real = torch.randn(shape, dtype=torch.float64, generator=random)
        fake = 0.5 * torch.randn(shape, dtype=torch.float64, generator=random) + 0.25
        return real.to(dtype), fake.to(dtype)

    def alpha(self, dtype: torch.dtype = torch.float64, batch: int | None = None) -> Tensor:
        """One α per sample, equal within a group."""
        groups = (self.batch if batch is None else batch) // self.group_size
        alpha = torch.rand(groups, dtype=torch.float64, generator=generator(3))
        return alpha.repeat_interleave(self.group_size).to(dtype)

    @property
    def args(self) -> tuple[Any, ...]:
        return (torch.arange(self.batch) % CLASSES,) if self.kwargs else ()

    def typical_norm(self, points: list[Tensor]) -> float:
        """The mean gradient norm at ``points``: a target that some samples exceed and some do not."""
        critic = self.critic()
        norms = torch.cat([gradient_norms(critic, x, self.group_size, self.args, self.kwargs) for x in points])
        target = norms.mean().item()
        assert norms.min() < target < norms.max()
        return target


CASES = {
    "mlp": Case(lambda: models.build("toy-mlp", (5,), width=9)[1], (5,)),
    "dcgan": Case(lambda: models.build("mnist-dcgan", (1, 28, 28), width=3)[1], (1, 28, 28)),
    "resnet": Case(lambda: models.build("cifar-resnet", (3, 32, 32), width=3)[1], (3, 32, 32), batch=3),
    "conditional": Case(ConditionalCritic, (5,), kwargs={"scale": 0.5}),
    "packed": Case(PackedCritic, (5,), batch=5 * PAC, group_size=PAC),
}


def random_pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, dtype=dtype), 0.5 * torch.randn(shape, dtype=dtype) + 0.25


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda x: torch.stack([x, x + 1], dim=-1).flatten(3)[..., ::2],
    "batch reversed in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


def gradients(value: Tensor, critic: nn.Module) -> dict[str, Tensor]:
    """Backward from ``value``: the gradient of every trainable parameter, zeros where there is none."""
    critic.zero_grad()
    value.backward()
    return gradients_left_in(critic)


def gradients_left_in(critic: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in critic.named_parameters()
        if parameter.requires_grad
    }


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    """Every gradient within ``rtol`` of its own norm.

    A gradient that is exactly 0 (a bias behind the last activation) may carry the rounding of the others: an
    absolute slack of 1e-15 of the whole gradient's norm, 4 units in the last place of float64.
    """
    assert actual.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    assert torch.isfinite(whole)
    for name in expected:
        error = (actual[name] - expected[name]).norm()
        assert error <= rtol * expected[name].norm() + 1e-15 * whole, f"{name}: error {error}"


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Euclidean distance of two gradients over all parameters, in float64."""
    return torch.cat([(actual[name].double() - expected[name].double()).flatten() for name in expected]).norm().item()
