"""``wgan_fast::gradient_penalty``: the penalty in four passes for callers under ``torch.compile``.

Opaque to the compiler, which could not plan a critic while it traces one.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..four_pass import CaptureError
from ..ops.registry import operator
from ..precision import accumulation_dtype
from .choice import choice_by_number
from .guarded import Called
from .planned import summed


def _fake(
    number: int,
    weight: float,
    target: float,
    points: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    *_: object,
) -> list[Tensor]:
    penalty = points.new_empty((), dtype=accumulation_dtype(points.dtype))
    return [penalty, *[torch.empty_like(tensor) for tensor in (*parameters, *buffers)]]


@operator(
    "gradient_penalty(int number, float weight, float target, Tensor points, Tensor[] parameters, Tensor[] buffers, "
    "Tensor[] critic_args, Tensor[] critic_kwargs, str[] names, ScalarType? autocast) -> Tensor[]",
    fake=_fake,
)
def run_by_number(
    number: int,
    weight: float,
    target: float,
    points: Tensor,
    parameters: list[Tensor],
    buffers: list[Tensor],
    critic_args: list[Tensor],
    critic_kwargs: list[Tensor],
    names: list[str],
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Return the penalty, every parameter's gradient and the updated buffers.

    The critic is planned when the operator first runs, outside the compiler: a new batch size makes a new plan, and
    no new compilation.
    """
    choice = choice_by_number(number)
    four_pass = choice.four_pass
    if four_pass is None:
        raise CaptureError("the critic cannot run in four passes, and torch.compile cannot differentiate twice")
    critic, device = four_pass.critic, points.device.type
    assert isinstance(critic, nn.Module)
    # Inside an operator the dispatcher has switched autograd off for this thread, and looking at the critic needs it.
    with _outside_operators(), torch.enable_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
        prepared = four_pass.prepare(
            Called(four_pass.critic, points, tuple(critic_args), dict(zip(names, critic_kwargs)), choice.score)
        )
        buffers = [buffer.clone() for buffer in buffers]
        given = dict(zip(map(id, [*critic.parameters(), *critic.buffers()]), [*parameters, *buffers]))
        trainable = {id(tensor) for tensor in prepared.tensors}
        if not trainable <= set(map(id, critic.parameters())):
            raise CaptureError(
                "under torch.compile the penalty's gradients go to the critic's own parameters alone, and its forward "
                "reads other tensors that require gradients"
            )
        inputs = tuple(given.get(id(value), value) for value in prepared.inputs)
        output = replace(prepared, inputs=inputs).run({"points": points}, weight, target)
    gradients = summed(prepared.tensors, output.gradients)
    assert output.penalty is not None
    found = [gradients.get(id(parameter)) for parameter in critic.parameters()]
    filled = [torch.zeros_like(p) if gradient is None else gradient for p, gradient in zip(parameters, found)]
    return [output.penalty, *filled, *buffers]


_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
"""Which of the dispatcher's keys are on and off outside of any operator."""


def _outside_operators() -> AbstractContextManager[Any]:
    """Undo, inside an operator, that the dispatcher passes by autograd and tracing in this thread."""
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)
