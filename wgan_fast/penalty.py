"""The gradient penalty for existing training code: one call, same value and gradients as the usual recipe."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args, overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

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
    check_penalty_arguments,
    check_samples,
    check_score,
    is_per_sample,
    picked,
)
from .engine.autograd import Opened, Piecewise, opened_at, penalised
from .engine.choice import EngineChoice, GivenWay, named, penalty_choice, traced_choice, unwrapped
from .engine.compiled_callers import opened_by_number
from .engine.guarded import Called
from .four_pass import Objective
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


class PenaltyResult(NamedTuple):
    """What ``gradient_penalty`` gives where more is asked for than the penalty.

    Attributes:
        penalty: The penalty, 0-dim, weight included.
        norms: ‖∇D‖₂ ``[N]`` by sample or group, detached; for ``at="both"`` those at fake follow those at real. None
            where not asked for.
        scores: What ``score`` picks of the critic's output at the points, as the critic gave it, attached; for
            ``at="both"`` the scores at real and those at fake, a pair. None where not asked for.
    """

    penalty: Tensor
    norms: Tensor | None
    scores: Any


@overload
def gradient_penalty(
    critic: Callable[..., Any],
    real: Samples = ...,
    fake: Samples = ...,
    *,
    return_scores: Literal[True],
    **options: Any,
) -> PenaltyResult: ...


@overload
def gradient_penalty(
    critic: Callable[..., Any], real: Samples = ..., fake: Samples = ..., *, return_norms: Literal[True], **options: Any
) -> PenaltyResult: ...


@overload
def gradient_penalty(
    critic: Callable[..., Any], real: Samples = ..., fake: Samples = ..., **options: Any
) -> Tensor: ...


def gradient_penalty(  # type: ignore[misc]
    critic: Callable[..., Any],
    real: Samples = None,
    fake: Samples = None,
    *,
    points: Samples = None,
    score: Score = None,
    penalty: Callable[..., Tensor] | None = None,
    weight: float = 10.0,
    target: float = 1.0,
    one_sided: bool = False,
    at: At = "interpolates",
    alpha: Tensor | float | None = None,
    generator: Generator | None = None,
    group_size: int = 1,
    critic_args: tuple[Any, ...] = (),
    penalty_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    return_norms: bool = False,
    return_scores: bool = False,
) -> Tensor | PenaltyResult:
    """Penalise the norm of the critic's input gradient: (w/N) Σ ψ(‖∇D(x̂_i)‖₂).

    real and fake are constants: no gradient flows to the generator. The critic's parameters receive theirs from
    ``.backward()`` on the result or on anything computed from it; under ``torch.no_grad()`` only the value is
    computed. Norms and the mean over samples are taken in float32 for lower precisions and in float64 for float64.
    A sample whose gradient is exactly 0 contributes ψ(0) to the value and nothing to the gradients.

    Samples are one tensor ``[N, *D]``, or a tuple, list or dict of such with one N, nested as the critic takes it as
    its first argument. The gradient is taken in every floating-point one of them, with one norm over all.

    Args:
        critic: Maps ``[N, *D]`` to scores with a row per sample, ``[N]``, ``[N, 1]``, a map ``[N, 1, H, W]``
            (``[N // group_size, ...]`` with packing); what is differentiated is their sum. A module, a method, a
            partial or a function; made anew at every step, it is planned once. Every trainable tensor that its
            forward reads gets its gradient, further arguments included.
        real: Real samples ``[N, *D]``, floating point; not needed where ``at`` is "fake".
        fake: Generated samples, of the shape, dtype and device of ``real`` (of any precision under autocast); not
            needed where ``at`` is "real" or "perturbed".
        score: What of the critic's output is differentiated, where that is a tuple, list or dict: an index, a key, or a
            function of the output that returns a tensor, or a list of tensors whose sum is meant.
        points: The points themselves ``[N, *D]``, in place of ``real``, ``fake``, ``at`` and ``alpha``.
        penalty: ψ of one's own, a function of the input gradient: see ``PenaltyConfig``. With it, the critic's scores
            may lie in any way, a score a graph of many nodes, say.
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
        penalty_args: Further arguments of ``penalty``, such as the gradient that each sample should have.
        critic_kwargs: Keyword arguments of the critic.
        return_norms: Return the gradients' norms too.
        return_scores: Return the scores at the points too: a loss of them and the penalty then cost one forward.
        engine: "autograd" differentiates twice; "four_pass" captures the critic and needs no double backward, and
            raises where it cannot; "auto" takes "four_pass" where it can and costs less; "checked" does too, and
            compares the first steps of every plan, and then one in a thousand, with autograd.

    Returns:
        The penalty, 0-dim, weight included, once differentiable in the critic's parameters; a ``PenaltyResult`` where
        norms or scores are asked for.

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
    return GradientPenalty(  # type: ignore[no-any-return]
        critic,
        score=score,
        penalty=penalty,
        weight=weight,
        target=target,
        one_sided=one_sided,
        at=at,
        generator=generator,
        group_size=group_size,
        critic_args=critic_args,
        penalty_args=penalty_args,
        critic_kwargs=critic_kwargs,
        engine=engine,
        return_norms=return_norms,
        return_scores=return_scores,
    )(real, fake, alpha, points=points)


class GradientPenalty:
    """A gradient penalty planned once for a critic and called at every step.

    Takes the options of ``gradient_penalty``, except α, which belongs to a call; or one ``PenaltyConfig`` in the place
    of those that say what is penalised (its ``every`` is for loops that count steps, as ``CriticStep``).
    """

    def __init__(
        self,
        critic: Callable[..., Any],
        config: PenaltyConfig | None = None,
        *,
        score: Score = None,
        penalty: Callable[..., Tensor] | None = None,
        weight: float = 10.0,
        target: float = 1.0,
        one_sided: bool = False,
        at: At = "interpolates",
        generator: Generator | None = None,
        group_size: int = 1,
        critic_args: tuple[Any, ...] = (),
        penalty_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        engine: Engine = "auto",
        return_norms: bool = False,
        return_scores: bool = False,
    ) -> None:
        if not callable(critic):
            raise TypeError(f"critic must be callable, got {type(critic).__name__}")
        check_engine(engine)
        check_critic_arguments(critic_args, critic_kwargs)
        check_penalty_arguments(penalty_args, penalty if config is None else config)
        self.critic = critic
        options = PenaltyConfig(weight, target, one_sided, at, group_size, penalty=penalty, score=score)
        if config is not None and not isinstance(config, PenaltyConfig):
            raise TypeError(f"config must be a PenaltyConfig or None, got {type(config).__name__}")
        if config is not None and options != PenaltyConfig():
            raise ValueError("config says what is penalised: options that say so must not be given with it")
        self.config = options if config is None else config
        self.generator = generator
        self.critic_args, self.penalty_args, self.critic_kwargs = critic_args, penalty_args, critic_kwargs
        self.return_norms, self.return_scores = return_norms, return_scores
        self._engine = engine
        self._score_name = None if torch.compiler.is_compiling() else named(self.config.score)
        # Where the penalty is that of the norm and nothing else is asked for, one plan does it all.
        self._open = self.config.penalty is not None or return_scores
        self._objective = Objective(
            one_sided=self.config.one_sided and not self._open,
            group_size=self.config.group_size,
            outside_penalty=self._open,
            outside_scores=return_scores,
        ).form()

    @property
    def score(self) -> Score:
        """What of the critic's output is differentiated."""
        return self.config.score

    @property
    def _four_passes(self) -> EngineChoice:
        engine: Engine = self._engine
        if self.return_scores and isinstance(self.critic, DistributedDataParallel) and engine != "four_pass":
            engine = "autograd"  # it reduces gradients of its own forwards alone, and this one is all there is
        return penalty_choice(self.critic, self._objective, engine, self.config.score)

    def __call__(
        self,
        real: Samples = None,
        fake: Samples = None,
        alpha: Tensor | float | None = None,
        *,
        points: Samples = None,
        critic_args: tuple[Any, ...] | None = None,
        penalty_args: tuple[Any, ...] | None = None,
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute the penalty of one batch.

        Args:
            real: Real samples ``[N, *D]``; this and the next three as in ``gradient_penalty``.
            fake: Generated samples ``[N, *D]``.
            alpha: α.
            points: The points themselves ``[N, *D]``.
            critic_args: This batch's further arguments (labels, say); None means those given at construction.
            penalty_args: Likewise, of the penalty.
            critic_kwargs: Likewise, of the critic.

        Returns:
            The penalty, 0-dim, weight included, or a ``PenaltyResult``.
        """
        args = self.critic_args if critic_args is None else critic_args
        kwargs = self.critic_kwargs if critic_kwargs is None else critic_kwargs
        further = self.penalty_args if penalty_args is None else penalty_args
        check_critic_arguments(args, kwargs)
        check_penalty_arguments(further, self.config.penalty)
        check_gradients_allowed("a gradient penalty")
        if points is None:
            batches = penalty_points(self.config, real, fake, alpha, self.generator)
        else:
            batches = [given_points(self.config, points, real, fake, alpha)]
        given = next(x for x in (points, real, fake) if x is not None)
        rows = (given if isinstance(given, Tensor) else tree_leaves(given)[0]).shape[0]
        args, kwargs, further = thinned(self.config, (args, kwargs, further), rows)
        found = [self._at(batch, args, kwargs or {}, further) for batch in batches]
        penalties = [each.penalty for each in found]
        penalty = sum(penalties[1:], penalties[0])
        if not (self.return_norms or self.return_scores):
            return penalty
        norms, scores = [each.norms for each in found], [each.scores for each in found]
        return PenaltyResult(
            penalty,
            (torch.cat(norms) if len(norms) > 1 else norms[0]) if self.return_norms else None,  # type: ignore[arg-type]
            (tuple(scores) if len(scores) > 1 else scores[0]) if self.return_scores else None,
        )

    def _at(
        self, points: Samples, args: tuple[Any, ...], kwargs: Mapping[str, Any], further: tuple[Any, ...]
    ) -> PenaltyResult:
        """Compute the penalty at one set of points."""
        config = self.config
        if torch.compiler.is_compiling():
            opened = self._traced(points, args, kwargs) or self._by_autograd(points, args, kwargs)
            penalty, norms = penalised(opened.gradient, config.penalty, further, **config.norm_options)
            return PenaltyResult(penalty, norms, opened.scores)
        step = self._four_passes.prepare(Called(unwrapped(self.critic), points, args, kwargs, (config.score,)))
        if isinstance(step, GivenWay):
            opened = self._by_autograd(points, args, kwargs, step.choice.piecewise)
        elif self._open:
            opened = step.opened(points)
        else:
            return PenaltyResult(*step.attached(points, config.weight, config.target), None)
        penalty, norms = penalised(opened.gradient, config.penalty, further, **config.norm_options)
        if isinstance(step, GivenWay):
            step.confirm()
        return PenaltyResult(opened.finish(penalty), norms, opened.scores)

    def _by_autograd(
        self,
        points: Samples,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        piecewise: Piecewise | None = None,
    ) -> Opened:
        return opened_at(
            lambda x: picked(self.critic(x, *args, **kwargs), self.config.score),
            points,
            group_size=self.config.group_size,
            rows=self.config.penalty is None,
            piecewise=piecewise,
        )

    def _traced(self, points: Samples, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Opened | None:
        """Differentiate under ``torch.compile``, where operators stand for the four passes; None for autograd."""
        critic, score = unwrapped(self.critic), self.config.score
        if not isinstance(critic, nn.Module):
            return None
        if self._engine == "autograd":
            return None
        if callable(score) and self._score_name is None:
            raise TypeError(
                "under torch.compile, score must be an index, a key, or the function of a GradientPenalty that was "
                "made outside of what is compiled"
            )
        # Whatever it costs: a compiler cannot differentiate twice.
        settings = self.config.group_size, self.config.penalty is not None, self.return_scores
        known = traced_choice(id(critic), *settings, None if callable(score) else score, self._score_name)
        return opened_by_number(known.number, critic, points, args, kwargs, scored=self.return_scores)


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
    """Return α as ``check_alpha`` gives it, or drawn, and noise like the samples; None where not needed."""
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
        alpha = draw_alpha(first, generator, config.group_size)
    return alpha, each(lambda x: _draw_uniform(x.shape, x, generator), real) if config.at == "perturbed" else None


@torch.no_grad()
def mixed(config: PenaltyConfig, real: Samples, fake: Samples, alpha: Tensor | None, noise: Samples) -> list[Samples]:
    """Return the sets of points at which ``config`` penalises, from what ``draw`` gave."""
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
