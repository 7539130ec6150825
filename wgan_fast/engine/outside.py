"""Losses and penalties that are any function at all: computed by autograd, between the pieces of a plan."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..checks import UNREACHED, check_loss
from ..four_pass.capture import Output
from ..four_pass.plan import Plan
from .autograd import leaves_of


def nested(picks: Any, outputs: Mapping[int, Any] | Sequence[Any]) -> Any:
    """Return what was made of a critic's output, from the outputs of its graph by number."""
    return tree_map(lambda leaf: outputs[leaf.number] if isinstance(leaf, Output) else leaf, picks)


def _nothing() -> None:
    pass


class Outside:
    """Computes a value from what one piece gives, and for the next one its derivative.

    Attributes:
        value: What came of it, a constant.
        given: Its derivative, for what the next piece takes; None where there is none.
    """

    value: Tensor
    given: Sequence[Tensor | None]
    _leave: Callable[[], None]

    def __call__(self, asked: Any) -> Sequence[Tensor | None]:
        """Answer a piece."""
        with torch.enable_grad():
            value, wanted = self.evaluate(asked)
        self.value, self._leave = value.detach(), _nothing
        self.given = [None] * len(wanted)
        if value.requires_grad:
            others = list(set(leaves_of([value.grad_fn])).difference(wanted))
            self.given = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=bool(others))
            if others:
                self._leave = partial(torch.autograd.backward, value, inputs=others)
        return self.given

    def leave(self) -> None:
        """Leave its gradient in what else the value is computed from; until then nothing has been left anywhere."""
        self._leave()

    def evaluate(self, asked: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and what the next piece wants the derivative by."""
        raise NotImplementedError


class OutsideLoss(Outside):
    """A loss of what a critic returns for real and for fake.

    Args:
        plan: The plan.
        loss: ``(real_output, fake_output) -> 0-dim``, nested as the critic's last pick.
    """

    def __init__(self, plan: Plan, loss: Callable[[Any, Any], Any]) -> None:
        self.plan, self.loss = plan, loss

    def evaluate(self, asked: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the outputs."""
        captured = self.plan.captured
        nodes, outputs, wanted = captured.picked(-1), captured.outputs, list[Tensor]()
        sides = []
        for values in asked:
            found = {}
            for node, value in zip(nodes, values):
                leaf = value.detach()
                if node in self.plan.differentiable:
                    wanted.append(leaf.requires_grad_())
                # A copy, which the loss may write to.
                found[outputs.index(node)] = leaf.clone()
            sides.append(nested(captured.picks[-1], found))
        value = check_loss(self.loss(*sides))
        if not value.requires_grad:
            raise ValueError(UNREACHED)
        return value, wanted


class OutsidePenalty(Outside):
    """A penalty of the input gradient at one or more sets of points.

    Args:
        penalty: Takes the gradients of one set, and returns the penalty and the norms ``[N]``.

    Attributes:
        norms: ‖∇D‖₂ for every set of points.
    """

    def __init__(self, penalty: Callable[[list[Tensor]], tuple[Tensor, Tensor]]) -> None:
        self.penalty = penalty
        self.norms: list[Tensor] = []

    def evaluate(self, asked: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the value, and the gradients."""
        _, sets = asked
        values, wanted = [], list[Tensor]()
        for gradients in sets:
            leaves = [gradient.detach().requires_grad_() for gradient in gradients]
            value, norms = self.penalty([leaf.clone() for leaf in leaves])  # which it may write to
            values.append(value)
            self.norms.append(norms)
            wanted += leaves
        return sum(values[1:], values[0]), wanted
