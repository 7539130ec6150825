"""A ``torch.autograd.Function`` as one operator of a captured graph: its backward is the user's, and followed as it is.

What runs is the function itself, so its derivatives are those of plain double backward: through what it was given and
what it returned where it saved these, through the cotangent, and through nothing that it made in between.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..record import Recorder
from .base import Call, Derivatives, Output, Rule, grad
from .linearity import Linearity


def layout(x: Tensor) -> torch.memory_format:
    """Return the memory format of a tensor: the code of a function may rely on it, and four passes choose their own."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return last if not x.is_contiguous() and x.is_contiguous(memory_format=last) else torch.contiguous_format


def _laid_out(values: Sequence[Tensor | None], layouts: Iterable[torch.memory_format]) -> list[Any]:
    return [None if x is None else x.contiguous(memory_format=lies) for x, lies in zip(values, layouts)]


class FunctionRule(Rule):
    """The generic rule, where that is right of a function whose backward may be any."""

    def forward(self, call: Call) -> Output:
        """Run the function's forward as autograd would, once its backward is shown to be one that four passes fit."""
        if torch.is_autocast_enabled(call.operands[0].device.type):
            raise NotImplementedError("an autograd.Function under autocast has no rule")
        call.operands = _laid_out(call.operands, call.kwargs["layouts"])
        call.op.prove(call)
        with torch.enable_grad():
            return [out.detach() for out in call.run(self.leaves(call))]

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Run the function's backward."""
        return super().vjp(call, _laid_out(cotangent, map(layout, call.captured)), wanted)

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Transpose the function's backward."""
        return super().jvp(call, _laid_out(tangents, call.kwargs["layouts"]))

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return ∂⟨δ, JVP f(x)[t]⟩/∂x for operands with which the backward changes; for others autograd has zeros."""
        bent = call.op.prove(call)
        chosen = [i for i in wanted if bent[i]]
        tangents = _laid_out(tangents, call.kwargs["layouts"])
        cotangent = _laid_out(cotangent, map(layout, call.captured))
        found = iter(super().second(call, tangents, cotangent, chosen) if chosen else ())
        return [next(found) if bent[i] else None for i in wanted]

    def leaves(self, call: Call, which: str = "required") -> list[Tensor]:
        """Return detached operands, of which those require a gradient that do in the critic."""
        return [operand.detach().requires_grad_(needs) for operand, needs in zip(call.operands, call.kwargs[which])]


@dataclass(frozen=True)
class Applied:
    """Applies a function to its arguments; what is called in a captured graph.

    Attributes:
        function: The function.
        proven: What ``prove`` has returned, by the form of the call.
        rule: Its derivatives.
    """

    function: Any
    proven: dict[str, list[bool]] = field(default_factory=dict, compare=False)
    rule: Rule = field(default=FunctionRule(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__name__", f"{self.function.__name__}.apply")
        # By which printed graphs tell functions of one name apart.
        object.__setattr__(self, "__module__", f"function_{id(self.function):x}")

    def __call__(self, *args: Any, **of_operands: tuple[Any, ...]) -> list[Tensor]:
        """Return the tensors among what the function returns.

        Args:
            args: What it is given.
            of_operands: For the rule, of each tensor among that: whether a gradient is ``required``, whether also
                where the samples require none, because it is ``learned``, and ``layouts``.
        """
        made = self.function.apply(*args)
        return [out for out in (made if isinstance(made, tuple) else (made,)) if isinstance(out, Tensor)]

    def __str__(self) -> str:
        return f"{self.function.__qualname__}.apply"

    def prove(self, call: Call) -> list[bool]:
        """Show on the operators that a call's backward runs that four passes fit it.

        The backward must be linear in its cotangent: four passes scale cotangents, and leave out those that are zero.
        Its transpose, by which tangents pass, must not depend on the cotangent, which they do not bring along.

        Returns:
            For each operand, whether the backward changes with it.

        Raises:
            NotImplementedError: That cannot be shown.
        """
        stand_in = "{0.dtype} {0.device} {1}".format
        key = str(tree_map_only(Tensor, lambda x: stand_in(x, tuple(x.shape)), (call.args, call.kwargs, call.operands)))
        if key not in self.proven:
            with _disable_current_modes():
                self.proven[key] = _prove(call)
        return self.proven[key]


def _prove(call: Call) -> list[bool]:
    recorder, rule = Recorder(), call.op.rule
    with recorder.fake:
        forms = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in call.operands]
        outputs = call.run(forms)
        like = _laid_out(outputs, map(layout, outputs))
    operands, tangents = ([recorder.input(f"{name}{i}", x) for i, x in enumerate(forms)] for name in ("x", "tangent"))
    cotangents = [recorder.input(f"cotangent{i}", x) for i, x in enumerate(like)]
    call = Call(call.op, call.args, call.kwargs, operands, call.sampled)

    def run(
        which: str, cotangents: list[Tensor], twice: bool = False
    ) -> tuple[list[Tensor], list[Tensor], Derivatives]:
        leaves = rule.leaves(call, which)
        outputs = call.run(leaves)
        return leaves, outputs, grad(outputs, leaves, cotangents, create_graph=twice)

    with recorder.fake, recorder, torch.enable_grad():
        seeds = [x.detach().requires_grad_() if x.is_floating_point() else x for x in cotangents]
        leaves, outputs, first = run("required", seeds, twice=True)
        _, _, once = run("required", cotangents)
        _, ahead, learned = run("learned", cotangents)
        pairs = [(g, t) for g, t in zip(first, tangents) if g is not None and g.requires_grad]
        backwards, directions = [g for g, _ in pairs], [t for _, t in pairs]
        # What once_differentiable raises is raised where a gradient may go everywhere.
        torch.autograd.backward(backwards, directions, retain_graph=True)
        transposed, second = (grad(backwards, some, directions) for some in (seeds, leaves))
    for node in recorder.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotImplementedError("it draws random numbers")
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise NotImplementedError(f"it writes to a tensor, by {node.target}")
    alike = _alike(recorder)

    def made(values: Sequence[Tensor | None]) -> list[fx.Node | None]:
        return [None if value is None else alike[recorder.node(value)] for value in values]

    again = [g if needs else None for g, needs in zip(first, call.kwargs["learned"])]
    if made([*first, *again, *outputs]) != made([*once, *learned, *ahead]):
        raise NotImplementedError("its gradients depend on which others are asked for, or how")
    linear = Linearity(recorder, [recorder.node(cotangent) for cotangent in cotangents])
    for node in filter(None, made(first)):
        if (bend := linear.bend(node)) is not None:
            raise NotImplementedError(f"its backward is not shown to be linear in the gradient, by {bend}")
    if not linear.moved.isdisjoint(filter(None, made(transposed))):
        raise NotImplementedError("the derivative of its backward depends on the gradient that this is given")
    return [node is not None and node not in linear.zero for node in made(second)]


def _alike(recorder: Recorder) -> dict[fx.Node, fx.Node]:
    """Return for every node the first that is computed alike."""
    first: dict[str, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    for node in recorder.graph.nodes:
        how = node.name
        if node.op == "get_attr":
            constant = recorder.constants[str(node.target)]
            how = f"{constant.dtype} {constant.tolist()}"
        elif node.op == "call_function":
            how = f"{node.target} {fx.node.map_arg((node.args, node.kwargs), found.__getitem__)}"
        found[node] = first.setdefault(how, node)
    return found
