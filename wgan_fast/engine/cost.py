"""What a step costs, counted: in four passes, and by autograd, which is asked without data what it would do."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..four_pass.blocks import joined
from ..four_pass.counting import Cost, Counter, tensor_bytes
from ..four_pass.plan import Plan
from ..four_pass.stand_ins import is_view
from .autograd import opened_at, penalty_at


def of_plan(plan: Plan) -> Cost:
    """Count what a plan's flat graph does."""
    moved = 0
    for node in plan.nodes():
        if node.op == "call_function" and not is_view(node.target):
            moved += tensor_bytes([touched.meta.get("val") for touched in (node, *node.all_input_nodes)])
    return Cost(plan.flops(), plan.launches(), moved)


def by_autograd(
    plan: Plan, inputs: Sequence[Any], used: tuple[bool, ...] = ()
) -> tuple[Cost | None, list[bool] | None]:
    """Have autograd take a plan's step, without data.

    Args:
        plan: The plan.
        inputs: Inputs of its captured graph, or what looks like them.
        used: Where others compute between the plan's pieces, which of the derivatives that it is given they have; empty
            for all.

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
            left = _differentiate(plan, values, iter(used or itertools.repeat(True)))
        return counter.cost, left
    except Exception:
        return None, None


def _differentiate(plan: Plan, values: list[Any], used: Iterator[bool]) -> list[bool]:
    """Take the step on tensors without data; returns which of the trainable ones have a gradient."""
    captured, objective = plan.captured, plan.objective
    positions = [captured.inputs.index(node) for node in captured.samples]
    points = [values[i].detach() for i in positions]
    trainable = [values[i] for i in plan.trainable]
    own = {node: values[captured.inputs.index(node)].detach().requires_grad_() for node in plan.own_arguments}

    def forward(samples: list[Tensor], fake: bool = False) -> dict[fx.Node, Tensor]:
        given = list(values)
        for position, sample in zip(positions, samples):
            given[position] = sample
        for node, value in own.items() if fake else ():
            given[captured.inputs.index(node)] = value
        # Not through the module's call, of which hooks might take note.
        return dict(zip(captured.outputs, captured.functions.forward(*given)))

    def scores(name: str, samples: list[Tensor]) -> list[Tensor]:
        outputs = forward(samples, fake=name == "fake")
        return [outputs[node] for node in captured.picked(0)]

    terms: list[Tensor] = []
    if objective.has_loss:
        sides = [forward(points, fake=name == "fake") for name in objective.sides]
        if objective.loss is None:
            # Another function has taken part in what it is: of that, the derivative by each output counts.
            terms += [side[node].sum() for side in sides for node in plan.differentiable if next(used)]
        else:
            parts = [[side[node] for node in captured.picked(-1)] for side in sides]
            wide = [joined([s if s.dtype == torch.float64 else s.float() for s in some]) for some in parts]
            terms.append(objective.loss(*wide))
    for name in objective.points():
        if not objective.outside_penalty:
            terms.append(penalty_at(partial(scores, name), points, **objective.norm_options)[0])
            continue
        opened = opened_at(partial(scores, name), points, rows=False)
        terms += [part.sum() for part in opened.scores if next(used)] if objective.outside_scores else []
        squares = [leaf.square().sum() for leaf in opened.gradient if next(used)]
        terms += [opened.finish(sum(squares[1:], squares[0]))] if squares else []
    total = sum(terms[1:], terms[0]) if terms else points[0].new_zeros(())
    wanted = [*trainable, *own.values()]
    if not wanted or not total.requires_grad:
        return [False for _ in wanted]
    return [gradient is not None for gradient in torch.autograd.grad(total, wanted, allow_unused=True)]
