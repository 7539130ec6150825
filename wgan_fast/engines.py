"""Which engine runs a critic: four passes where it can be captured, autograd otherwise, and why."""

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checks import Engine, check_batch, check_critic_arguments, check_floating
from .double_backprop import CaptureError, FourPassEngine, Objective, StepOutput
from .double_backprop.plan import Plan, Schedule
from .losses import wasserstein


class EngineChoice:
    """Runs an objective in four passes, or says that autograd must.

    Args:
        critic: Any callable; only an ``nn.Module`` can be captured.
        objective: What to compute.
        engine: "autograd" never captures, "four_pass" raises where capturing fails, "auto" warns once and gives way.
        schedule: As in ``CriticStep``.
        compile: As in ``CriticStep``.

    Attributes:
        reason: Why autograd runs; None while four passes do.
        four_pass: The engine; None where autograd runs.
        number: What the operator for compiled callers knows this choice by.
    """

    def __init__(
        self,
        critic: Callable[..., Tensor],
        objective: Objective,
        engine: Engine,
        *,
        schedule: Schedule = "auto",
        compile: bool = False,
    ) -> None:
        self.engine = engine
        self.reason: str | None = None
        self.four_pass: FourPassEngine | None = None
        self.number = next(_numbers)
        _BY_NUMBER[self.number] = self
        if engine == "autograd":
            self.reason = 'engine="autograd" was asked for'
        elif isinstance(critic, nn.Module):
            module = critic.module if isinstance(critic, DistributedDataParallel) else critic
            self.four_pass = FourPassEngine(module, objective, schedule=schedule, compile=compile)
        else:
            self._give_way(CaptureError(f"critic is a {type(critic).__name__}; only an nn.Module can be captured"))

    def __call__(
        self,
        batches: Mapping[str, Tensor],
        critic_args: tuple[Any, ...],
        critic_kwargs: Mapping[str, Any] | None,
    ) -> tuple[StepOutput, list[nn.Parameter]] | None:
        """Run one step.

        Args:
            batches: As in ``FourPassEngine``.
            critic_args: Further positional arguments of the critic.
            critic_kwargs: Its keyword arguments.

        Returns:
            The figures and gradients, with the parameters that these belong to; None where autograd must run.

        Raises:
            CaptureError: With ``engine="four_pass"``, where the critic cannot be captured.
        """
        if self.four_pass is None:
            return None
        try:
            plan = self.four_pass.plan(batches, critic_args, critic_kwargs)
        except CaptureError as error:
            self._give_way(error)
            return None
        return self.four_pass(batches, critic_args, critic_kwargs), plan.parameters

    def _give_way(self, error: CaptureError) -> None:
        if self.engine == "four_pass":
            raise error
        self.reason = str(error)
        self.four_pass = None
        warnings.warn(f"wgan_fast differentiates with autograd: {error}", RuntimeWarning, stacklevel=5)


_numbers = itertools.count()
_BY_NUMBER: "weakref.WeakValueDictionary[int, EngineChoice]" = weakref.WeakValueDictionary()
_CHOICES: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[Objective, Engine], EngineChoice]]"
_CHOICES = weakref.WeakKeyDictionary()


def choice_for(critic: Callable[..., Tensor], objective: Objective, engine: Engine) -> EngineChoice:
    """Return the choice for a critic, kept as long as the critic lives, so that every caller shares its plans."""
    if not isinstance(critic, nn.Module):
        return EngineChoice(critic, objective, engine)
    choices = _CHOICES.setdefault(critic, {})
    key = (objective, engine)
    if key not in choices:
        choices[key] = EngineChoice(critic, objective, engine)
    return choices[key]


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
    """

    engine: Literal["four_pass", "autograd"]
    reason: str | None = None
    schedule: str | None = None
    coupled: str | None = None
    curved: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    units: float | None = None
    launches: int | None = None

    def __str__(self) -> str:
        if self.engine == "autograd":
            return f"engine     autograd, because {self.reason}"
        coupled = f", because {self.coupled}" if self.coupled else ""
        return "\n".join(
            [
                f"engine     four_pass, {self.schedule}{coupled}",
                f"units      {self.units:.2f} critic forwards over one batch",
                f"launches   {self.launches} operators that are not views",
                f"curved     {', '.join(self.curved) or 'none, so there is no curvature pass'}",
                f"linear     {', '.join(self.linear) or 'none'}",
            ]
        )


def explain(
    critic: nn.Module,
    example_input: Tensor,
    *,
    critic_args: tuple[Any, ...] = (),
    critic_kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Say which engine a critic's WGAN-GP step runs on, why, and what it costs.

    Args:
        critic: The critic.
        example_input: A batch ``[N, *D]`` like those to come.
        critic_args: Further positional arguments of the critic.
        critic_kwargs: Its keyword arguments.

    Returns:
        The explanation; print it.

    Raises:
        TypeError: ``critic`` is no module, or ``example_input`` no floating-point tensor.
        ValueError: ``example_input`` is empty, or the critic does not return one score per sample.
    """
    if not isinstance(critic, nn.Module):
        raise TypeError(f"critic must be an nn.Module, got {type(critic).__name__}")
    check_floating("example_input", example_input)
    check_batch("example_input", example_input)
    check_critic_arguments(critic_args, critic_kwargs)
    batches = dict.fromkeys(("real", "fake", "points"), example_input)
    engine = FourPassEngine(critic, Objective(wasserstein.critic, at="given"))
    try:
        plan = engine.plan(batches, critic_args, critic_kwargs)
    except CaptureError as error:
        return Explanation("autograd", str(error))
    return Explanation(
        "four_pass",
        schedule=plan.schedule,
        coupled=plan.coupled,
        curved=tuple(sorted(plan.curved)),
        linear=tuple(sorted(plan.linear)),
        units=plan.units(),
        launches=plan.launches(),
    )


def run_by_number(
    number: int,
    points: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    critic_args: list[Tensor],
    critic_kwargs: list[Tensor],
    names: list[str],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """The penalty, every parameter's gradient and the updated buffers, for the operator that compiled callers run.

    The critic is planned when the operator first runs, outside the compiler: a new batch size makes a new plan, and
    no new compilation.
    """
    four_pass = _BY_NUMBER[number].four_pass
    if four_pass is None:
        raise CaptureError("the critic cannot run in four passes, and torch.compile cannot differentiate twice")
    critic, device = four_pass.critic, points.device.type
    buffers = [buffer.clone() for buffer in buffers]
    given = dict(zip(map(id, [*critic.parameters(), *critic.buffers()]), [*parameters, *buffers]))
    call = {"points": points}, tuple(critic_args), dict(zip(names, critic_kwargs))

    def plan() -> Plan:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return four_pass.plan(*call)

    with torch.autocast(device, autocast, enabled=autocast is not None):
        if not four_pass.has_plan(*call):
            # Inside an operator the dispatcher has switched autograd off for this thread, and torch.export needs it.
            with ThreadPoolExecutor(1) as other_thread:
                other_thread.submit(plan).result()
        trainable = plan().parameters
        output = four_pass(*call, given)
    gradients = {id(parameter): gradient for parameter, gradient in zip(trainable, output.gradients)}
    assert output.penalty is not None
    found = [gradients.get(id(parameter)) for parameter in critic.parameters()]
    filled = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]
    return [output.penalty, *filled, *buffers]
