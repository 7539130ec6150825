"""What is penalised, and where: the configuration, and the points at which the gradient is taken."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from . import ops as ops
from . import reference
from .checks import (
    Score,
    check_alpha,
    check_generator,
    check_matches,
    check_one,
    check_samples,
    check_score,
    is_per_group,
)
from .ops.samples import empty, settled
from .precision import accumulation_dtype

Samples = Any
"""A tensor ``[N, *D]``, or a tuple, list or dict of such, nested as the critic takes it."""

At = Literal["interpolates", "real", "fake", "both", "perturbed"]


@dataclass(frozen=True)
class PenaltyConfig:
    """What is penalised, where, and how strongly.

    P = (w/N) Σ ψ(‖∇D(x_i)‖₂) with ψ(r) = (r − target)², or max(0, r − target)² when one-sided.

    Attributes:
        weight: w, at least 0.
        target: The gradient norm that costs nothing, at least 0.
        one_sided: Whether only norms above the target cost (WGAN-LP).
        at: Where the gradient is taken: random "interpolates" between real and fake, the "real" samples (R1),
            the "fake" ones (R2), "both" (the sum of R1 and R2), or "perturbed" real samples (DRAGAN).
        group_size: Consecutive samples that the critic packs into one decision (PacGAN, CTGAN): one α and one
            norm per group.
        every: Apply the penalty at every k-th critic step only, with k times the weight (StyleGAN2's lazy
            regularisation). This changes the objective; only ``CriticStep`` reads it.
        samples: Apply the penalty to so many samples of each batch, a divisor of its size, evenly spread over it; None
            for all. An estimate of the same objective, at less cost: its variance is N/K times as large, small
            critics gain nothing, and spectral norm makes a power iteration for the loss and one for the penalty. Of
            the critic's further arguments those are thinned alike whose first size is that of the batch.
        penalty: ψ of one's own, in place of ``target`` and ``one_sided``: any differentiable function of the input
            gradient, which is nested as the samples, to ``[N]``, to a 0-dim tensor or to a value a position. P is w
            times the mean of what it returns.
        score: What of the critic's output is differentiated, as in ``gradient_penalty``.
    """

    weight: float = 10.0
    target: float = 1.0
    one_sided: bool = False
    at: At = "interpolates"
    group_size: int = 1
    every: int = 1
    samples: int | None = None
    penalty: Callable[..., Tensor] | None = None
    score: Score = None

    def __post_init__(self) -> None:
        for name in ("weight", "target"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not isinstance(self.one_sided, bool):
            raise TypeError(f"one_sided must be True or False, got {self.one_sided!r}")
        if self.at not in get_args(At):
            raise ValueError(f"at must be one of {', '.join(get_args(At))}, got {self.at!r}")
        for name in ("group_size", "every", "samples"):
            value = getattr(self, name)
            if name == "samples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.samples is not None and self.samples % self.group_size:
            raise ValueError(f"samples must be a multiple of the group_size of {self.group_size}, got {self.samples}")
        if self.penalty is not None and not callable(self.penalty):
            raise TypeError(f"penalty must be a function or None, got {type(self.penalty).__name__}")
        if self.penalty is not None and (self.target, self.one_sided) != (1.0, False):
            raise ValueError("penalty says what a gradient costs: target and one_sided must not be given with it")
        check_score(self.score)

    @property
    def norm_options(self) -> dict[str, Any]:
        """What of it says how a gradient's norm is penalised, as keyword arguments."""
        return {name: getattr(self, name) for name in ("weight", "target", "one_sided", "group_size")}

    @classmethod
    def wgan_gp(cls, weight: float = 10.0) -> Self:
        """Two-sided penalty on interpolates (Gulrajani et al. 2017, arXiv:1704.00028)."""
        return cls(weight=weight)

    @classmethod
    def wgan_lp(cls, weight: float = 10.0) -> Self:
        """One-sided penalty on interpolates (Petzka et al. 2018, arXiv:1709.08894)."""
        return cls(weight=weight, one_sided=True)

    @classmethod
    def r1(cls, gamma: float = 10.0) -> Self:
        """(γ/2) E‖∇D(x)‖² on real samples (Mescheder et al. 2018, arXiv:1801.04406)."""
        return cls(weight=gamma / 2, target=0.0, at="real")

    @classmethod
    def r2(cls, gamma: float = 10.0) -> Self:
        """(γ/2) E‖∇D(x̃)‖² on fake samples (Mescheder et al. 2018, arXiv:1801.04406)."""
        return cls(weight=gamma / 2, target=0.0, at="fake")

    @classmethod
    def dragan(cls, weight: float = 10.0) -> Self:
        """Two-sided penalty around the real samples (Kodali et al. 2017, arXiv:1705.07215)."""
        return cls(weight=weight, at="perturbed")


def interpolate(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | float | None = None,
    *,
    generator: Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Mix real and fake samples: x̂ = αx + (1−α)x̃, one α ~ U[0, 1] per sample.

    Args:
        real: ``[N, *D]``, floating point.
        fake: Of the shape, dtype and device of ``real``.
        alpha: α: ``[N]``, ``[N, 1, ...]``, a number, or a tensor that broadcasts to ``real``; None draws it, one per
            sample, in float32 (float64 for float64 samples).
        generator: Source of the draw; None means the default generator of the device.
        out: Where to write the result, of the shape, dtype and device of ``real``; not differentiable then.

    Returns:
        x̂ ``[N, *D]`` in the dtype of ``real``; computed in float32 for lower precisions. Differentiable to any
        order in ``real``, ``fake`` and ``alpha``.

    Raises:
        TypeError: A tensor is not floating point, or dtypes disagree.
        ValueError: Shapes or devices disagree, or the batch is empty.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, algorithm 1.

    Examples:
        >>> interpolate(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0.0, 0.25]))
        tensor([[0.0000, 0.0000, 0.0000],
                [0.2500, 0.2500, 0.2500]])
    """
    check_samples(real, fake)
    check_generator(generator, real)
    alpha = draw_alpha(real, generator) if alpha is None else check_alpha(alpha, real)
    if out is not None:
        check_matches("out", out, real)
    compute = accumulation_dtype(real.dtype)
    if alpha.dtype != compute:
        alpha = alpha.to(compute)
    per_sample = is_per_group(alpha, real)
    if torch.compiler.is_compiling() or not per_sample:
        # The compiler fuses the plain expression with what is around it; the operators take one α a sample.
        alpha = reference.per_sample(alpha, real) if per_sample else alpha
        mixed = torch.lerp(fake.to(compute), real.to(compute), alpha).to(real.dtype)
        return mixed if out is None else out.copy_(mixed.detach())
    if out is None:
        return ops.interpolate(real, fake, alpha)
    ops.interpolate_into(out, real, fake, alpha)
    return out


def given_points(config: PenaltyConfig, points: Samples, *others: object) -> Samples:
    """Check points that are given in place of everything else, and return those that ``config`` penalises.

    Raises:
        TypeError: As ``gradient_penalty``.
        ValueError: As ``gradient_penalty``.
    """
    if any(other is not None for other in others) or config.at != PenaltyConfig.at:
        raise ValueError("points stand in place of real, fake, alpha and at: these must not be given")
    N = check_one("points", points, config.group_size).shape[0]
    check_part(config, N)
    return thinned(config, each(settled, points), N)


def penalty_points(
    config: PenaltyConfig,
    real: Samples,
    fake: Samples,
    alpha: Tensor | float | None,
    generator: Generator | None,
) -> list[Samples]:
    """Check a batch and return the sets of points ``[N, *D]`` at which ``config`` penalises, as constants.

    Raises:
        TypeError: As ``gradient_penalty``.
        ValueError: As ``gradient_penalty``.
    """
    if fake is None and config.at in ("real", "perturbed"):
        check_one("real", real, config.group_size)
        fake = real
    elif real is None and config.at == "fake":
        check_one("fake", fake, config.group_size)
        real = fake
    else:
        real, fake = one_precision(real, fake)
        check_samples(real, fake, config.group_size)
        fake = nested_alike(real, fake)
    real, fake = each(settled, real), each(settled, fake)
    return mixed(config, real, fake, *draw(config, real, alpha, generator))


def check_part(config: PenaltyConfig, N: int) -> None:
    """Raise unless a batch of ``N`` has the part that ``config`` penalises."""
    if config.samples is not None and N % config.samples:
        raise ValueError(f"the penalty's samples must divide the batch of {N}, got {config.samples}")


def thinned(config: PenaltyConfig, values: Any, N: int) -> Any:
    """Keep of every tensor ``[N, ...]`` in a nest the samples that ``config`` penalises, whole groups of them."""
    if config.samples is None or config.samples == N:
        return values
    stride = N // config.samples

    def part(value: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape[0] != N:
            return value
        kept = value.unflatten(0, (-1, config.group_size))[::stride].flatten(0, 1)  # type: ignore[no-untyped-call]
        # In the layout of the whole: a slice would keep the memory of all.
        return empty(value, kept.shape[0], value.dtype).copy_(kept) if not kept.requires_grad else kept

    return tree_map_only(Tensor, part, values)


def each(function: Callable[..., Any], *samples: Samples) -> Samples:
    """Apply a function to every tensor of samples, or to every pair of them."""
    return function(*samples) if isinstance(samples[0], Tensor) else tree_map(function, *samples)


def floating(samples: Samples) -> Tensor:
    """Return the first floating-point tensor of samples."""
    if isinstance(samples, Tensor):
        return samples
    return next(leaf for leaf in tree_leaves(samples) if leaf.is_floating_point())  # type: ignore[no-any-return]


def nested_alike(real: Samples, fake: Samples) -> Samples:
    """Return fake with the keys of its dictionaries in the order of real's; both have been checked."""
    return fake if isinstance(real, Tensor) else tree_map(lambda _, theirs: theirs, real, fake)


def one_precision(real: Samples, fake: Samples) -> tuple[Samples, Samples]:
    """Return real and fake in the wider precision of both, under autocast, which leaves either in its own."""
    if not (isinstance(real, Tensor) and isinstance(fake, Tensor)) or real.dtype == fake.dtype:
        return real, fake
    if not (torch.is_autocast_enabled(real.device.type) and real.is_floating_point() and fake.is_floating_point()):
        return real, fake
    dtype = torch.promote_types(real.dtype, fake.dtype)
    return real.to(dtype), fake.to(dtype)


def draw(
    config: PenaltyConfig, real: Samples, alpha: Tensor | float | None, generator: Generator | None = None
) -> tuple[Tensor | None, Samples]:
    """Return α as ``check_alpha`` gives it, or drawn, one a group, and noise like the samples; None if not needed."""
    first = floating(real)
    check_generator(generator, first)
    check_part(config, first.shape[0])
    if alpha is not None:
        for leaf in [first] if isinstance(real, Tensor) else reversed(tree_leaves(real)):
            given = check_alpha(alpha, leaf, config.group_size)
        alpha = given
    if config.at not in ("interpolates", "perturbed"):
        return None, None
    if alpha is None:
        alpha = _draw_uniform((first.shape[0] // config.group_size,), first, generator)
    return alpha, each(lambda x: _draw_uniform(x.shape, x, generator), real) if config.at == "perturbed" else None


@torch.no_grad()
def mixed(config: PenaltyConfig, real: Samples, fake: Samples, alpha: Tensor | None, noise: Samples) -> list[Samples]:
    """Return the sets of points at which ``config`` penalises, from what ``draw`` gave."""
    if alpha is not None and config.group_size > 1 and is_per_group(alpha, floating(real), config.group_size):
        alpha = alpha.repeat_interleave(config.group_size)
    if alpha is None:
        points = {"real": [real], "fake": [fake], "both": [real, fake]}[config.at]
    elif noise is None:
        points = [each(lambda x, y: _mix(x, y, alpha), real, fake)]
    else:
        points = [each(lambda x, u: reference.perturb(x, alpha, u) if x.is_floating_point() else x, real, noise)]
    return thinned(config, points, floating(real).shape[0])  # type: ignore[no-any-return]


def _mix(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    if real.is_floating_point():
        return interpolate(real, fake, alpha)
    if real is not fake and (torch.compiler.is_compiling() or not torch.equal(real, fake)):
        raise TypeError(
            f"samples of {real.dtype} differ between real and fake and cannot be mixed: give them as critic_args"
        )
    return real


def draw_alpha(real: Tensor, generator: Generator | None = None, group_size: int = 1) -> Tensor:
    """Draw α ~ U[0, 1] once per group of consecutive samples of ``real`` ``[N, *D]``; returns ``[N]``."""
    alpha = _draw_uniform((real.shape[0] // group_size,), real, generator)
    return alpha.repeat_interleave(group_size) if group_size > 1 else alpha


def _draw_uniform(shape: tuple[int, ...], real: Tensor, generator: Generator | None) -> Tensor:
    dtype = accumulation_dtype(real.dtype)
    # torch.rand with a generator, even None, takes no symbolic sizes: torch.compile fails once the batch is dynamic.
    if generator is None:
        return torch.rand(shape, dtype=dtype, device=real.device)
    return torch.rand(shape, dtype=dtype, device=real.device, generator=generator)
