"""What a step costs, counted: in four passes, and by autograd, which is asked without data what it would do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..four_pass.counting import Cost, Counter, tensor_bytes
from ..four_pass.plan import Plan
from ..four_pass.stand_ins import is_view
from .autograd import penalty_at


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
    try:
        with fake, torch.enable_grad(), plan.autocast(), Counter(fake) as counter:
            left = _differentiate(plan, values)
        return counter.cost, left
    except Exception:
        return None, None


def _differentiate(plan: Plan, values: list[Any]) -> list[bool]:
    """Take the step on tensors without data; returns which of the trainable ones have a gradient."""
    captured, objective = plan.captured, plan.objective
    position = captured.inputs.index(captured.x)
    x = values[position].detach()

    def scores(samples: Tensor) -> Tensor:
        # Not through the module's call, of which hooks might take note.
        given = (*values[:position], samples, *values[position + 1 :])
        return captured.functions.forward(*given)  # type: ignore[no-any-return]

    terms: list[Tensor] = []
    if objective.loss:
        wide = [s if s.dtype == torch.float64 else s.float() for s in (scores(x), scores(x))]
        terms.append(objective.loss(*wide))
    terms += [penalty_at(scores, x, **objective.norm_options)[0] for _ in objective.points()]
    total = sum(terms[1:], terms[0])
    trainable = [values[i] for i in plan.trainable]
    if not trainable or not total.requires_grad:
        return [False for _ in trainable]
    return [gradient is not None for gradient in torch.autograd.grad(total, trainable, allow_unused=True)]
