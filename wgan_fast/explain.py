"""Which engine a critic's step runs on, why, and what it costs: in words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import check_batch, check_critic_arguments, check_floating, check_scores
from .engine.fused_mlp import FusedMLP, fused_mlp
from .engine.guarded import Called
from .engine.planned import FourPassEngine
from .four_pass import CaptureError, Objective
from .losses import wasserstein


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
            ]
        )


def explain(
    critic: nn.Module,
    example_input: Tensor,
    *,
    group_size: int = 1,
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Say which engine a critic's WGAN-GP step runs on, why, and what it costs.

    Args:
        critic: The critic.
        example_input: A batch ``[N, *D]`` like those to come.
        group_size: Consecutive samples that the critic packs into one decision.
        critic_args: Further positional arguments of the critic.
        critic_kwargs: Its keyword arguments.

    Returns:
        The explanation; print it.

    Raises:
        TypeError: ``critic`` is no module, or ``example_input`` no floating-point tensor.
        ValueError: ``example_input`` is empty, or the critic does not return a row of scores per sample.
        Exception: Whatever the critic raises for this input.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic must be an nn.Module, got {type(critic).__name__}")
    check_floating("example_input", example_input)
    check_batch("example_input", example_input)
    check_critic_arguments(critic_args, critic_kwargs)
    objective = Objective(wasserstein.critic, at="given", group_size=group_size)
    engine = FourPassEngine(critic, objective, cheaper_only=True)
    try:
        planned = engine.planned(Called(critic, example_input, critic_args, critic_kwargs or {}))
    except CaptureError as error:
        check_runs(critic, example_input, critic_args, critic_kwargs, group_size)
        return Explanation("autograd", str(error))
    plan = planned.plan
    fused = fused_mlp(plan.captured, example_input, group_size=group_size)
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
    )


def check_runs(
    critic: nn.Module, x: Tensor, critic_args: tuple[Any, ...], critic_kwargs: Mapping[str, Any] | None, group_size: int
) -> None:
    """Raise what the critic raises; its buffers and PyTorch's random numbers stay as they were."""
    buffers = [buffer.clone() for buffer in critic.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            check_scores(critic(x, *critic_args, **(critic_kwargs or {})), x, group_size)
    finally:
        for buffer, before in zip(critic.buffers(), buffers):
            buffer.data.copy_(before)
