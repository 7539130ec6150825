"""Which engine runs a critic: four passes where it can be captured, autograd otherwise, and why."""

import ctypes
import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .autograd import Piecewise
from .checked import Check, asked_for, is_due
from .checks import Engine, check_batch, check_critic_arguments, check_floating, check_scores
from .double_backprop import CaptureError, ChangedError, FourPassEngine, Objective, Prepared, TooManyPlansError
from .double_backprop.engine import lasting
from .double_backprop.plan import Schedule
from .errors import users_level
from .fused_mlp import FusedMLP, fused_mlp
from .losses import wasserstein


class EngineChoice:
    """Prepares an objective's steps in four passes, or says that autograd must take them.

    Args:
        critic: Any callable; a ``DistributedDataParallel`` cannot be captured: its reduction of the gradients hangs
            on autograd's backward.
        objective: What to compute.
        engine: "autograd" never captures, "four_pass" raises where capturing fails, "auto" warns once and gives way,
            there and where autograd costs less, and so does "checked", which compares steps with autograd.
        schedule: As in ``CriticStep``.
        compile: As in ``CriticStep``.

    Attributes:
        reason: Why autograd runs; None while four passes do.
        four_pass: The engine; None where autograd runs.
        number: What the operator for compiled callers knows this choice by.
        piecewise: What autograd's steps found out about the critic's activations.
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
        self._checks = engine == "checked" or asked_for()
        self.reason: str | None = None
        self.four_pass: FourPassEngine | None = None
        self.number = next(_numbers)
        _BY_NUMBER[self.number] = self
        self._owner = weakref.ref(lasting(critic))
        self.piecewise = Piecewise()
        if engine == "autograd":
            self.reason = 'engine="autograd" was asked for'
        elif isinstance(critic, DistributedDataParallel):
            self._refuse(
                CaptureError("a DistributedDataParallel critic's gradients are reduced by autograd's backward")
            )
        else:
            self.four_pass = FourPassEngine(
                critic, objective, schedule=schedule, compile=compile, cheaper_only=engine != "four_pass"
            )

    def prepare(
        self,
        x: Tensor,
        critic_args: tuple[Any, ...],
        critic_kwargs: Mapping[str, Any] | None,
        critic: Callable[..., Tensor] | None = None,
    ) -> "Prepared | GivenWay":
        """Prepare one step.

        Args:
            x: A batch like those of the step.
            critic_args: Further positional arguments of the critic.
            critic_kwargs: Its keyword arguments.
            critic: As in ``FourPassEngine.prepare``.

        Returns:
            The step, or where autograd must take it, what to call once it has.

        Raises:
            CaptureError: With ``engine="four_pass"``, where the critic cannot be captured.
            TypeError: The critic does not return a tensor, or the loss does not.
            ValueError: The critic does not return one score per sample, or its scores do not depend on its input.
        """
        if self.four_pass is None:
            return GivenWay(self, None)
        try:
            check = None
            if self._checks and is_due(self.four_pass.planned(x, critic_args, critic_kwargs, critic)):
                checked = self.four_pass.critic if critic is None else critic
                check = Check(checked, critic_args, critic_kwargs or {})
            prepared = self.four_pass.prepare(x, critic_args, critic_kwargs, critic)
            prepared.check = check
            return prepared
        except CaptureError as error:
            if self.engine == "four_pass":
                raise
            return GivenWay(self, error)

    def _refuse(self, error: CaptureError) -> None:
        if self.engine == "four_pass":
            raise error
        self.give_way(error)

    def give_way(self, error: CaptureError) -> None:
        """Leave the critic to autograd from now on, and say so once per critic, however many objectives it is given."""
        if not isinstance(error, TooManyPlansError):
            self.reason = str(error)
            self.four_pass = None
        said = _SAID.setdefault(self._owner() or self, set())
        kind = type(error).__name__ if self.reason is None else str(error)
        if kind not in said:
            said.add(kind)
            warnings.warn(f"wgan_fast differentiates with autograd: {error}", RuntimeWarning, stacklevel=users_level())


class GivenWay(NamedTuple):
    """A step that autograd must take."""

    choice: EngineChoice
    error: CaptureError | None

    def forwards(self) -> list[Callable[[Tensor], Tensor]]:
        """What the forward was for those batches of this step for which it has been called already."""
        return self.error.forwards() if isinstance(self.error, ChangedError) else []

    def confirm(self) -> None:
        """Say why, after autograd has taken it: what fails there too is the user's error, and no reason."""
        if self.error is not None:
            self.choice.give_way(self.error)


_SAID: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()
"""The reasons that a critic's owner has been warned of."""


_numbers = itertools.count()
_BY_NUMBER: "weakref.WeakValueDictionary[int, EngineChoice]" = weakref.WeakValueDictionary()
_CHOICES: "weakref.WeakKeyDictionary[Any, dict[tuple[bool, int, Engine], EngineChoice]]"
_CHOICES = weakref.WeakKeyDictionary()


def penalty_choice(critic: Callable[..., Tensor], one_sided: bool, group_size: int, engine: Engine) -> EngineChoice:
    """Return the choice for a critic's penalty of any weight and target, kept as long as the critic lives.

    Of a ``DistributedDataParallel`` it is the choice for the module within: the caller's own backward reduces.
    """
    if isinstance(critic, DistributedDataParallel):
        critic = critic.module
    choices = _CHOICES.setdefault(lasting(critic), {})
    choice = choices.get((one_sided, group_size, engine))
    if choice is None:
        objective = Objective(weight=1.0, target=0.0, one_sided=one_sided, at="given", group_size=group_size)
        choice = choices.setdefault((one_sided, group_size, engine), EngineChoice(critic, objective, engine))
    return choice


def traced_choice(identity: int, one_sided: bool, group_size: int, engine: Engine) -> EngineChoice:
    """As ``penalty_choice``, for a compiler, which calls this as it traces instead of looking into it.

    Args:
        identity: The critic's ``id``: PyTorch 2.11 takes constants alone here. Dynamo guards it.
        one_sided: As there.
        group_size: As there.
        engine: As there.
    """
    return penalty_choice(ctypes.cast(identity, ctypes.py_object).value, one_sided, group_size, engine)


# What torch.compiler.assume_constant_result does, which imports the compiler: a second that only compilers need.
traced_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        ValueError: ``example_input`` is empty, or the critic does not return one score per sample.
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
        planned = engine.planned(example_input, critic_args, critic_kwargs)
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


def choice_by_number(number: int) -> EngineChoice:
    """Return the choice that compiled callers know by a number."""
    return _BY_NUMBER[number]
