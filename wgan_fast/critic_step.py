"""One critic step: scores, loss, penalty and every parameter gradient, ready for the optimizer."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .checks import (
    Engine,
    Score,
    check_alpha,
    check_critic_arguments,
    check_engine,
    check_gradients_allowed,
    check_loss,
    check_samples,
    check_score,
    check_scores,
    is_per_sample,
    picked,
)
from .engine.autograd import Piecewise, forget_gradients, leave, penalty_at
from .engine.choice import EngineChoice
from .engine.fused_mlp import FusedMLP, fused_mlp
from .engine.planned import Prepared
from .four_pass import Objective, StepOutput
from .losses import AdversarialLoss, get_loss, wasserstein
from .ops.samples import settled
from .penalty import PenaltyConfig, check_part, draw, mixed, thinned
from .precision import accumulation_dtype

Precision = Literal["fp32", "bf16"]
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
        loss: Name of the adversarial loss ("wasserstein", "non_saturating", "least_squares", "hinge") or the loss.
        penalty: What to penalise; None for no penalty.
        score: What of the critic's output is its scores, as in ``gradient_penalty``.
        engine: As in ``gradient_penalty``.
        compile: Compile the step with ``torch.compile``; needs the four-pass engine, and means nothing to the steps
            that the operator for narrow MLPs runs.
        precision: "fp32" computes in the critic's own dtype; "bf16" runs the critic under bfloat16 autocast, with
            parameters, norms and means in float32.
        schedule: How the four-pass engine arranges real, fake and interpolates: "batched", "split" or "auto".
            Means nothing to the steps that the operator for narrow MLPs runs.

    In four passes spectral norm makes one power iteration a step, where autograd makes one for each forward pass.
    On a GPU the WGAN-GP step of a narrow MLP is one operator, compiled already: ``explain`` says whether it is taken.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A setting is unknown, or ``compile`` is asked for with ``engine="autograd"``.
    """

    critic: nn.Module
    loss: AdversarialLoss
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
        loss: str | AdversarialLoss = "wasserstein",
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
            loss=get_loss(loss),
            penalty=penalty,
            score=score,
            engine=engine,
            compile=compile,
            precision=precision,
            schedule=schedule,
        )
        self._choices: dict[tuple[PenaltyConfig | None, bool], EngineChoice] = {}
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
        engines = [choice.four_pass for choice in self._choices.values() if choice.four_pass]
        return "\n".join(plan.code for engine in engines for plan in engine.plans.values() if plan.runs)

    def __call__(
        self,
        real: Tensor,
        fake: Tensor,
        alpha: Tensor | float | None = None,
        accumulate: bool = False,
        *,
        critic_args: tuple[Any, ...] = (),
        critic_kwargs: Mapping[str, Any] | None = None,
    ) -> CriticStepResult:
        """Run one step.

        Args:
            real: Real samples ``[N, *D]``, floating point.
            fake: Generated samples of the same shape, dtype and device; taken as constants.
            alpha: α as in ``gradient_penalty``; None draws it before the critic runs.
            accumulate: Add to the parameters' ``.grad`` instead of replacing it.
            critic_args: Further positional arguments of the critic, given with every batch.
            critic_kwargs: Keyword arguments of the critic.

        Returns:
            The step's figures; reading one on the host waits for the device.

        Raises:
            TypeError: As ``gradient_penalty``.
            ValueError: As ``gradient_penalty``, or under ``torch.inference_mode()``; no gradient has been touched then.
        """
        check_critic_arguments(critic_args, critic_kwargs)
        check_gradients_allowed("a critic step")
        penalty = self._penalty_now()
        group_size = self.penalty.group_size if self.penalty else 1
        check_samples(real, fake, group_size)
        if self.penalty:
            check_part(self.penalty, real.shape[0])
        part = penalty if penalty and penalty.samples not in (None, real.shape[0]) else None
        real, fake = settled(real), settled(fake)
        mixing = noise = None
        if penalty:
            mixing, noise = draw(penalty, real, alpha)
        elif alpha is not None:
            check_alpha(alpha, real, group_size)

        with torch.enable_grad(), self._autocast(real.device.type):
            apart: list[_Part] = []
            if part:
                further = thinned(part, (critic_args, critic_kwargs or {}), real.shape[0])
                apart = [self._apart(part, x, *further) for x in mixed(part, real, fake, mixing, noise)]
                penalty = None
            step = self._four_passes(penalty).prepare(real, critic_args, critic_kwargs, score=self.score)
            mlp = self._fused(step, penalty, real, mixing) if penalty and isinstance(step, Prepared) else None
            if isinstance(step, Prepared) and isinstance(mlp, FusedMLP) and penalty and mixing is not None:
                output = self._one_operator(mlp, step, penalty, real, fake, mixing)
                result = self._take(output, [step.inputs[i] for i in mlp.parameters], accumulate)
            else:
                points = mixed(penalty, real, fake, mixing, noise) if penalty else []
                if isinstance(step, Prepared):
                    batches = {"real": real, "fake": fake}
                    if mixing is not None and penalty:
                        (batches["points"],) = points
                    result = self._take(step.run(batches), step.tensors, accumulate)
                else:
                    forwards = step.forwards()
                    forwards += [
                        lambda x: picked(self.critic(x, *critic_args, **(critic_kwargs or {})), self.score)
                    ] * (2 + len(points) - len(forwards))
                    result = self._differentiate(
                        penalty, group_size, real, fake, points, accumulate, forwards, step.choice.piecewise
                    )
                    step.confirm()
            if apart:
                for each in apart:
                    each.leave()
                value = torch.stack([each.penalty for each in apart]).sum()
                norm = torch.stack([each.gradient_norm for each in apart]).mean()
                result = result._replace(loss=result.loss + value, penalty=value, gradient_norm=norm)
        self.steps_taken += 1
        return result

    def _apart(
        self, penalty: PenaltyConfig, points: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "_Part":
        """Compute a penalty on part of the batch; no gradient is touched."""
        step = self._four_passes(penalty, alone=True).prepare(points, args, kwargs, score=self.score)
        if isinstance(step, Prepared):
            output = step.run({"points": points})
            assert output.penalty is not None
            assert output.gradient_norm is not None
            return _Part(output.penalty, output.gradient_norm, partial(leave, step.tensors, output.gradients))
        value, norm = penalty_at(
            lambda x: picked(self.critic(x, *args, **kwargs), self.score),
            points,
            **penalty.norm_options,
            piecewise=step.choice.piecewise,
        )
        step.confirm()
        return _Part(value.detach(), norm, value.backward if value.requires_grad else lambda: None)

    def _fused(self, step: Prepared, penalty: PenaltyConfig, real: Tensor, alpha: Tensor | None) -> FusedMLP | str:
        """Return what the operator for MLPs needs, or why it cannot be taken."""
        if self.loss.critic is not wasserstein.critic or penalty.at != "interpolates" or step.check is not None:
            return "the step is not WGAN-GP's, or is compared with autograd"
        if alpha is None or not is_per_sample(alpha, real):
            return "there is not one α per sample"
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
        return StepOutput(loss, value, real_score, fake_score, norm, gradients)

    def _take(self, output: StepOutput, parameters: Sequence[Tensor], accumulate: bool) -> CriticStepResult:
        """Leave what the four passes computed in the parameters."""
        if all(gradient is None for gradient in output.gradients):
            raise ValueError(_UNREACHED)
        if not accumulate:
            forget_gradients(self.critic)
        leave(parameters, output.gradients)
        loss, penalty, real_score, fake_score, gradient_norm, _ = output
        assert loss is not None
        assert real_score is not None
        assert fake_score is not None
        return _result(loss, penalty, real_score, fake_score, gradient_norm)

    def _differentiate(
        self,
        penalty: PenaltyConfig | None,
        group_size: int,
        real: Tensor,
        fake: Tensor,
        points: list[Tensor],
        accumulate: bool,
        forwards: list[Callable[[Tensor], Any]],
        piecewise: Piecewise,
    ) -> CriticStepResult:
        """Let autograd do the step, with the critic as it is for real, for fake and for each set of points."""

        def scores(forward: Callable[[Tensor], Any], x: Tensor) -> Tensor:
            out = check_scores(forward(x), x, group_size)
            return out.to(accumulation_dtype(out.dtype))

        real_scores, fake_scores = scores(forwards[0], real), scores(forwards[1], fake)
        loss = check_loss(self.loss.critic(real_scores, fake_scores))
        value = norm = None
        if penalty:
            parts = [
                penalty_at(forward, x, **penalty.norm_options, piecewise=piecewise)
                for forward, x in zip(forwards[2:], points)
            ]
            value = sum([part for part, _ in parts[1:]], parts[0][0])
            norm = torch.stack([part for _, part in parts]).mean()
            loss = loss + value
        # The loss alone does not tell: through the penalty it may depend on the interpolates only.
        if not (real_scores.requires_grad and loss.requires_grad):
            raise ValueError(_UNREACHED)
        if not accumulate:
            forget_gradients(self.critic)
        loss.backward()  # type: ignore[no-untyped-call]
        return _result(loss, value, real_scores.mean(), fake_scores.mean(), norm)

    def _four_passes(self, penalty: PenaltyConfig | None, alone: bool = False) -> EngineChoice:
        """Return the choice for the loss and a penalty, or for the penalty alone."""
        if (penalty, alone) not in self._choices:
            # A step without the penalty still sees the groups that the penalty packs.
            group_size = self.penalty.group_size if self.penalty else 1
            objective = Objective(self.loss.critic, weight=None, group_size=group_size)
            if penalty:
                at = penalty.at if penalty.at in ("real", "fake", "both") and not alone else "given"
                objective = Objective(None if alone else self.loss.critic, at=at, **penalty.norm_options)
            self._choices[penalty, alone] = EngineChoice(
                self.critic, objective, self.engine, schedule=self.schedule, compile=self.compile
            )
        return self._choices[penalty, alone]

    def _penalty_now(self) -> PenaltyConfig | None:
        if self.penalty is None or self.penalty.every == 1:
            return self.penalty
        if self.steps_taken % self.penalty.every:
            return None
        return replace(self.penalty, weight=self.penalty.weight * self.penalty.every)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(device_type, torch.bfloat16)
        return nullcontext()


class _Part(NamedTuple):
    """A penalty on part of a batch, its mean gradient norm, and what leaves its gradients."""

    penalty: Tensor
    gradient_norm: Tensor
    leave: Callable[[], None]


_UNREACHED = (
    "critic's loss reaches no trainable parameter: its scores were detached or computed under torch.no_grad(), or "
    "every parameter is frozen"
)


def _result(
    loss: Tensor, penalty: Tensor | None, real_score: Tensor, fake_score: Tensor, gradient_norm: Tensor | None
) -> CriticStepResult:
    loss, real_score, fake_score = loss.detach(), real_score.detach(), fake_score.detach()
    return CriticStepResult(
        loss,
        torch.zeros_like(loss) if penalty is None else penalty.detach(),
        real_score - fake_score,
        real_score,
        fake_score,
        torch.full_like(loss, torch.nan) if gradient_norm is None else gradient_norm.detach(),
    )
