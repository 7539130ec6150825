"""The engine as the rest of the package sees it: what a step depends on, the plan for that, and its gradients."""

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..errors import users_level
from ..four_pass.capture import Captured, CaptureError, first_line
from ..four_pass.counting import Cost
from ..four_pass.objective import Batches, Objective, Schedule, StepOutput
from ..four_pass.plan import Plan
from ..four_pass.program import same_draws
from .autograd import Opened, attach, once
from .cost import by_autograd, of_plan
from .guarded import MOST_IN_A_ROW, Called, GuardedCall, Look, Traced, hushed
from .outside import Outside, OutsidePenalty, nested

FREE_PLANS = 4
"""Of one form of a critic, for as many batch shapes and numbers; each further plan must be earned."""
EARNED_BY = 32
"""Steps that earn one."""
SECONDS_AN_OPERATOR = 0.015
"""What planning one takes, on two cores of a server; a first call that will be long says so."""

_RECURRENT = {
    torch.ops.aten.lstm.input,
    torch.ops.aten.gru.input,
    torch.ops.aten.rnn_tanh.input,
    torch.ops.aten.rnn_relu.input,
}

_PLANNING = threading.RLock()
"""Planning is for one thread at a time: parts of PyTorch that it uses are not safe from several."""


class TooManyPlansError(CaptureError):
    """This step is not worth a plan of its own; others may be."""


class ChangedError(CaptureError):
    """A step cannot be run in four passes after some of its forwards' changes were made; ``looks`` holds these."""

    def __init__(self, message: str, looks: Sequence[Look]) -> None:
        super().__init__(message)
        self.looks = looks

    def forwards(self) -> list[Callable[[Any], tuple[Any, ...]]]:
        """Return the forward's picks as they were at each call, from samples alone; autograd differentiates them."""

        def forward(look: Look, x: Any) -> tuple[Any, ...]:
            captured, inputs, leaves = look.traced.captured(look.inputs), list(look.inputs), tree_leaves(x)
            for node, i in captured.sampled.items():
                if i < captured.leaves:
                    inputs[captured.inputs.index(node)] = leaves[i]
            return nested(captured.picks, captured.functions.forward(*inputs))  # type: ignore[no-any-return]

        return [partial(forward, look) for look in self.looks]


def _same(one: Look, other: Look) -> bool:
    """Whether the scores are the same function of the samples."""
    ours, theirs = one.traced.captured(one.inputs), other.traced.captured(other.inputs)
    if ours is not theirs and (_reading(ours) != _reading(theirs) or ours.constants or theirs.constants):
        return False
    pairs = zip(
        *[[(n, v) for n, v in zip(c.inputs, i) if n.users] for c, i in ((ours, one.inputs), (theirs, other.inputs))]
    )
    for (node, a), (_, b) in pairs:
        if node in ours.sampled:
            continue
        # A number that has become an input is a new tensor at every call.
        number = isinstance(a, Tensor) and a.dim() == 0 and a.device.type == "cpu" and not a.requires_grad
        if a is not b and not (number and isinstance(b, Tensor) and torch.equal(a, b)) and isinstance(a, Tensor):
            return False
        if not isinstance(a, Tensor) and a != b:
            return False
    return True


def _reading(captured: Captured) -> list[str | None]:
    """Write down what a graph computes; what it is given and does not use is none of that."""
    return [node.format_node() for node in captured.graph.nodes if node.users or node.op == "output"]


_CRITICS: "weakref.WeakKeyDictionary[Any, GuardedCall]" = weakref.WeakKeyDictionary()
_NEWEST: "weakref.WeakKeyDictionary[type, GuardedCall]" = weakref.WeakKeyDictionary()
"""By the critics' class, so that a helper that is made anew at every step is not traced anew."""


def lasting(critic: Callable[..., Any]) -> Any:
    """Return what stays of a critic between calls: a function or a bound method may be a new object at each."""
    if isinstance(critic, nn.Module):
        return critic
    while isinstance(critic, partial):
        critic = critic.func
    function = getattr(critic, "__func__", critic)
    owner = getattr(function, "__code__", function)
    # An object that is called has its own, if it can be told from others after its end.
    return owner if getattr(type(owner), "__weakrefoffset__", 0) else type(owner)


def _known(called: Called) -> GuardedCall:
    owner = lasting(called.critic)
    known = _CRITICS.get(owner)
    if known is None:
        with _PLANNING:
            newest = _NEWEST.get(type(owner))
            if newest is None or not newest.serves(called):
                newest = _NEWEST[type(owner)] = GuardedCall()
            known = _CRITICS.setdefault(owner, newest)
    return known


@dataclass
class Planned:
    """A plan, and what autograd would do in its place.

    Attributes:
        plan: The plan.
        autograd: What the step costs by autograd; None where that fails.
        reached: For each gradient of the plan, whether autograd leaves one, be it of zeros; None where that fails.
        reached_by: The same where others compute between the plan's pieces, by what of it they use.
        fused: What the operator for narrow MLPs needs to run the step, or why it cannot; None until it is asked for.
        suspect: Whether the last one that was compared with autograd was off.
    """

    plan: Plan
    autograd: Cost | None
    reached: list[bool] | None
    fused: Any = None
    suspect: bool = False
    reached_by: dict[tuple[bool, ...], list[bool] | None] = field(default_factory=dict)

    @cached_property
    def dearer(self) -> str | None:
        """Say what autograd's step costs less by; None where it does not."""
        ours, theirs = of_plan(self.plan), self.autograd
        if theirs is None:
            return None
        if ours.seconds() <= 1.1 * theirs.seconds() + _SECOND_GRAPH:
            return None
        return (
            f"four passes cost more: {ours.flops:.1e} FLOPs, {ours.launches} operators and {ours.bytes:.1e} bytes "
            f"against {theirs.flops:.1e}, {theirs.launches} and {theirs.bytes:.1e}"
        )


_SECOND_GRAPH = 30e-6
"""Seconds that autograd takes to write down a graph of the gradient, whatever its operators cost; measured on 46 tiny
critics, of which four passes take 0.5 to 0.98 of autograd's time with 0.15 to 1.16 of its operators."""


@dataclass
class Prepared:
    """A step that can be run.

    Attributes:
        objective: What to compute.
        planned: Its plan.
        inputs: What the forward reads now.
        own: The fake batch's own further arguments, if it has some: their leaves.
        check: What to show the step to, once it has run.
    """

    objective: Objective
    planned: Planned
    inputs: tuple[Any, ...]
    own: list[Any] = field(default_factory=list)
    check: Callable[..., None] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The trainable tensors that the forward reads, in the order of the gradients."""
        plan = self.planned.plan
        shared = [self.inputs[i] for i in plan.trainable]
        if not self.own:
            return shared
        return [*shared, *[self.own[plan.captured.sampled[n] - plan.captured.leaves] for n in plan.own_arguments]]

    def run(
        self, batches: Mapping[str, Any], *answers: Outside, weight: float | None = None, target: float = 0.0
    ) -> StepOutput:
        """Run the step; its gradients are None exactly where autograd leaves none.

        Args:
            batches: What the objective takes of ``real``, ``fake`` and ``points`` by name: samples.
            answers: What is computed between the pieces of its plan.
            weight: The penalty's factor, in place of the objective's.
            target: The norm that costs nothing, likewise.
        """
        output = self.differentiate(batches, *answers, weight=weight, target=target)
        used = tuple(value is not None for answer in answers for value in answer.given)
        return StepOutput(*output[:-1], self._as_autograd(list(output.gradients), used))

    def differentiate(
        self, batches: Mapping[str, Any], *answers: Outside, weight: float | None = None, target: float = 0.0
    ) -> StepOutput:
        """Run the step as ``run`` does, with None also for gradients of zeros."""
        if weight is None:
            weight, target = self.objective.weight, self.objective.target
        leaves = self._leaves(batches)
        output = self.planned.plan.run(self.inputs, leaves, weight, target, *answers)
        if self.check is not None:
            objective = replace(self.objective, weight=weight, target=target)
            given = [value for answer in answers for value in answer.given]
            self.check(objective, batches, self.planned, self.tensors, output, given)
        return output

    def reached(self, used: tuple[bool, ...]) -> list[bool] | None:
        """For each gradient, whether autograd leaves one, by what others use of what the plan gives."""
        if not used:
            return self.planned.reached
        known = self.planned.reached_by
        if used not in known:
            known[used] = by_autograd(self.planned.plan, self.inputs, used)[1]
        return known[used]

    def _leaves(self, batches: Mapping[str, Any]) -> Batches:
        leaves = {name: [x] if isinstance(x, Tensor) else tree_leaves(x) for name, x in batches.items()}
        if self.own:
            leaves["fake"] = [*leaves["fake"], *self.own]
        return leaves

    def attached(self, points: Any, weight: float, target: float) -> tuple[Tensor, Tensor]:
        """Run the penalty alone; its backward leaves what autograd's does.

        Args:
            points: ``[N, *D]``, or a nest of such.
            weight: The penalty's factor.
            target: The norm that costs nothing.

        Returns:
            The penalty, 0-dim, and the norms ``[N]``.
        """
        output = self.differentiate({"points": points}, weight=weight, target=target)
        assert output.penalty is not None
        reached = self.planned.reached or [gradient is not None for gradient in output.gradients]
        tensors = [tensor for tensor, touched in zip(self.tensors, reached) if touched]
        gradients = [g for g, touched in zip(output.gradients, reached) if touched]
        return attach(output.penalty, tensors, gradients), output.norms[0]

    def outside_penalty(
        self, batches: Mapping[str, Any], penalty: Callable[[Any], tuple[Tensor, Tensor]]
    ) -> OutsidePenalty:
        """Return what computes a penalty between the pieces of the plan.

        Args:
            batches: As ``run`` takes them.
            penalty: Takes a gradient nested as the samples; returns the penalty and the norms.
        """
        sets = iter(self.objective.points())
        nests = {"points": batches["real"], **batches} if self.objective.at == "mixed" else batches
        return OutsidePenalty(lambda found: penalty(self.nested(nests[next(sets)], found)))

    def nested(self, points: Any, found: Sequence[Tensor]) -> Any:
        """Nest the gradients of those tensors that the critic reads as the samples are; None for integers."""
        if isinstance(points, Tensor):
            return found[0]
        leaves, nest = tree_flatten(points)
        captured = self.planned.plan.captured
        known = {captured.sampled[node]: gradient for node, gradient in zip(captured.samples, found)}
        zeros = [torch.zeros_like(leaf) if leaf.is_floating_point() else None for leaf in leaves]
        return tree_unflatten([known.get(i, zero) for i, zero in enumerate(zeros)], nest)

    def opened(self, points: Any) -> Opened:
        """Run passes 1 and 2 at some points; the backward of what is computed from what they give runs 3 and 4.

        Args:
            points: ``[N, *D]``, or a nest of such.

        Returns:
            The scores, None where the plan does not give them, and the gradient; once differentiable.
        """
        if not torch.is_grad_enabled():
            scores, gradients, _ = self.begin(points)
            return self._opened(points, scores, gradients)
        tensors = self.tensors or [tree_leaves(points)[0].new_zeros((), requires_grad=True)]
        given = _Opened.apply(self, points, *tensors)  # type: ignore[no-untyped-call]
        count = len(given) - len(self.planned.plan.captured.samples)
        return self._opened(points, given[:count], given[count:])

    def begin(self, points: Any) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Run passes 1 and 2; returns scores and gradients, and what ``go_on`` needs."""
        (scores, (gradients,)), left = self.planned.plan.begin(self.inputs, {"points": tree_leaves(points)})
        return list(scores), list(gradients), list(left)

    def go_on(self, left: Sequence[Any], cotangents: Sequence[Tensor | None], points: Any) -> list[Tensor | None]:
        """Run passes 3 and 4.

        Args:
            left: What ``begin`` left.
            cotangents: Those of the scores, then those of the gradients; None for nothing.
            points: The points, for a check.
        """
        output = StepOutput(*self.planned.plan.go_on(1, left, cotangents))
        if self.check is not None:
            self.check(self.objective, {"points": points}, self.planned, self.tensors, output, cotangents)
        return self._as_autograd(list(output.gradients), tuple(cotangent is not None for cotangent in cotangents))

    def _opened(self, points: Any, scores: Sequence[Tensor], gradients: Sequence[Tensor]) -> Opened:
        captured = self.planned.plan.captured
        picked = None
        if self.objective.outside_scores:
            numbers = [captured.outputs.index(node) for node in captured.picked(0)]
            picked = nested(captured.picks[0], dict(zip(numbers, scores)))
        return Opened(picked, self.nested(points, gradients))

    def _as_autograd(self, gradients: list[Tensor | None], used: tuple[bool, ...]) -> list[Tensor | None]:
        """Have gradients be None exactly where autograd leaves none."""
        for i, reached in enumerate(self.reached(used) or ()):
            if reached is (gradients[i] is None):
                gradients[i] = torch.zeros_like(self.tensors[i], requires_grad=False) if reached else None
        return gradients


class _Opened(torch.autograd.Function):
    """Scores and input gradients of a plan that was begun; to differentiate what is made of them ends it."""

    @staticmethod
    def forward(ctx: Any, step: Prepared, points: Any, *tensors: Tensor) -> Any:
        scores, gradients, left = step.begin(points)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[value for value in left if isinstance(value, Tensor)])
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in left]
        ctx.step, ctx.points = step, points
        return (*scores, *gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        if not ctx.step.tensors:
            return None, None, None
        saved = iter(ctx.saved_tensors)
        left = [next(saved) if number is None else number for number in ctx.numbers]
        return None, None, *once(ctx.step.go_on(left, cotangents, ctx.points))


def summed(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Return the gradient of every tensor by its id; one that came to be tied is there more than once."""
    found: dict[int, Tensor] = {}
    for tensor, gradient in zip(tensors, gradients):
        if gradient is not None:
            found[id(tensor)] = found[id(tensor)] + gradient if id(tensor) in found else gradient
    return found


class FourPassEngine:
    """Runs one objective on one critic.

    Args:
        critic: The critic, a module or a function; whatever its forward reads is read at every call.
        objective: What to compute.
        schedule: As in ``Plan``.
        compile: Compile the flat graph with ``torch.compile``; where that fails, warn and run it as it is.
        cheaper_only: Refuse a step that autograd takes at less cost.
    """

    def __init__(
        self,
        critic: Callable[..., Any],
        objective: Objective,
        *,
        schedule: Schedule = "auto",
        compile: bool = False,
        cheaper_only: bool = False,
    ) -> None:
        # Weakly: engines are kept for as long as the critic lives, and must not keep it alive.
        try:
            self._critic: Callable[[], Any] = weakref.ref(critic)
        except TypeError:
            self._critic = lambda: critic
        self.objective, self.schedule, self.compile = objective, schedule, compile
        self._options = (objective.form(), schedule, compile, same_draws())
        self._cheaper_only = cheaper_only
        self._traced_in_a_row: dict[int, int] = {}  # of its last calls, by thread
        self.plans: dict[int, Plan] = {}
        """All that this engine has run, in order, by their ``id``."""

    @property
    def critic(self) -> Callable[..., Any]:
        """The critic."""
        critic: Callable[..., Any] | None = self._critic()
        assert critic is not None, "an engine is called by those who hold its critic"
        return critic

    def planned(self, called: Called) -> Planned:
        """Return the plan for batches like the call's, made now if there is none; the critic stays as it is."""
        return self._planned(called, self._look(called, lambda traced, inputs: False))

    def prepare(self, called: Called) -> Prepared:
        """Look at the forward, and change what it changes besides tensors in place, as often as a step would.

        Args:
            called: The critic, or a function of the same code, made anew, and a batch like those of the step.

        Raises:
            CaptureError: The critic cannot run in four passes; nothing has been changed then, unless it is one that
                holds what the forward now is for each batch.
            TypeError: The critic does not return a tensor, or the loss does not.
            ValueError: The critic does not return a row of scores per sample, or its scores do not depend on its input.
        """
        found: Planned | None = None
        own = called.own_leaves()

        def ready(traced: Traced, inputs: tuple[Any, ...]) -> bool:
            nonlocal found
            found = traced.plans.made.get(self._key(called, traced, inputs))
            if found is not None and self._cheaper_only and found.dearer:
                found = None
            return found is not None

        look = self._look(called, ready)
        thread = threading.get_ident()
        traced_in_a_row = self._traced_in_a_row.get(thread, 0) + 1 if look.fresh else 0
        if not look.fresh:
            self._traced_in_a_row.pop(thread, None)
        else:
            self._traced_in_a_row[thread] = traced_in_a_row
        # Another thread, or a hook, may change the critic in between.
        for _ in range(3):
            if found is not None:
                break
            if traced_in_a_row > MOST_IN_A_ROW:
                raise CaptureError(
                    f"its forward had to be traced at {traced_in_a_row} calls in a row: what it reads, a number "
                    "or an object, is always new"
                )
            self._planned(called, look)
            look = self._look(called, ready)
        if found is None:
            raise CaptureError("what its forward reads changes while it is planned")
        traced, inputs = look.traced, look.inputs
        if traced.repeats and own:
            raise ChangedError(
                "its forward changes what it counts, and the fake batch has arguments of its own", [look]
            )
        if traced.repeats and (batches := self.objective.batches()) > 1:
            looks = [look]
            try:
                while len(looks) < batches:
                    looks.append(self._look(called, lambda traced, inputs: True))
            except CaptureError as error:
                raise ChangedError(str(error), looks) from error
            if not all(_same(looks[0], other) for other in looks[1:]):
                raise ChangedError(
                    "its forward computes something else at every call, with what it changes itself", looks
                )
        traced.plans.runs += 1
        self.plans.setdefault(id(found.plan), found.plan)
        return Prepared(self.objective, found, inputs, own)

    def _key(self, called: Called, traced: Traced, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # Convolutions are laid out for what they compute in, which is no matter of Dynamo's guards.
        x = called.first
        settings = torch.backends.cudnn.conv.fp32_precision if x.is_cuda else None  # type: ignore[attr-defined]
        return (self._options, settings, *traced.key(inputs))

    def _look(
        self, called: Called, ready: Callable[[Traced, tuple[Any, ...]], bool], differentiable: bool = True
    ) -> Look:
        return _known(called).look(called, ready, differentiable)

    def _planned(self, called: Called, look: Look) -> Planned:
        traced, inputs = look.traced, look.inputs
        plans, key = traced.plans, self._key(called, traced, inputs)
        with _PLANNING:
            if key in plans.made:
                return self._worthwhile(plans.made[key])
            mine = sum(key[0] == self._options for key in plans.made)
            if mine >= FREE_PLANS + plans.runs // EARNED_BY:
                raise TooManyPlansError(
                    f"the critic was planned {mine} times for {plans.runs} steps: a batch size, or a number that its "
                    "forward reads, keeps changing"
                )
            with hushed():
                captured = traced.captured(inputs)
            operators = captured.calls()
            if self._cheaper_only and any(node.target in _RECURRENT for node in operators):
                raise CaptureError("recurrent layers cost less by autograd: each of the four passes runs them anew")
            if (seconds := len(operators) * SECONDS_AN_OPERATOR) > 3 and not plans.made:
                warnings.warn(
                    f"wgan_fast plans the critic's {len(operators)} operators, which takes about {seconds:.0f} s once",
                    RuntimeWarning,
                    stacklevel=users_level(),
                )
            with hushed():
                planned = plans.made[key] = self._make(called, look, captured)
            return self._worthwhile(planned)

    def _make(self, called: Called, look: Look, captured: Captured) -> Planned:
        if self.objective.has_loss and look.traced.asks:
            self._ask(called, look)
        form = self.objective.form()
        plan = Plan(captured, form, look.inputs, schedule=self.schedule, in_place=not self.compile)
        if self.compile:
            plan.compiled = [_Compiled(piece) for piece in plan.pieces]
        return Planned(plan, *by_autograd(plan, look.inputs))

    def _worthwhile(self, planned: Planned) -> Planned:
        if self._cheaper_only and planned.dearer:
            raise CaptureError(planned.dearer)
        return planned

    def _ask(self, called: Called, look: Look) -> None:
        """Refuse a forward that treats samples whose gradient is not asked for, as real and fake are, differently."""
        other = self._look(called, lambda traced, inputs: False, differentiable=False)
        if str(other.traced.captured(other.inputs).graph) != str(look.traced.captured(look.inputs).graph):
            raise CaptureError("its forward asks whether its input requires a gradient, and goes another way then")


class _Compiled:
    """A flat graph under ``torch.compile``, or as it is where the compiler fails."""

    def __init__(self, graph: Callable[..., Any]) -> None:
        self._graph, self._run = graph, torch.compile(graph, fullgraph=True, dynamic=False)
        self._proven = False

    def __call__(self, *args: Any) -> Any:
        if self._proven:
            return self._run(*args)
        try:
            result = self._run(*args)
        except Exception as error:
            warnings.warn(
                f"the compiler failed, the step runs uncompiled: {first_line(error)}", RuntimeWarning, stacklevel=4
            )
            self._run = self._graph
            result = self._graph(*args)
        self._proven = True
        return result
