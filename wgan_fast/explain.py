"""Which engine a critic's step runs on, why, and what it costs: in words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import Score, check_critic_arguments, check_one, check_scores, picked
from .critic_step import objective_of
from .engine.choice import unwrapped
from .engine.fused_mlp import FusedMLP, fused_mlp
from .engine.guarded import Called
from .engine.planned import FourPassEngine
from .four_pass import CaptureError, Plan
from .losses import AdversarialLoss, wasserstein
from .points import PenaltyConfig, Samples


@dataclass(frozen=True)
class Explanation:
    """How a critic's training step runs; ``str()`` is a report.

    Attributes:
        engine: "four_pass" or "autograd".
        reason: Why autograd; None with four passes.
        schedule: "batched" or "split"; None with autograd, like everything below.
        coupled: Why samples are not proven to be independent; None where they are.
        curved: Operators whose curvature the step carries.
        linear: The critic's other operators.
        units: Matmul and convolution FLOPs of the step, in critic forwards over one batch.
        launches: Operators of the step that are not views.
        autograd_units: The same of autograd's step, which leaves out the dead pass; None where it fails.
        autograd_launches: Likewise.
        outside: What is computed between the pieces of the step, and what that costs; None for nothing.
        unfused: Why the step is not the one operator for narrow MLPs on a GPU; None where it is. ``units`` and
            ``launches`` are then those of the steps that need another loss or penalty.
    """

    engine: Literal["four_pass", "autograd"]
    reason: str | None = None
    schedule: str | None = None
    coupled: str | None = None
    curved: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    units: float | None = None
    launches: int | None = None
    autograd_units: float | None = None
    autograd_launches: int | None = None
    unfused: str | None = None
    outside: str | None = None

    def __str__(self) -> str:
        if self.engine == "autograd":
            return f"engine     autograd, because {self.reason}"
        coupled = f", because {self.coupled}" if self.coupled else ""
        fused = "yes, one operator for the step; units and launches are those of the four passes that run otherwise"
        if self.unfused:
            fused = f"no, because {self.unfused}"
        units = launches = ", where autograd fails"
        if self.autograd_units is not None:
            units, launches = f", by autograd {self.autograd_units:.2f}", f", by autograd {self.autograd_launches}"
        return "\n".join(
            [
                f"engine     four_pass, {self.schedule}{coupled}",
                f"units      {self.units:.2f} critic forwards over one batch{units}",
                f"launches   {self.launches} operators that are not views{launches}",
                f"curved     {', '.join(self.curved) or 'none, so there is no curvature pass'}",
                f"linear     {', '.join(self.linear) or 'none'}",
                f"fused      {fused}",
                *([f"outside    {self.outside}"] if self.outside else []),
            ]
        )


def explain(
    critic: Callable[..., Any],
    example_input: Samples,
    *,
    loss: str | AdversarialLoss | Callable[..., Tensor] | None = "wasserstein",
    penalty: PenaltyConfig | None = PenaltyConfig.wgan_gp(),  # noqa: B008 (frozen)
    score: Score = None,
    group_size: int = 1,
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
    return_scores: bool = False,
) -> Explanation:
    """Say which engine a critic's step runs on, why, and what it costs.

    Args:
        critic: The critic: a module or a function.
        example_input: A batch ``[N, *D]`` like those to come, or a nest of such.
        loss: That of the step, as ``CriticStep`` takes it; None for the penalty alone, as of ``gradient_penalty``.
        penalty: What is penalised; None for the loss alone.
        score: What of the critic's output is its scores, as in ``gradient_penalty``.
        group_size: Consecutive samples that the critic packs into one decision; for a ``penalty`` that does not say.
        critic_args: Further positional arguments of the critic.
        critic_kwargs: Its keyword arguments.
        return_scores: Whether ``gradient_penalty`` returns scores; without a loss alone.

    Returns:
        The explanation; print it.

    Raises:
        TypeError: An argument is of the wrong type, or ``example_input`` has no floating-point tensor.
        ValueError: ``example_input`` is empty, or the critic does not return a row of scores per sample.
        Exception: Whatever the critic raises for this input.
    """
    if not callable(critic):
        raise TypeError(f"critic must be callable, got {type(critic).__name__}")
    if loss is None and penalty is None:
        raise ValueError("loss and penalty are both None: there is nothing to explain")
    if return_scores and loss is not None:
        raise ValueError("return_scores is an option of the penalty alone: it needs loss=None")
    first = check_one("example_input", example_input)
    check_critic_arguments(critic_args, critic_kwargs)
    if penalty is not None and group_size != 1:
        if penalty.group_size not in (1, group_size):
            raise ValueError(f"group_size is {group_size}, and {penalty.group_size} in penalty")
        penalty = replace(penalty, group_size=group_size)
    objective, picks = objective_of(loss, penalty, score, group_size=group_size)
    if loss is None:
        outside = objective.outside_penalty or return_scores
        objective = replace(objective, outside_penalty=outside, outside_scores=return_scores)
    critic = unwrapped(critic)
    engine = FourPassEngine(critic, objective, cheaper_only=True)
    called = Called(critic, example_input, critic_args, critic_kwargs or {}, picks)
    try:
        planned = engine.planned(called)
    except CaptureError as error:
        _check_runs(called, objective.group_size, rows=not objective.outside_penalty)
        return Explanation("autograd", str(error))
    plan = planned.plan
    fused: FusedMLP | str = "the step is not WGAN-GP's"
    if objective.loss is wasserstein.critic and penalty is not None and not objective.outside_penalty:
        fused = fused_mlp(plan.captured, first, group_size=objective.group_size)
    return Explanation(
        "four_pass",
        schedule=plan.schedule,
        coupled=plan.coupled,
        curved=tuple(sorted(plan.curved)),
        linear=tuple(sorted(plan.linear)),
        units=plan.units(),
        launches=plan.launches(),
        autograd_units=planned.autograd and plan.units(planned.autograd.flops),
        autograd_launches=planned.autograd and planned.autograd.launches,
        unfused=None if isinstance(fused, FusedMLP) else fused,
        outside=_outside(plan),
    )


def _outside(plan: Plan) -> str | None:
    """Say what is computed between the pieces of a plan."""
    parts = []
    if plan.objective.outside_loss:
        parts.append("the loss")
    if plan.objective.outside_penalty:
        parts.append("the penalty")
    if not parts:
        return None
    said = f"{' and '.join(parts)}, by autograd, between {len(plan.pieces)} pieces of the step"
    if plan.objective.outside_scores and not plan.scales:
        why = plan.coupled or "there are several scores to a sample"
        return f"{said}; a loss of the scores takes one more backward pass, because {why}"
    return (
        f"{said}; a loss of the scores scales what the penalty pulled back" if plan.objective.outside_scores else said
    )


def _check_runs(called: Called, group_size: int, *, rows: bool) -> None:
    """Raise what the critic raises; its buffers and PyTorch's random numbers stay as they were."""
    x, critic = called.first, called.critic
    live = list(critic.buffers()) if isinstance(critic, nn.Module) else []
    buffers = [buffer.clone() for buffer in live]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            scores = picked(critic(called.x, *called.args, **called.kwargs), called.picks[0])
            for part in scores if isinstance(scores, list) and scores else [scores]:
                check_scores(part, x, group_size, rows=rows)
    finally:
        for buffer, before in zip(live, buffers):
            buffer.data.copy_(before)
