"""What a step costs, counted: in four passes, and by autograd, which is asked on stand-ins what it would do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..autograd import penalty_at
from .counting import Cost, Counter, tensor_bytes
from .optimize import is_view
from .plan import Plan


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
    captured, objective, mode = plan.captured, plan.objective, FakeTensorMode()
    values = [
        mode.from_tensor(value.detach(), static_shapes=True).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for value in inputs
    ]
    position = captured.inputs.index(captured.x)
    trainable = [values[i] for i in plan.trainable]
    x = values[position].detach()

    def scores(samples: Tensor) -> Tensor:
        return captured.functions.forward(*values[:position], samples, *values[position + 1 :])  # type: ignore[no-any-return]

    terms: list[Tensor] = []
    try:
        with mode, torch.enable_grad(), Counter() as counter:
            with plan.autocast():
                if objective.loss:
                    wide = [s if s.dtype == torch.float64 else s.float() for s in (scores(x), scores(x))]
                    terms.append(objective.loss(*wide))
                if objective.points():
                    penalty, _ = penalty_at(
                        scores,
                        [x for _ in objective.points()],
                        weight=objective.weight or 0.0,
                        target=objective.target,
                        one_sided=objective.one_sided,
                        group_size=objective.group_size,
                    )
                    terms.append(penalty)
            total = sum(terms[1:], terms[0])
            if trainable and total.requires_grad:
                gradients = torch.autograd.grad(total, trainable, allow_unused=True)
            else:
                gradients = tuple(None for _ in trainable)
    except Exception:
        # Flash attention, say, is differentiated once.
        return None, None
    return counter.cost, [gradient is not None for gradient in gradients]
