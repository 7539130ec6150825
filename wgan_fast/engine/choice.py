"""Which engine runs a critic: four passes where it can be captured, autograd otherwise, and why."""

import ctypes
import itertools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import Engine, Score
from ..errors import users_level
from ..four_pass import CaptureError, Objective
from ..four_pass.objective import Schedule
from .autograd import Piecewise
from .checked import Check, asked_for, is_due
from .guarded import Called
from .planned import ChangedError, FourPassEngine, Prepared, TooManyPlansError, lasting


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
        self.score: Score = None
        """What compiled callers, who know the choice by its number, have picked of the critic's output."""
        self.waiting: OrderedDict[int, Any] = OrderedDict()
        """What their steps left that may still be differentiated, by token."""
        self.number = next(_numbers)
        _BY_NUMBER[self.number] = self
        self._owner = weakref.ref(lasting(critic))
        self.piecewise = Piecewise()
        if isinstance(critic, nn.DataParallel):
            critic = unwrapped(critic)
        if engine == "autograd":
            self.reason = 'engine="autograd" was asked for'
        elif isinstance(critic, nn.DataParallel):
            self._refuse(CaptureError("a DataParallel critic spreads its batches over several devices"))
        elif isinstance(critic, DistributedDataParallel):
            self._refuse(
                CaptureError("a DistributedDataParallel critic's gradients are reduced by autograd's backward")
            )
        else:
            self.four_pass = FourPassEngine(
                critic, objective, schedule=schedule, compile=compile, cheaper_only=engine != "four_pass"
            )

    def prepare(self, called: Called) -> "Prepared | GivenWay":
        """Prepare one step.

        Args:
            called: The critic, or a function of the same code, made anew, and a batch like those of the step.

        Returns:
            The step, or where autograd must take it, what to call once it has.

        Raises:
            CaptureError: With ``engine="four_pass"``, where the critic cannot be captured.
            TypeError: The critic does not return a tensor, or the loss does not.
            ValueError: The critic does not return a row of scores per sample, or its scores do not depend on its input.
        """
        if self.four_pass is None:
            return GivenWay(self, None)
        try:
            due = self._checks and is_due(self.four_pass.planned(called))
            prepared = self.four_pass.prepare(called)
            if due:
                prepared.check = Check(called)
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

    def forwards(self) -> list[Callable[[Any], tuple[Any, ...]]]:
        """Return the forward's picks as they were for those batches for which this step has called it already."""
        return self.error.forwards() if isinstance(self.error, ChangedError) else []

    def confirm(self) -> None:
        """Say why, after autograd has taken it: what fails there too is the user's error, and no reason."""
        if self.error is not None:
            self.choice.give_way(self.error)


_SAID: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()
"""The reasons that a critic's owner has been warned of."""


_numbers = itertools.count()
_BY_NUMBER: "weakref.WeakValueDictionary[int, EngineChoice]" = weakref.WeakValueDictionary()
_CHOICES: "weakref.WeakKeyDictionary[Any, dict[tuple[Objective, Engine, Any], EngineChoice]]"
_CHOICES = weakref.WeakKeyDictionary()


def penalty_choice(
    critic: Callable[..., Any], objective: Objective, engine: Engine, score: Score = None, *, alike: bool = True
) -> EngineChoice:
    """Return the choice for a critic's penalty, kept as long as the critic lives.

    Of a wrapped critic it is the choice for the module within: the caller's own backward reduces.

    Args:
        critic: The critic.
        objective: A form of one.
        engine: As in ``gradient_penalty``.
        score: Likewise.
        alike: Whether functions of one code share a choice, as those do that are made anew at every step.
    """
    critic = unwrapped(critic)
    choices = _CHOICES.setdefault(lasting(critic), {})
    key = objective, engine, _hashable(lasting(score) if callable(score) and alike else score)
    choice = choices.get(key)
    if choice is None:
        choice = choices.setdefault(key, EngineChoice(critic, objective, engine))
        choice.score = score
    return choice


def _hashable(value: Any) -> Any:
    return value if isinstance(value, Hashable) else type(value)


_FUNCTIONS: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def named(score: Score) -> str | None:
    """Return a name by which a compiler, which passes on and guards constants alone, can tell a function's choice."""
    if not callable(score):
        return None
    name = f"score {next(_numbers)}"
    try:
        _FUNCTIONS[name] = score
    except TypeError:  # of a type without weak references: eager callers do not need it
        return None
    return name


def traced_choice(
    identity: int, group_size: int, outside: bool, scored: bool, score: int | str | None, name: str | None
) -> EngineChoice:
    """Return the choice for a critic's input gradient, for a compiler.

    That calls this as it traces instead of looking into it, with constants alone (PyTorch 2.11), and guards these.

    Args:
        identity: The critic's ``id``.
        group_size: Samples that share a score.
        outside: Whether the penalty is a function of one's own.
        scored: Whether scores are wanted.
        score: As in ``gradient_penalty``, unless it is a function.
        name: What ``named`` gave for that.
    """
    objective = Objective(group_size=group_size, outside_penalty=True, outside_scores=scored).form()
    pick = score if name is None else _FUNCTIONS[name]
    return penalty_choice(ctypes.cast(identity, ctypes.py_object).value, objective, "four_pass", pick, alike=False)


def unwrapped(critic: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module within a wrapper that only spreads its work."""
    if isinstance(critic, DistributedDataParallel):
        return critic.module  # type: ignore[no-any-return]
    if isinstance(critic, nn.DataParallel) and len(critic.device_ids) < 2:
        return critic.module  # type: ignore[no-any-return]
    return critic


# What torch.compiler.assume_constant_result does, which imports the compiler: a second that only compilers need.
traced_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choice_by_number(number: int) -> EngineChoice:
    """Return the choice that compiled callers know by a number."""
    return _BY_NUMBER[number]
