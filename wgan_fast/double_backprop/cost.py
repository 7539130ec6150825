"""What a step costs, counted: in four passes, and by autograd, which is asked without data what it would do."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..autograd import penalty_at
from .counting import Cost, Counter, tensor_bytes
from .plan import Plan
from .stand_ins import is_view


def of_plan(plan: Plan) -> Cost:
    """Count what a plan's flat graph does."""
    moved = 0
    for node in plan.graph.graph.nodes:
        if node.op == "call_function" and not is_view(node.target):
            moved += tensor_bytes([touched.meta.get("val") for touched in (node, *node.all_input_nodes)])
    return Cost(plan.flops(), plan.launches(), moved)


def by_autograd(plan: Plan, inputs: Sequence[Any]) -> tuple[Cost | None, list[bool] | None]:
    """Have autograd take a plan's step, without data.

    Args:
        plan: The plan.
        inputs: Inputs of its captured graph, or what looks like them.

    Returns:
        What that costs, and for each trainable input whether it leaves a gradient; None for both where autograd fails.
    """
    fake = FakeTensorMode()
    values = [
        fake.from_tensor(value.detach(), static_shapes=True).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]
    total, reached = Cost(0, 0, 0), [False for _ in plan.trainable]
    try:
        for term, times in _terms(plan, values):
            with fake, torch.enable_grad(), plan.autocast(), Counter(fake) as counter:
                left = _differentiate(term(), [values[i] for i in plan.trainable])
            total = Cost(*[sum_ + times * part for sum_, part in zip(total, counter.cost)])
            reached = [one or other for one, other in zip(reached, left)]
    except Exception:
        return None, None
    return total, reached


def _terms(plan: Plan, values: list[Any]) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """The terms of a plan's objective on tensors without data, and how often autograd takes a step like that of each.

    The two batches of the loss cost the same, so one is gone through, in the place of both.
    """
    captured, objective = plan.captured, plan.objective
    position = captured.inputs.index(captured.x)
    x = values[position].detach()

    def scores(samples: Tensor) -> Tensor:
        # Not through the module's call, of which hooks might take note.
        given = (*values[:position], samples, *values[position + 1 :])
        return captured.functions.forward(*given)  # type: ignore[no-any-return]

    def loss() -> Tensor:
        assert objective.loss is not None
        wide = scores(x)
        wide = wide if wide.dtype == torch.float64 else wide.float()
        return objective.loss(wide, wide)

    if objective.loss:
        yield loss, 2
    if objective.points():
        options = ("weight", "target", "one_sided", "group_size")
        settings = {name: getattr(objective, name) for name in options}
        yield lambda: penalty_at(scores, x, **settings)[0], len(objective.points())


def _differentiate(total: Tensor, trainable: list[Tensor]) -> list[bool]:
    """Return which of the trainable tensors have a gradient."""
    if not trainable or not total.requires_grad:
        return [False for _ in trainable]
    return [gradient is not None for gradient in torch.autograd.grad(total, trainable, allow_unused=True)]
