"""The four passes for callers under ``torch.compile``: two operators that the compiler does not look into.

``wgan_fast::input_gradient`` runs passes 1 and 2 of a critic's plan, and its derivative, which is
``wgan_fast::parameter_gradients``, passes 3 and 4. The critic is planned when the first runs, outside of the compiler,
which could not plan one while it traces another: a new batch size makes a new plan, and no new compilation.
"""

import ast
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..checks import Score, picked
from ..four_pass import CaptureError
from ..ops.registry import library, operator
from .autograd import Opened
from .choice import choice_by_number
from .guarded import Called
from .planned import FourPassEngine, Prepared, summed

KEPT = 8
"""Steps of one critic and objective whose passes 3 and 4 may still come: what is never differentiated is let go."""


def opened_by_number(
    number: int, critic: nn.Module, points: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, scored: bool
) -> Opened:
    """Return scores and input gradient by the operators; a compiler traces this.

    Args:
        number: Of the critic's choice.
        critic: The critic.
        points: ``[N, *D]``, or a nest of such.
        args: Further positional arguments of the critic.
        kwargs: Its keyword arguments.
        scored: Whether scores are wanted.
    """
    tensors: list[Tensor] = []
    _written(points, tensors)
    floating = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]
    tensors = []
    nest = _written((points, args, dict(kwargs)), tensors)
    device = tensors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    parameters, buffers = list(critic.parameters()), list(critic.buffers())
    made = torch.ops.wgan_fast.input_gradient(
        number,
        [tensor.detach() for tensor in tensors],
        floating,
        parameters,
        buffers,
        nest,
        autocast,
        scored,
        torch.is_grad_enabled(),
        _call(),
    )
    end = 1 + len(floating)
    gradients, updated, scores = made[1:end], made[end : end + len(buffers)], made[end + len(buffers) :]
    with torch.no_grad():
        for buffer, new in zip(buffers, updated):
            buffer.copy_(new)
    found = iter(gradients)
    gradient = _refilled(points, found)
    return Opened((scores[0] if len(scores) == 1 else list(scores)) if scored else None, gradient)


def _call() -> int:
    """Return a number that no other call in a compiled graph has: equal ones are not to be one, in what they draw."""
    return next(_calls)


_calls = itertools.count()
_call._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _written(value: Any, tensors: list[Tensor]) -> str:
    """Write down a nest of tensors and constants as Python does, tensors by number; a compiler traces this."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return f"({len(tensors) - 1},)"
    if isinstance(value, dict):
        return "{" + "".join([f"{key!r}: {_written(part, tensors)}, " for key, part in value.items()]) + "}"
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return f"['{kind}', " + "".join([f"{_written(part, tensors)}, " for part in value]) + "]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise TypeError(
        f"a critic's arguments must be tensors and constants under torch.compile, got {type(value).__name__}"
    )


def _read(nest: Any, tensors: Sequence[Any]) -> Any:
    """Undo ``_written``."""
    if isinstance(nest, tuple):
        return tensors[nest[0]]
    if isinstance(nest, dict):
        return {key: _read(part, tensors) for key, part in nest.items()}
    if isinstance(nest, list):
        parts = [_read(part, tensors) for part in nest[1:]]
        return parts if nest[0] == "list" else tuple(parts)
    return nest


def _refilled(value: Any, leaves: Iterator[Any]) -> Any:
    """Put gradients into a nest of samples, None in the place of integers; a compiler traces this."""
    if isinstance(value, Tensor):
        return next(leaves) if value.is_floating_point() else None
    if isinstance(value, dict):
        return {key: _refilled(part, leaves) for key, part in value.items()}
    parts = [_refilled(part, leaves) for part in value]
    return parts if isinstance(value, list) else tuple(parts)


def _fake(
    number: int,
    tensors: list[Tensor],
    floating: list[int],
    parameters: list[Tensor],
    buffers: list[Tensor],
    nest: str,
    autocast: torch.dtype | None,
    scored: bool,
    kept: bool,
    call: int,
) -> list[Tensor]:
    plain = [torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in floating]
    token = torch.empty((), dtype=torch.int64, device="cpu")
    scores = _fake_scores(number, tensors, parameters, buffers, nest, autocast) if scored else []
    return [token, *plain, *map(torch.empty_like, buffers), *scores]


def _fake_scores(
    number: int,
    tensors: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    nest: str,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Run the critic without data, to see what its scores will be like."""
    critic, score, _ = _known(number)
    points, args, kwargs = _read(ast.literal_eval(nest), tensors)
    state = dict(zip([name for name, _ in critic.named_parameters()], parameters))
    state |= zip([name for name, _ in critic.named_buffers()], [buffer.clone() for buffer in buffers])
    with torch.no_grad(), torch.autocast(tensors[0].device.type, autocast, enabled=autocast is not None):
        made = picked(torch.func.functional_call(critic, state, (points, *args), kwargs), score)
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in _parts(made)]


def _parts(scores: Any) -> list[Tensor]:
    return scores if isinstance(scores, list) else [scores]


def _known(number: int) -> tuple[nn.Module, Score, FourPassEngine]:
    choice = choice_by_number(number)
    if choice.four_pass is None:
        raise CaptureError("the critic cannot run in four passes, and torch.compile cannot differentiate twice")
    critic = choice.four_pass.critic
    assert isinstance(critic, nn.Module)
    return critic, choice.score, choice.four_pass


@operator(
    "input_gradient(int number, Tensor[] tensors, int[] floating, Tensor[] parameters, Tensor[] buffers, str nest, "
    "ScalarType? autocast, bool scored, bool kept, int call) -> Tensor[]",
    fake=_fake,
    tags=(torch.Tag.nondeterministic_seeded,),
)
def input_gradient(
    number: int,
    tensors: list[Tensor],
    floating: list[int],
    parameters: list[Tensor],
    buffers: list[Tensor],
    nest: str,
    autocast: torch.dtype | None,
    scored: bool,
    kept: bool,
    call: int,
) -> list[Tensor]:
    """Return a token by which the derivative goes on, the input gradients, updated buffers, and scores if wanted."""
    critic, score, four_pass = _known(number)
    # The compiler lends its memory, and uses it again when this returns.
    points, args, kwargs = _read(ast.literal_eval(nest), [x.clone() for x in tensors] if kept else tensors)
    # Inside an operator the dispatcher has switched autograd off for this thread, and looking at the critic needs it.
    with (
        _outside_operators(),
        torch.enable_grad(),
        torch.autocast(tensors[0].device.type, autocast, enabled=autocast is not None),
    ):
        step = four_pass.prepare(Called(critic, points, args, kwargs, (score,)))
        buffers = [buffer.clone() for buffer in buffers]
        owned = dict(zip(map(id, [*critic.parameters(), *critic.buffers()]), [*parameters, *buffers]))
        known = {id(parameter): i for i, parameter in enumerate(critic.parameters())}
        if not {id(tensor) for tensor in step.tensors} <= known.keys():
            raise CaptureError(
                "under torch.compile the penalty's gradients go to the critic's own parameters alone, and its forward "
                "reads other tensors that require gradients"
            )
        order = [known[id(tensor)] for tensor in step.tensors]
        step = replace(step, inputs=tuple(owned.get(id(value), value) for value in step.inputs))
        scores, gradients, left = step.begin(points)
        opened = step.nested(points, gradients)
    token = -1
    if kept:
        token = next(_tokens)
        waiting = choice_by_number(number).waiting
        waiting[token] = _Left(step, left, points, order)
        while len(waiting) > KEPT:
            waiting.popitem(last=False)
    found = [gradient for gradient in tree_leaves(opened) if gradient is not None]
    return [
        torch.tensor(token),
        *[gradient.contiguous() for gradient in found],
        *buffers,
        *[part.contiguous() for part in scores],
    ]


class _Left(NamedTuple):
    """A step whose passes 3 and 4 are to come, and which of the critic's parameters its gradients belong to."""

    step: Prepared
    left: list[Any]
    points: Any
    order: list[int]


_tokens = itertools.count()


def _fake_parameter_gradients(
    number: int, token: Tensor, parameters: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in parameters]


@operator(
    "parameter_gradients(int number, Tensor token, Tensor[] parameters, Tensor?[] cotangents) -> Tensor[]",
    fake=_fake_parameter_gradients,
)
def parameter_gradients(
    number: int, token: Tensor, parameters: list[Tensor], cotangents: list[Tensor | None]
) -> list[Tensor]:
    """Return every parameter's gradient, from the cotangents of the input gradients and of the scores."""
    kept = choice_by_number(number).waiting.pop(int(token), None)
    if kept is None:
        raise RuntimeError(
            f"under torch.compile a penalty can be differentiated once, and before {KEPT} further ones of its critic "
            "are computed"
        )
    step, captured = kept.step, kept.step.planned.plan.captured
    with _outside_operators(), torch.no_grad():
        count = sum(leaf.is_floating_point() for leaf in tree_leaves(kept.points))
        gradients = iter(cotangents[:count])
        by_leaf = [next(gradients) if leaf.is_floating_point() else None for leaf in tree_leaves(kept.points)]
        along = [by_leaf[captured.sampled[node]] for node in captured.samples]
        found = summed(
            [parameters[i] for i in kept.order], step.go_on(kept.left, [*cotangents[count:], *along], kept.points)
        )
    return [torch.zeros_like(p) if found.get(id(p)) is None else found[id(p)] for p in parameters]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.number, tensors, floating, parameters, buffers, *_ = inputs
    ctx.save_for_backward(output[0], *parameters)
    ctx.counts = len(tensors), len(floating), len(buffers)


def _backward(ctx: Any, cotangents: list[Tensor | None]) -> Any:
    token, *parameters = ctx.saved_tensors
    tensors, floating, buffers = ctx.counts
    along = [*cotangents[1 : 1 + floating], *cotangents[1 + floating + buffers :]]
    gradients = torch.ops.wgan_fast.parameter_gradients(ctx.number, token, parameters, along)
    return None, [None] * tensors, None, list(gradients), [None] * buffers, None, None, None, None, None


torch.library.register_autograd("wgan_fast::input_gradient", _backward, setup_context=_setup_context, lib=library)

_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
"""Which of the dispatcher's keys are on and off outside of any operator."""


def _outside_operators() -> AbstractContextManager[Any]:
    """Undo, inside an operator, that the dispatcher passes by autograd and tracing in this thread."""
    return torch._C._ForceDispatchKeyGuard(*_OUTSIDE)
