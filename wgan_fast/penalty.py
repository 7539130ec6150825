"""The gradient penalty for existing training code: one call, same value and gradients as the usual recipe."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from . import ops as ops
from . import reference
from .checks import (
    Engine,
    Score,
    check_alpha,
    check_batch,
    check_critic_arguments,
    check_engine,
    check_floating,
    check_generator,
    check_gradients_allowed,
    check_matches,
    check_one,
    check_samples,
    check_score,
    is_per_sample,
    picked,
)
from .engine import compiled_callers as compiled_callers  # registers the operator that compiled callers run
from .engine.autograd import attach, penalty_at
from .engine.choice import EngineChoice, GivenWay, penalty_choice, traced_choice
from .ops.samples import empty, settled
from .precision import accumulation_dtype

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
    """

    weight: float = 10.0
    target: float = 1.0
    one_sided: bool = False
    at: At = "interpolates"
    group_size: int = 1
    every: int = 1
    samples: int | None = None

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


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor | None = None,
    fake: Tensor | None = None,
    *,
    points: Tensor | None = None,
    score: Score = None,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    at: At = "interpolates",
    alpha: Tensor | float | None = None,
    generator: Generator | None = None,
    group_size: int = 1,
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
) -> Tensor:
    """Penalise the norm of the critic's input gradient: (w/N) Σ ψ(‖∇D(x̂_i)‖₂).

    real and fake are constants: no gradient flows to the generator. The critic's parameters receive theirs from
    ``.backward()`` on the result or on anything computed from it; under ``torch.no_grad()`` only the value is
    computed. Norms and the mean over samples are taken in float32 for lower precisions and in float64 for float64.
    A sample whose gradient is exactly 0 contributes ψ(0) to the value and nothing to the gradients.

    Args:
        critic: Maps ``[N, *D]`` to scores with a row per sample, ``[N]``, ``[N, 1]``, a map ``[N, 1, H, W]``
            (``[N // group_size, ...]`` with packing); what is differentiated is their sum. A module, a method, a
            partial or a function; made anew at every step, it is planned once. Every trainable tensor that its
            forward reads gets its gradient, further arguments included.
        real: Real samples ``[N, *D]``, floating point; not needed where ``at`` is "fake".
        fake: Generated samples, of the shape, dtype and device of ``real``; not needed where ``at`` is "real" or
            "perturbed".
        score: What of the critic's output is differentiated, where that is a tuple, list or dict: an index, a key, or a
            function of the output that returns a tensor, or a list of tensors whose sum is meant.
        points: The points themselves ``[N, *D]``, in place of ``real``, ``fake``, ``at`` and ``alpha``.
        weight: w, finite and at least 0.
        target: The norm that costs nothing; 1 for WGAN-GP, 0 for R1 and R2.
        one_sided: Penalise only norms above the target.
        at: "interpolates", "real", "fake", "both" (the sum of the penalties at real and at fake) or "perturbed".
        alpha: α in place of a draw from U[0, 1]: a number, one per sample ``[N]`` (or ``[N, 1, ...]``) or per group
            ``[N // group_size]``, or a tensor that broadcasts to ``real``. Ignored where no point is drawn ("real",
            "fake", "both").
        generator: Source of the draws; None means the default generator of the samples' device. α is drawn once
            per call, before the critic runs; "perturbed" then draws its noise.
        group_size: Consecutive samples packed into one critic decision: one α and one norm per group.
        critic_args: Further positional arguments of the critic, such as labels.
        critic_kwargs: Keyword arguments of the critic.
        engine: "autograd" differentiates twice; "four_pass" captures the critic and needs no double backward, and
            raises where it cannot; "auto" takes "four_pass" where it can and costs less; "checked" does too, and
            compares the first steps of every plan, and then one in a thousand, with autograd.

    Returns:
        The penalty, 0-dim, weight included, once differentiable in the critic's parameters.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: Shapes or devices disagree, a setting is out of range, the batch is empty, the critic does not
            return a row of scores per sample, or under ``torch.inference_mode()``. Nothing has been changed then.
        CaptureError: With ``engine="four_pass"``, where the critic cannot be captured.
        GradientsDifferError: With ``engine="checked"``, where the engine errs.

    Source: Gulrajani et al. 2017, arXiv:1704.00028, equation 3.

    >>> critic = torch.nn.Linear(2, 1)
    >>> real, fake = torch.zeros(8, 2), torch.ones(8, 2)
    >>> penalty = gradient_penalty(critic, real, fake)
    >>> torch.allclose(penalty, 10 * (critic.weight.norm() - 1) ** 2)
    True
    """
    return GradientPenalty(
        critic,
        score=score,
        weight=weight,
        target=target,
        one_sided=one_sided,
        at=at,
        generator=generator,
        group_size=group_size,
        critic_args=critic_args,
        critic_kwargs=critic_kwargs,
        engine=engine,
    )(real, fake, alpha, points=points)


class GradientPenalty:
    """A gradient penalty planned once for a critic and called at every step.

    Takes the options of ``gradient_penalty``, except α, which belongs to a call; or one ``PenaltyConfig`` in the place
    of those that say what is penalised (its ``every`` is for loops that count steps, as ``CriticStep``).
    """

    def __init__(
        self,
        critic: Callable[..., Tensor],
        config: PenaltyConfig | None = None,
        *,
        score: Score = None,
        weight: float = 10.0,
        target: float = 1.0,
        one_sided: bool = False,
        at: At = "interpolates",
        generator: Generator | None = None,
        group_size: int = 1,
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        engine: Engine = "auto",
    ) -> None:
        if not callable(critic):
            raise TypeError(f"critic must be callable, got {type(critic).__name__}")
        check_engine(engine)
        check_score(score)
        check_critic_arguments(critic_args, critic_kwargs)
        self.critic, self.score = critic, score
        options = PenaltyConfig(weight, target, one_sided, at, group_size)
        if config is not None and not isinstance(config, PenaltyConfig):
            raise TypeError(f"config must be a PenaltyConfig or None, got {type(config).__name__}")
        if config is not None and options != PenaltyConfig():
            raise ValueError("config says what is penalised: weight, target, one_sided, at and group_size must not")
        self.config = options if config is None else config
        self.generator = generator
        self.critic_args = critic_args
        self.critic_kwargs = critic_kwargs
        self._engine = engine

    @property
    def _four_passes(self) -> EngineChoice:
        settings = self.config.one_sided, self.config.group_size, self._engine
        if not torch.compiler.is_compiling():
            return penalty_choice(self.critic, *settings, self.score)
        if callable(self.score):
            raise TypeError("score must be an index or a key under torch.compile, got a function")
        return traced_choice(id(self.critic), *settings, self.score)

    def __call__(
        self,
        real: Tensor | None = None,
        fake: Tensor | None = None,
        alpha: Tensor | float | None = None,
        *,
        points: Tensor | None = None,
        critic_args: tuple[Any, ...] | None = None,
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Compute the penalty of one batch.

        Args:
            real: Real samples ``[N, *D]``; this and the next three as in ``gradient_penalty``.
            fake: Generated samples ``[N, *D]``.
            alpha: α.
            points: The points themselves ``[N, *D]``.
            critic_args: This batch's further arguments (labels, say); None means those given at construction.
            critic_kwargs: Likewise.

        Returns:
            The penalty, 0-dim, weight included.
        """
        args = self.critic_args if critic_args is None else critic_args
        kwargs = self.critic_kwargs if critic_kwargs is None else critic_kwargs
        check_critic_arguments(args, kwargs)
        check_gradients_allowed("a gradient penalty")
        if points is None:
            batches = penalty_points(self.config, real, fake, alpha, self.generator)
        else:
            batches = [given_points(self.config, points, real, fake, alpha)]
        given = next(x for x in (points, real, fake) if x is not None)
        args, kwargs = thinned(self.config, (args, kwargs), given.shape[0])
        critic = self.critic
        if torch.compiler.is_compiling() and isinstance(critic, nn.Module) and self._four_passes.four_pass is not None:
            return self._compiled(critic, batches, args, kwargs or {})
        penalties = [self._at(batch, args, kwargs) for batch in batches]
        return sum(penalties[1:], penalties[0])

    def _at(self, points: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> Tensor:
        critic = self.critic.module if isinstance(self.critic, DistributedDataParallel) else self.critic
        step = self._four_passes.prepare(points, args, kwargs, critic, self.score)
        if isinstance(step, GivenWay):
            penalty, _ = penalty_at(
                lambda x: picked(self.critic(x, *args, **(kwargs or {})), self.score),
                points,
                **self.config.norm_options,
                piecewise=step.choice.piecewise,
            )
            step.confirm()
            return penalty
        return step.attached(points, self.config.weight, self.config.target)

    def _compiled(
        self, critic: nn.Module, points: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Compute the penalty under ``torch.compile``, where one operator stands for the four passes."""
        for name, value in (*enumerate(args), *kwargs.items()):
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise TypeError(f"critic argument {name!r} must be a tensor under torch.compile, got {kind}")
        device = points[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        parameters, buffers = list(critic.parameters()), list(critic.buffers())
        further = (list(args), list(kwargs.values()), list(kwargs), autocast)
        penalties = []
        for point in points:
            with torch.no_grad():
                penalty, *tensors = torch.ops.wgan_fast.gradient_penalty(
                    self._four_passes.number,
                    self.config.weight,
                    self.config.target,
                    point,
                    parameters,
                    buffers,
                    *further,
                )
                gradients, updated = tensors[: len(parameters)], tensors[len(parameters) :]
                for buffer, new in zip(buffers, updated):
                    buffer.copy_(new)
            pairs = [(p, g) for p, g in zip(parameters, gradients) if p.requires_grad]
            penalties.append(attach(penalty, [p for p, _ in pairs], [g for _, g in pairs]))
        return sum(penalties[1:], penalties[0])


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
    per_sample = is_per_sample(alpha, real)
    if torch.compiler.is_compiling() or not per_sample:
        # The compiler fuses the plain expression with what is around it; the operators take one α a sample.
        alpha = reference.per_sample(alpha, real) if per_sample else alpha
        mixed = torch.lerp(fake.to(compute), real.to(compute), alpha).to(real.dtype)
        return mixed if out is None else out.copy_(mixed.detach())
    if out is None:
        return ops.interpolate(real, fake, alpha)
    ops.interpolate_into(out, real, fake, alpha)
    return out


def penalty_from_gradient(
    gradient: Tensor, *, weight: float = 10.0, target: float = 1.0, one_sided: bool = False
) -> Tensor:
    """Evaluate the penalty for code that already has the critic's input gradient.

    Args:
        gradient: ∇D(x̂) ``[N, *D]``, floating point, one row per sample.
        weight: w, finite and at least 0.
        target: The norm that costs nothing, at least 0.
        one_sided: Penalise only norms above the target.

    Returns:
        (w/N) Σ ψ(‖g_i‖₂), 0-dim, float32 (float64 for float64 input). Twice differentiable in ``gradient``; rows
        that are exactly 0 have derivative 0.

    Raises:
        TypeError: ``gradient`` is not a floating-point tensor.
        ValueError: A setting is out of range, or ``gradient`` has no rows or no features.

    >>> penalty_from_gradient(torch.tensor([[3.0, 4.0]]), weight=10.0, target=1.0, one_sided=False)
    tensor(160.)
    """
    PenaltyConfig(weight, target, one_sided)  # checks them
    check_floating("gradient", gradient)
    check_batch("gradient", gradient)
    if torch.compiler.is_compiling():
        norm = reference.gradient_norm(gradient)
        return reference.penalty_from_norm(norm, weight=weight, target=target, one_sided=one_sided)
    return ops.gradient_norm_penalty(gradient, weight, target, one_sided)


def given_points(config: PenaltyConfig, points: Tensor, *others: object) -> Tensor:
    """Check points that are given in place of everything else, and return those that ``config`` penalises.

    Raises:
        TypeError: As ``gradient_penalty``.
        ValueError: As ``gradient_penalty``.
    """
    if any(other is not None for other in others) or config.at != PenaltyConfig.at:
        raise ValueError("points stand in place of real, fake, alpha and at: these must not be given")
    check_one("points", points, config.group_size)
    check_part(config, points.shape[0])
    return thinned(config, settled(points.detach()), points.shape[0])  # type: ignore[no-any-return]


def penalty_points(
    config: PenaltyConfig,
    real: Tensor | None,
    fake: Tensor | None,
    alpha: Tensor | float | None,
    generator: Generator | None,
) -> list[Tensor]:
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
        check_samples(real, fake, config.group_size)
    assert real is not None
    assert fake is not None
    real, fake = settled(real), settled(fake)
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


def draw(
    config: PenaltyConfig, real: Tensor, alpha: Tensor | float | None, generator: Generator | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return α as ``check_alpha`` gives it, and noise ``[N, *D]``, drawn where none is given; None where not needed."""
    check_generator(generator, real)
    check_part(config, real.shape[0])
    if alpha is not None:
        alpha = check_alpha(alpha, real, config.group_size)
    if config.at not in ("interpolates", "perturbed"):
        return None, None
    if alpha is None:
        alpha = draw_alpha(real, generator, config.group_size)
    return alpha, _draw_uniform(real.shape, real, generator) if config.at == "perturbed" else None


@torch.no_grad()
def mixed(
    config: PenaltyConfig, real: Tensor, fake: Tensor, alpha: Tensor | None, noise: Tensor | None
) -> list[Tensor]:
    """Return the sets of points at which ``config`` penalises, from what ``draw`` gave."""
    if alpha is None:
        points = {"real": [real], "fake": [fake], "both": [real, fake]}[config.at]
    else:
        points = [interpolate(real, fake, alpha) if noise is None else reference.perturb(real, alpha, noise)]
    return thinned(config, points, real.shape[0])  # type: ignore[no-any-return]


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
