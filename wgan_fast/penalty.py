"""The gradient penalty for existing training code: one call, same value and gradients as the usual recipe."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from . import ops as ops
from . import reference
from .checks import (
    Engine,
    Score,
    check_batch,
    check_critic_arguments,
    check_engine,
    check_floating,
    check_gradients_allowed,
    check_penalty_arguments,
    picked,
)
from .engine.autograd import Opened, Piecewise, opened_at, penalised
from .engine.choice import EngineChoice, GivenWay, named, penalty_choice, traced_choice, unwrapped
from .engine.compiled_callers import opened_by_number
from .engine.guarded import Called
from .four_pass import CaptureError, Objective
from .points import At, PenaltyConfig, Samples, given_points, penalty_points, thinned


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

    Examples:
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
        self.critic = critic
        options = PenaltyConfig(weight, target, one_sided, at, group_size, penalty=penalty, score=score)
        if config is not None and not isinstance(config, PenaltyConfig):
            raise TypeError(f"config must be a PenaltyConfig or None, got {type(config).__name__}")
        if config is not None and options != PenaltyConfig():
            raise ValueError("config says what is penalised: other values must not be given beside it")
        self.config = options if config is None else config
        check_penalty_arguments(penalty_args, self.config.penalty)
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
        if self.return_scores and isinstance(self.critic, DistributedDataParallel):
            # It reduces gradients of its own forwards alone, and this one is all there is.
            if engine == "four_pass":
                raise CaptureError("a DistributedDataParallel critic's own forward must give the scores")
            engine = "autograd"
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
            raise TypeError(
                "under torch.compile the critic of a gradient penalty must be an nn.Module, got "
                f"{type(critic).__name__}: make the function the forward of one"
            )
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

    Examples:
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
