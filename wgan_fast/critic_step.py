"""One critic step: scores, loss, penalty and every parameter gradient, ready for the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .backends import float32_products
from .checks import (
    UNREACHED,
    WHOLE,
    Engine,
    Score,
    check_alpha,
    check_critic_arguments,
    check_engine,
    check_gradients_allowed,
    check_loss,
    check_penalty_arguments,
    check_samples,
    check_score,
    check_scores,
    is_per_group,
    picked,
)
from .engine.autograd import Piecewise, forget_gradients, leave, opened_at, penalised
from .engine.choice import EngineChoice, unwrapped
from .engine.fused_mlp import FusedMLP, fused_mlp
from .engine.guarded import Called, Picks
from .engine.outside import Outside, OutsideLoss, OutsidePenalty
from .engine.planned import Prepared
from .four_pass import Objective, StepOutput
from .four_pass.blocks import joined
from .losses import LOSSES, AdversarialLoss, get_loss, wasserstein
from .ops.samples import constant, settled
from .points import (
    PenaltyConfig,
    Samples,
    check_part,
    draw,
    each,
    floating,
    mixed,
    nested_alike,
    one_precision,
    thinned,
)
from .precision import accumulation_dtype

Precision = Literal["fp32", "tf32", "bf16"]
Schedule = Literal["auto", "batched", "split"]


class CriticStepResult(NamedTuple):
    """What one critic step measured: detached 0-dim tensors on the critic's device.

    Attributes:
        loss: The whole objective, penalty included.
        penalty: The penalty, weight included; 0 at a step without one.
        wasserstein: mean D(real) − mean D(fake).
        real_score: mean D(real).
        fake_score: mean D(fake).
        gradient_norm: Mean ‖∇D‖₂ over the penalised points; NaN at a step without a penalty.
    """

    loss: Tensor
    penalty: Tensor
    wasserstein: Tensor
    real_score: Tensor
    fake_score: Tensor
    gradient_norm: Tensor


class CriticStep:
    """Computes the critic's loss and penalty and leaves their gradient in the parameters' ``.grad``.

    Args:
        critic: Maps ``[N, *D]`` to scores with a row per sample (per group, where the penalty's ``group_size`` packs).
        loss: Name of the adversarial loss ("wasserstein", "non_saturating", "least_squares", "hinge") or the loss: an
            ``AdversarialLoss`` of the scores, or any function ``loss(real_output, fake_output, *loss_args) -> 0-dim``
            of all that the critic returns (class heads, features).
        penalty: What to penalise; None for no penalty.
        score: What of the critic's output is its scores, as in ``gradient_penalty``; where the penalty's own ``score``
            is not None, that is what is penalised.
        engine: As in ``gradient_penalty``.
        compile: Compile the step with ``torch.compile``; needs the four-pass engine, and means nothing to the steps
            that the operator for narrow MLPs runs.
        precision: "fp32" computes in the critic's own dtype, on a GPU as PyTorch's switches have it; "tf32" has an
            NVIDIA GPU multiply and convolve in TF32 and is "fp32" elsewhere; "bf16" runs the critic under bfloat16
            autocast, with parameters, norms and means in float32.
        schedule: How the four-pass engine arranges real, fake and interpolates: "batched", "split" or "auto".
            Means nothing to the steps that the operator for narrow MLPs runs.

    In four passes spectral norm makes one power iteration a step, where autograd makes one for each forward pass.
    On a GPU the WGAN-GP step of a narrow MLP is one operator, compiled already: ``explain`` says whether it is taken.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A setting is unknown, or ``compile`` is asked for with ``engine="autograd"``.
    """

    critic: nn.Module
    loss: AdversarialLoss | Callable[..., Tensor]
    penalty: PenaltyConfig | None
    score: Score
    engine: Engine
    compile: bool
    precision: Precision
    schedule: Schedule

    def __init__(
        self,
        critic: nn.Module,
        *,
        loss: str | AdversarialLoss | Callable[..., Tensor] = "wasserstein",
        penalty: PenaltyConfig | None = PenaltyConfig.wgan_gp(),  # noqa: B008 (frozen)
        score: Score = None,
        engine: Engine = "auto",
        compile: bool = False,
        precision: Precision = "fp32",
        schedule: Schedule = "auto",
    ) -> None:
        if not isinstance(critic, nn.Module):
            raise TypeError(f"critic must be an nn.Module, got {type(critic).__name__}")
        if penalty is not None and not isinstance(penalty, PenaltyConfig):
            raise TypeError(f"penalty must be a PenaltyConfig or None, got {type(penalty).__name__}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}")
        check_engine(engine)
        check_score(score)
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}")
        if compile and engine == "autograd":
            raise ValueError('compile needs the four-pass engine, got compile=True with engine="autograd"')
        self.__dict__.update(
            critic=critic,
            loss=loss if callable(loss) else get_loss(loss),
            penalty=penalty,
            score=score,
            engine=engine,
            compile=compile,
            precision=precision,
            schedule=schedule,
        )
        self._choices: dict[tuple[bool, ...], tuple[EngineChoice, Picks]] = {}
        self.steps_taken = 0
        """Calls so far; decides which steps carry a lazy penalty, so set it when resuming."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CriticStep.__annotations__:
            raise AttributeError(f"{name} of a CriticStep cannot be replaced: make another CriticStep")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is made at the first steps: a copy makes its own."""
        return {**self.__dict__, "_choices": {}}

    @property
    def code(self) -> str:
        """The flat graphs that have run so far, as Python; none is where autograd or the operator for MLPs runs."""
        engines = [choice.four_pass for choice, _ in self._choices.values() if choice.four_pass]
        return "\n".join(plan.code for engine in engines for plan in engine.plans.values() if plan.runs)

    def __call__(
        self,
        real: Samples,
        fake: Samples,
        alpha: Tensor | float | None = None,
        accumulate: bool = False,
        *,
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
        fake_args: tuple[Any, ...] | None = None,
        fake_kwargs: Mapping[str, Any] | None = None,
        loss_args: tuple[Any, ...] = (),
        penalty_args: tuple[Any, ...] = (),
    ) -> CriticStepResult:
        """Run one step.

        Args:
            real: Real samples ``[N, *D]``, floating point.
            fake: Generated samples of the same shape, dtype and device; taken as constants.
            alpha: α as in ``gradient_penalty``; None draws it before the critic runs.
            accumulate: Add to the parameters' ``.grad`` instead of replacing it.
            critic_args: Further positional arguments of the critic, given with every batch: real, fake and the points.
            critic_kwargs: Keyword arguments of the critic, likewise.
            fake_args: Positional arguments in place of ``critic_args`` for the fake batch alone.
            fake_kwargs: Keyword arguments likewise.
            loss_args: Further arguments of a loss that is a function.
            penalty_args: Further arguments of a penalty that is a function.

        Returns:
            The step's figures; reading one on the host waits for the device.

        Raises:
            TypeError: As ``gradient_penalty``.
            ValueError: As ``gradient_penalty``, or under ``torch.inference_mode()``; no gradient has been touched then.
        """
        check_critic_arguments(critic_args, critic_kwargs)
        own = self._own_arguments(critic_args, critic_kwargs, fake_args, fake_kwargs)
        self._check_further(loss_args, penalty_args)
        check_gradients_allowed("a critic step")
        penalty = self._penalty_now()
        group_size = self.penalty.group_size if self.penalty else 1
        real, fake = one_precision(real, fake)
        first = check_samples(real, fake, group_size)
        N = first.shape[0]
        if self.penalty:
            check_part(self.penalty, N)
        part = penalty if penalty and penalty.samples not in (None, N) else None
        real, fake = each(settled, real), each(settled, nested_alike(real, fake))
        mixing = noise = None
        if penalty:
            mixing, noise = draw(penalty, real, alpha)
        elif alpha is not None:
            check_alpha(alpha, floating(real), group_size)
        forgotten = accumulate

        def forget() -> None:
            nonlocal forgotten
            if not forgotten:
                forget_gradients(self.critic)
            forgotten = True

        with torch.enable_grad(), self._arithmetic(first.device.type):
            apart: list[_Part] = []
            if part:
                sides = {"fake": ["fake"], "both": ["real", "fake"]}.get(part.at, ["points"])
                whole = Called(self.critic, real, critic_args, critic_kwargs or {}, own=own)
                for side, x in zip(sides, mixed(part, real, fake, mixing, noise)):
                    apart.append(self._apart(part, x, *thinned(part, (*whole.further(side), penalty_args), N)))
                penalty = None
            inside = _alpha_inside(real, mixing, group_size) if penalty and noise is None else None
            choice, picks = self._four_passes(penalty, own=own is not None, mixes=inside is not None)
            called = Called(unwrapped(self.critic), real, critic_args, critic_kwargs or {}, picks, own)
            step = choice.prepare(called)
            mlp = self._fused(step, penalty, real, mixing) if penalty and isinstance(step, Prepared) else None
            if isinstance(step, Prepared) and isinstance(mlp, FusedMLP) and penalty and mixing is not None:
                output = self._one_operator(mlp, step, penalty, real, fake, mixing)
                result = self._take(output, [step.inputs[i] for i in mlp.parameters], forget)
            else:
                points = []
                # A plan that mixes them itself needs none, unless it is compared.
                if penalty and (inside is None or not isinstance(step, Prepared) or step.check is not None):
                    points = mixed(penalty, real, fake, mixing, noise)
                if isinstance(step, Prepared):
                    batches = {"real": real, "fake": fake}
                    if inside is not None:
                        batches["alpha"] = inside
                    if mixing is not None and points:
                        (batches["points"],) = points
                    result = self._run(step, penalty, batches, loss_args, penalty_args, forget)
                else:
                    # As the forward was where it has been called already, then as it is.
                    forwards = step.forwards()
                    sides = ["real", "fake", *["fake" if x is fake else "points" for x in points]]
                    forwards += [partial(self._forward, called, side) for side in sides[len(forwards) :]]
                    further = loss_args, penalty_args
                    result = self._differentiate(
                        penalty, real, fake, points, further, forget, forwards, step.choice.piecewise
                    )
                    step.confirm()
            if apart:
                for one in apart:
                    one.leave()
                value = torch.stack([one.penalty for one in apart]).sum()
                norm = torch.cat([one.norms for one in apart]).mean()
                result = result._replace(loss=result.loss + value, penalty=value, gradient_norm=norm)
        self.steps_taken += 1
        return result

    def _own_arguments(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
        fake_args: tuple[Any, ...] | None,
        fake_kwargs: Mapping[str, Any] | None,
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        """Return the fake batch's own further arguments; None where it has none."""
        if fake_args is None and fake_kwargs is None:
            return None
        check_critic_arguments(() if fake_args is None else fake_args, fake_kwargs, "fake_args", "fake_kwargs")
        return args if fake_args is None else fake_args, (kwargs if fake_kwargs is None else fake_kwargs) or {}

    def _check_further(self, loss_args: object, penalty_args: object) -> None:
        if not isinstance(loss_args, tuple):
            raise TypeError(f"loss_args must be a tuple, got {type(loss_args).__name__}")
        if loss_args and isinstance(self.loss, AdversarialLoss):
            raise ValueError("loss_args are arguments of a loss that is a function, which this step's is not")
        check_penalty_arguments(penalty_args, self.penalty and self.penalty.penalty)

    def _loss_of(self, real: Any, fake: Any, args: tuple[Any, ...]) -> Tensor:
        """Evaluate the loss of what the critic gave, as its last pick has it."""
        if not isinstance(self.loss, AdversarialLoss):
            return check_loss(self.loss(real, fake, *args))
        return check_loss(self.loss.critic(_scores(real), _scores(fake)))

    def _run(
        self,
        step: Prepared,
        penalty: PenaltyConfig | None,
        batches: Mapping[str, Samples],
        loss_args: tuple[Any, ...],
        penalty_args: tuple[Any, ...],
        forget: Callable[[], None],
    ) -> CriticStepResult:
        """Run a step's four passes; a loss or a penalty of the user's own is computed between them."""
        outside: list[Outside] = []
        if not _is_recorded(self.loss):
            loss = OutsideLoss(step.planned.plan, lambda real, fake: self._loss_of(real, fake, loss_args))
            outside.append(loss)
        own = penalty is not None and penalty.penalty is not None
        if own:
            outside.append(step.outside_penalty(batches, _penalised(penalty, penalty_args)))  # type: ignore[arg-type]
        output = step.run(batches, *outside)
        if own:
            of_points = outside[-1]
            assert isinstance(of_points, OutsidePenalty)
            output = output._replace(penalty=of_points.value, gradient_norm=torch.cat(of_points.norms).mean())
        if not _is_recorded(self.loss):
            output = output._replace(loss=loss.value if output.penalty is None else loss.value + output.penalty)
        elif own:
            output = output._replace(loss=output.loss + output.penalty)  # type: ignore[operator]
        result = self._take(output, step.tensors, forget)
        for each_of_them in outside:
            each_of_them.leave()
        return result

    def _forward(self, called: Called, side: str, x: Samples) -> tuple[Any, ...]:
        """Call the critic as it is, and return what is made of its output."""
        args, kwargs = called.further(side)
        output = self.critic(x, *args, **kwargs)
        return tuple(picked(output, pick) for pick in called.picks)

    def _apart(
        self,
        penalty: PenaltyConfig,
        points: Samples,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        penalty_args: tuple[Any, ...],
    ) -> "_Part":
        """Compute a penalty on part of the batch; no gradient is touched."""
        choice, picks = self._four_passes(penalty, alone=True)
        called = Called(unwrapped(self.critic), points, args, kwargs, picks)
        step = choice.prepare(called)
        if isinstance(step, Prepared) and penalty.penalty is None:
            output = step.run({"points": points})
            assert output.penalty is not None
            return _Part(output.penalty, output.norms[0], partial(leave, step.tensors, output.gradients))
        if isinstance(step, Prepared):
            opened = step.opened(points)
        else:
            opened = opened_at(
                partial(_first, partial(self._forward, called, "points")),
                points,
                group_size=penalty.group_size,
                rows=penalty.penalty is None,
                piecewise=step.choice.piecewise,
            )
        value, norms = _penalised(penalty, penalty_args)(opened.gradient)
        value = opened.finish(value)
        if not isinstance(step, Prepared):
            step.confirm()
        return _Part(value.detach(), norms, value.backward if value.requires_grad else lambda: None)

    def _fused(self, step: Prepared, penalty: PenaltyConfig, real: Samples, alpha: Tensor | None) -> FusedMLP | str:
        """Return what the operator for MLPs needs, or why it cannot be taken."""
        if (
            self.loss is not wasserstein
            or penalty.penalty is not None
            or penalty.at != "interpolates"
            or step.check is not None
        ):
            return "the step is not WGAN-GP's, or is compared with autograd"
        if not isinstance(real, Tensor) or step.own:
            return "it takes several tensors, or arguments of the fake batch's own"
        if alpha is None or not is_per_group(alpha, real, penalty.group_size):
            return "there is not one α for each sample or group"
        planned = step.planned
        if planned.fused is None:
            planned.fused = fused_mlp(planned.plan.captured, real, group_size=penalty.group_size)
        fused: FusedMLP | str = planned.fused
        return fused

    def _one_operator(
        self, mlp: FusedMLP, step: Prepared, penalty: PenaltyConfig, real: Tensor, fake: Tensor, alpha: Tensor
    ) -> StepOutput:
        precision: str = self.precision
        if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
            precision = "tf32"
        with torch.no_grad():
            (real_score, fake_score, value, norm), _, gradients = torch.ops.wgan_fast.mlp_critic_step(
                real.flatten(1), fake.flatten(1), alpha.to(accumulation_dtype(real.dtype)),
                [step.inputs[i] for i in mlp.parameters], mlp.negative_slope,
                penalty.weight, penalty.target, penalty.one_sided, precision,
            )  # fmt: skip
            loss = fake_score - real_score + value
        return StepOutput(loss, value, real_score, fake_score, norm, [], gradients)

    def _take(self, output: StepOutput, parameters: Sequence[Tensor], forget: Callable[[], None]) -> CriticStepResult:
        """Leave what the four passes computed in the parameters."""
        if all(gradient is None for gradient in output.gradients):
            raise ValueError(UNREACHED)
        forget()
        leave(parameters, output.gradients)
        loss, penalty, real_score, fake_score, gradient_norm, *_ = output
        assert loss is not None
        assert real_score is not None
        assert fake_score is not None
        return _result(loss, penalty, real_score, fake_score, gradient_norm)

    def _differentiate(
        self,
        penalty: PenaltyConfig | None,
        real: Samples,
        fake: Samples,
        points: list[Samples],
        further: tuple[tuple[Any, ...], tuple[Any, ...]],
        forget: Callable[[], None],
        forwards: list[Callable[[Samples], tuple[Any, ...]]],
        piecewise: Piecewise,
    ) -> CriticStepResult:
        """Let autograd do the step, with the critic as it is for real, for fake and for each set of points."""
        group_size = self.penalty.group_size if self.penalty else 1
        loss_args, penalty_args = further
        outputs = [forward(x) for forward, x in zip(forwards, (real, fake))]
        rows = penalty is None or penalty.penalty is None
        real_scores, fake_scores = (_scores(out[1], floating(real), group_size, rows) for out in outputs)
        loss = self._loss_of(outputs[0][-1], outputs[1][-1], loss_args)
        reached = loss.requires_grad
        value = norm = None
        if penalty:
            found = []
            for forward, x in zip(forwards[2:], points):
                first = partial(_first, forward)
                opened = opened_at(first, x, group_size=group_size, rows=rows, piecewise=piecewise)
                part, norms = _penalised(penalty, penalty_args)(opened.gradient)
                found.append((opened.finish(part), norms))
            value = sum([part for part, _ in found[1:]], found[0][0])
            norm = torch.cat([norms for _, norms in found]).mean()
            loss = loss + value
        # The loss alone does not tell: through the penalty it may depend on the interpolates only.
        if not (reached and loss.requires_grad):
            raise ValueError(UNREACHED)
        forget()
        loss.backward()  # type: ignore[no-untyped-call]
        return _result(loss, value, real_scores.mean(), fake_scores.mean(), norm)

    def _four_passes(
        self, penalty: PenaltyConfig | None, *, alone: bool = False, own: bool = False, mixes: bool = False
    ) -> tuple[EngineChoice, Picks]:
        """Return the choice for the loss and a penalty, or for the penalty alone, and what is made of the output.

        Args:
            penalty: The penalty; None for the loss alone.
            alone: Whether it is without the loss.
            own: Whether the fake batch has further arguments of its own.
            mixes: Whether the plan mixes the points itself.
        """
        key = penalty is None, alone, own, mixes
        if key not in self._choices:
            # A step without the penalty still sees the groups that the penalty packs.
            group_size = self.penalty.group_size if self.penalty else 1
            loss = None if alone else self.loss
            objective, picks = objective_of(loss, penalty, self.score, group_size=group_size, own_arguments=own)
            if mixes:
                objective = replace(objective, at="mixed")
            choice = EngineChoice(self.critic, objective, self.engine, schedule=self.schedule, compile=self.compile)
            self._choices[key] = choice, picks
        return self._choices[key]

    def _penalty_now(self) -> PenaltyConfig | None:
        if self.penalty is None or self.penalty.every == 1:
            return self.penalty
        if self.steps_taken % self.penalty.every:
            return None
        return replace(self.penalty, weight=self.penalty.weight * self.penalty.every)

    def _arithmetic(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(device_type, torch.bfloat16)
        return float32_products(in_tf32=True) if self.precision == "tf32" and device_type == "cuda" else nullcontext()


def objective_of(
    loss: str | AdversarialLoss | Callable[..., Tensor] | None,
    penalty: PenaltyConfig | None,
    score: Score = None,
    *,
    group_size: int = 1,
    own_arguments: bool = False,
) -> tuple[Objective, Picks]:
    """Return what a plan computes, and what is made of the critic's output.

    Args:
        loss: As ``CriticStep`` takes it; None for the penalty alone, at points that are given.
        penalty: What is penalised; None for the loss alone.
        score: What of the output is the scores.
        group_size: Samples that share a score, where ``penalty`` does not say.
        own_arguments: Whether the fake batch has further arguments of its own.

    Returns:
        The objective, and the picks: what is penalised, and where there is a loss, the scores and what the loss is of.
    """
    objective = Objective(weight=None, group_size=group_size)
    if penalty is not None:
        at = penalty.at if penalty.at in ("real", "fake", "both") and loss is not None else "given"
        objective = Objective(at=at, outside_penalty=penalty.penalty is not None, **penalty.norm_options)
    penalised = score if penalty is None or penalty.score is None else penalty.score
    if loss is None:
        return objective, (penalised,)
    loss = loss if callable(loss) else get_loss(loss)
    recorded = loss.critic if _is_recorded(loss) else None  # type: ignore[union-attr]
    objective = replace(objective, loss=recorded, outside_loss=recorded is None, own_arguments=own_arguments)
    return objective, (penalised, score) if isinstance(loss, AdversarialLoss) else (penalised, score, WHOLE)


def _is_recorded(loss: Any) -> bool:
    """Whether a loss is one that a plan may hold: what another one computes may change."""
    return isinstance(loss, AdversarialLoss) and LOSSES.get(loss.name) is loss


class _Part(NamedTuple):
    """A penalty on part of a batch, its gradients' norms, and what leaves its gradients."""

    penalty: Tensor
    norms: Tensor
    leave: Callable[[], None]


def _scores(output: Any, x: Tensor | None = None, group_size: int = 1, rows: bool = True) -> Tensor:
    """Return a critic's scores as one tensor, wide enough for sums."""
    parts = output if isinstance(output, list) and output else [output]
    if x is not None:
        parts = [check_scores(part, x, group_size, rows=rows) for part in parts]
    return joined([part.to(accumulation_dtype(part.dtype)) for part in parts])


def _alpha_inside(real: Samples, alpha: Tensor | None, group_size: int) -> Tensor | None:
    """Return α, one a sample or group, for a plan that mixes the points itself; None for what it cannot mix."""
    if alpha is None or not isinstance(real, Tensor) or not is_per_group(alpha, real, group_size):
        return None
    dtype = accumulation_dtype(real.dtype)
    return alpha if alpha.dtype == dtype else alpha.to(dtype)


def _penalised(penalty: PenaltyConfig, args: tuple[Any, ...]) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Return what gives the penalty of an input gradient, and its norms."""
    return partial(penalised, function=penalty.penalty, args=args, **penalty.norm_options)


def _first(forward: Callable[[Samples], tuple[Any, ...]], x: Samples) -> Any:
    return forward(x)[0]


def _result(
    loss: Tensor, penalty: Tensor | None, real_score: Tensor, fake_score: Tensor, gradient_norm: Tensor | None
) -> CriticStepResult:
    loss, real_score, fake_score = map(constant, (loss, real_score, fake_score))
    return CriticStepResult(
        loss,
        torch.zeros_like(loss) if penalty is None else constant(penalty),
        real_score - fake_score,
        real_score,
        fake_score,
        torch.full_like(loss, torch.nan) if gradient_norm is None else constant(gradient_norm),
    )
