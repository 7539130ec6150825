"""A call of one operator, the generic rule, and the registry of rules.

An operator is a function f of its tensor operands; everything else it was given is part of f. With operands x,
tangents t, and cotangents δ of the output, a rule knows

- ``vjp``: ∂⟨δ, f(x)⟩/∂x,
- ``jvp``: the derivative of f at x along t,
- ``second``: ∂⟨δ, JVP f(x)[t]⟩/∂x, which is how f curves and, for an operand that is a weight, its share of the
  penalty's gradient.

None stands for an operand that is not asked for, a tangent that is zero, or a derivative that is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from .rows import Where
else:
    Where = Any

Derivatives = list[Tensor | None]
Output = Any
"""A tensor, or a list of tensors for operators that return several."""


@dataclass(frozen=True)
class Slot:
    """Stands for operand ``index`` among an operator's arguments."""

    index: int


@dataclass
class Call:
    """One operator applied to its operands.

    Attributes:
        op: The ATen overload.
        args: Positional arguments with a ``Slot`` for every tensor.
        kwargs: Keyword arguments, likewise.
        operands: The tensors, in order of their slots.
        sampled: For each operand, whether it has rows that belong to samples (or is shared by all of them).
        output: What the operator returned.
        saved: What the rule kept from the forward, with the batch in the same dimension as the output.
        captured: Stands for the output as the critic itself lays it out.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Tensor]
    sampled: list[bool]
    output: Output = None
    saved: dict[str, Tensor] = field(default_factory=dict)
    captured: Any = None

    def run(self, operands: Sequence[Tensor] | None = None) -> Output:
        """Apply the operator to ``operands``, by default its own."""
        filled = self.operands if operands is None else operands
        args, kwargs = tree_map_only(Slot, lambda slot: filled[slot.index], (self.args, self.kwargs))
        return self.op(*args, **kwargs)

    def argument(self, name: str) -> Any:
        """Return the argument that the operator's schema calls ``name``; a ``Slot`` where it is a tensor."""
        for position, argument in enumerate(self.op._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value)
        raise KeyError(name)

    def slot(self, name: str) -> int | None:
        """Return the index of the operand called ``name``; None where it was not given."""
        value = self.argument(name)
        return value.index if isinstance(value, Slot) else None

    def tensor(self, name: str) -> Tensor | None:
        """Return the operand called ``name``; None where it was not given."""
        slot = self.slot(name)
        return None if slot is None else self.operands[slot]

    def with_operand(self, index: int, value: Tensor) -> "Call":
        """Return the same call with one operand replaced."""
        operands = list(self.operands)
        operands[index] = value
        return replace(self, operands=operands)

    def blank(self, x: Tensor) -> Tensor:
        """Memory like ``x``, laid out as in the critic itself: random numbers are drawn in the order of memory."""
        strides = [s if isinstance(s, int) else s.node.hint for s in self.captured.stride()]
        order = sorted(range(x.dim()), key=lambda d: -strides[d])
        return x.new_empty([x.shape[d] for d in order]).permute([order.index(d) for d in range(x.dim())])


class Rule:
    """The generic rule: everything follows from autograd on this operator alone.

    Attributes:
        data: Name of the argument that the operator is linear in while its other operands are fixed, and linear in
            those, up to a bias, while the data is fixed: the gradient of such a weight for loss and penalty
            together is one VJP at the data with the tangent written over the penalised rows.
    """

    data: str | None = None

    def forward(self, call: Call) -> Output:
        """Run the operator; may leave tensors in ``call.saved``."""
        if _draws(call) and isinstance(call.captured, Tensor):
            alike = [x.dim() == call.captured.dim() for x in call.operands]
            call.operands = [call.blank(x).copy_(x) if same else x for x, same in zip(call.operands, alike)]
        return call.run()

    def leaves(self, call: Call) -> list[Tensor]:
        """Return detached operands to differentiate the operator by, which runs once more for it."""
        if _draws(call):
            raise NotImplementedError("an operator that draws random numbers needs a rule of its own")
        return [x.detach().requires_grad_() if x.is_floating_point() else x for x in call.operands]

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Return ∂⟨δ, f(x)⟩/∂x for the operands ``wanted``."""
        operands = self.leaves(call)
        with torch.enable_grad():
            outputs, cotangents = _paired(call.run(operands), cotangent)
            return grad(outputs, [operands[i] for i in wanted], cotangents)

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Return the derivative of f along ``tangents``."""
        # The VJP is linear in its cotangent, so differentiating ⟨VJP(δ), t⟩ for δ gives the JVP. Unlike forward-mode
        # AD this needs nothing but the operator's double backward, and what it computes on the way is dead code.
        moving = [i for i, t in enumerate(tangents) if t is not None]
        operands = self.leaves(call)
        with torch.enable_grad():
            output = call.run(operands)
            outputs = [output] if isinstance(output, Tensor) else list(output)
            # Operators such as max over a dimension return integers too.
            moved = [out for out in outputs if out.is_floating_point()]
            dummies = [torch.zeros_like(out).requires_grad_() for out in moved]
            gradients = grad(moved, [operands[i] for i in moving], dummies, create_graph=True)
            pairs = [(g, tangents[i]) for g, i in zip(gradients, moving) if g is not None and g.requires_grad]
            derivatives = iter(grad([g for g, _ in pairs], dummies, [t for _, t in pairs]))
        result = [next(derivatives) if out.is_floating_point() else None for out in outputs]
        return result[0] if isinstance(output, Tensor) else result

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return ∂⟨δ, JVP f(x)[t]⟩/∂x for the operands ``wanted``."""
        moving = [i for i, t in enumerate(tangents) if t is not None]
        operands = self.leaves(call)
        with torch.enable_grad():
            outputs, cotangents = _paired(call.run(operands), cotangent)
            gradients = grad(outputs, [operands[i] for i in moving], cotangents, create_graph=True)
            pairs = [(g, tangents[i]) for g, i in zip(gradients, moving) if g is not None and g.requires_grad]
            if not pairs:
                return [None] * len(wanted)
            return grad([g for g, _ in pairs], [operands[i] for i in wanted], [t for _, t in pairs])


class PiecewiseLinear(Rule):
    """An operator of one tensor whose Jacobian is constant almost everywhere."""

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Zero: autograd would carry a tensor of zeros instead."""
        return [None] * len(wanted)


_GENERIC = Rule()


@dataclass(frozen=True)
class X:
    """Stands in an example for samples ``[N, *]``; ``W`` for what all samples share."""

    shape: tuple[int, ...]
    layout: torch.memory_format = torch.contiguous_format


class W(X):
    """As ``X``, for what all samples share, such as a weight."""


Example = tuple[Any, ...]
"""An operator's arguments, with ``X`` and ``W`` for its tensors; a dictionary at the end holds keyword arguments."""


@dataclass(frozen=True)
class Operator:
    """What is known of one overload that has a rule of its own.

    Attributes:
        rule: How it runs, and its derivatives.
        examples: Calls by which tests compare the rule with the generic one, and the rows with what a batch does.
    """

    rule: Rule
    examples: tuple[Example, ...]


OPERATORS: dict[Any, Operator] = {}
"""By overload."""
ROWS: dict[str, Where] = {}
"""Where the rows of samples lie in what an operator gives, by its name without the overload."""
IN_PLACE: dict[Any, Any] = {}
"""The overload that overwrites the first operand of another."""
OUT: dict[Any, tuple[Any, str]] = {}
"""The overload that writes to memory that it is given, and what it calls that."""
FLOPS: dict[Any, Callable[..., int]] = {}
"""What ``torch.utils.flop_counter`` leaves out, by packet."""


def add(name: str, rule: Rule, rows: Where | None, *examples: Example) -> None:
    """Give an overload, such as ``"relu"`` or ``"mean.dim"``, its entry.

    Args:
        name: Its name under ``torch.ops.aten``.
        rule: How it runs, and its derivatives.
        rows: Where its rows lie, for every overload of the name; None where the tag of elementwise operators tells, and
            where samples are not kept apart.
        examples: Calls for the tests, at least one unless the rule refuses.
    """
    OPERATORS[overload(name)] = Operator(rule, examples)
    if rows is not None:
        ROWS[name.partition(".")[0]] = rows


def register(name: str, rows: Where | None, *examples: Example) -> Callable[[type[Rule]], type[Rule]]:
    """Give an overload its entry, with the decorated class as its rule."""

    def decorate(rule: type[Rule]) -> type[Rule]:
        add(name, rule(), rows, *examples)
        return rule

    return decorate


def follows(rows: Where, *names: str) -> None:
    """Say where the rows of operators lie that the generic rule differentiates, in every overload."""
    for name in names:
        getattr(torch.ops.aten, name)  # or there is none of that name
        assert name not in ROWS, name
        ROWS[name] = rows


def overwrites(name: str, in_place: str) -> None:
    """Name the form of an operator that overwrites its first operand."""
    IN_PLACE[overload(name)] = overload(in_place)


def fills(name: str, argument: str) -> None:
    """Name the argument of an operator's form that writes to memory that it is given; the form is called so, too."""
    OUT[overload(name)] = overload(f"{name.partition('.')[0]}.{argument}"), argument


def overload(name: str) -> Any:
    """Look up an ATen overload by name; "relu" is its default."""
    packet, _, chosen = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), chosen or "default")


def rule_for(op: Any) -> Rule:
    """Return the rule of an ATen overload, or of what brings its own."""
    return OPERATORS[op].rule if op in OPERATORS else getattr(op, "rule", _GENERIC)


def on_gpu(x: Tensor) -> bool:
    """Whether an operator is to be written as kernels of a GPU like it."""
    return x.device.type == "cuda"


def _draws(call: Call) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(call.op, "tags", ()):
        return False
    names = {argument.name for argument in call.op._schema.arguments}
    return all(call.argument(name) for name in names & {"p", "dropout", "train", "training"})


def _paired(output: Output, cotangent: Output) -> tuple[list[Tensor], list[Tensor]]:
    if isinstance(output, Tensor):
        return [output], [cotangent]
    kept = [(out, cot) for out, cot in zip(output, cotangent) if cot is not None]
    return [out for out, _ in kept], [cot for _, cot in kept]


def grad(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Any], create_graph: bool = False) -> Derivatives:
    """Return what autograd does, with None for what does not depend on an input and for what has no gradient."""
    kept = [(out, cot) for out, cot in zip(outputs, cotangents) if out.requires_grad]
    differentiable = [x for x in inputs if x.requires_grad]
    if not kept or not differentiable:
        return [None] * len(inputs)
    gradients = iter(
        torch.autograd.grad(
            [out for out, _ in kept],
            differentiable,
            [cot for _, cot in kept],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    )
    return [next(gradients) if x.requires_grad else None for x in inputs]
