"""The autograd engine: the penalty by double backward, without the dead pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from .. import reference
from ..checks import check_penalty, check_scores, unconnected
from ..precision import accumulation_dtype
from .piecewise_linear import PiecewiseLinear


@dataclass
class Piecewise:
    """Whether a critic was seen to have no activations that a dead pass goes through: then none is looked for."""

    absent: bool = False


def _unchanged(value: Tensor) -> Tensor:
    return value


class Opened(NamedTuple):
    """Scores and the input gradient at some points.

    Attributes:
        scores: What is made of the critic's output there: a tensor, or a list of them.
        gradient: ∇ of their sum, nested as the points; None in the place of integers.
        finish: Has the backward of what is computed from them leave zeros where that of the usual recipe leaves them.
    """

    scores: Any
    gradient: Any
    finish: Callable[[Tensor], Tensor] = _unchanged


def opened_at(
    critic: Callable[[Any], Any],
    points: Any,
    *,
    group_size: int = 1,
    rows: bool = True,
    piecewise: Piecewise | None = None,
) -> Opened:
    """Differentiate a critic in its input, by autograd, differentiably.

    Args:
        critic: Maps samples to scores, or to a list of several, whose sum is meant.
        points: ``[N, *D]``, or a nest of such.
        group_size: Samples that share a score.
        rows: Whether there must be a row of scores per sample or group.
        piecewise: What is known of the critic's activations; None for nothing.
    """
    differentiate, compiled = torch.is_grad_enabled(), torch.compiler.is_compiling()
    with torch.enable_grad():
        every, nest = tree_flatten(points)
        every = [_leaf(sample) for sample in every]
        leaves = [leaf for leaf in every if leaf.requires_grad]
        activations = PiecewiseLinear()
        plain = compiled or (piecewise is not None and piecewise.absent)
        with nullcontext() if plain else activations:
            scores = critic(tree_unflatten(every, nest))
        if piecewise is not None and not plain:
            piecewise.absent = not activations.used
        parts = scores if isinstance(scores, list) and scores else [scores]
        for part in parts:
            check_scores(part, every[0], group_size, rows=rows)
        found = iter(_input_gradient(parts, leaves, differentiate))
    if not differentiate:
        scores = tree_map_only(Tensor, Tensor.detach, scores)
    # The critic may have added to the nest that it was given.
    gradient = tree_unflatten([next(found) if leaf.requires_grad else None for leaf in every], nest)
    before = activations.before if differentiate else []
    return Opened(scores, gradient, partial(_with_zeros, before=before, samples=leaves) if before else _unchanged)


def penalty_at(
    critic: Callable[[Any], Any],
    points: Any,
    *,
    weight: float,
    target: float,
    one_sided: bool,
    group_size: int,
    piecewise: Piecewise | None = None,
) -> tuple[Tensor, Tensor]:
    """Evaluate the penalty at given points by double backward.

    Args:
        critic: Maps samples to scores with a row per sample or group, or to a list of several such.
        points: ``[N, *D]``, or a nest of such.
        weight: w.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        group_size: Samples that share one norm.
        piecewise: What is known of the critic's activations; None for nothing.

    Returns:
        The penalty (weight included), 0-dim, and the gradients' norms ``[N]``. The penalty's backward leaves None and
        zeros where that of the usual recipe leaves them.
    """
    opened = opened_at(critic, points, group_size=group_size, piecewise=piecewise)
    penalty, norms = penalised(
        opened.gradient, weight=weight, target=target, one_sided=one_sided, group_size=group_size
    )
    return opened.finish(penalty), norms


def penalised(
    gradient: Any,
    function: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    *,
    weight: float,
    target: float,
    one_sided: bool,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Evaluate a penalty of an input gradient.

    Args:
        gradient: ``[N, *D]``, or a nest of such, with None in the place of integers.
        function: Of which the penalty is the mean: ``[N]``, 0-dim or of any other shape; None for that of the norm.
        args: Its further arguments.
        weight: w.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        group_size: Samples that share one norm.

    Returns:
        The penalty, 0-dim, weight included, and the norms ``[N]``, which are constants.
    """
    leaves = [leaf for leaf in tree_leaves(gradient) if leaf is not None]
    if function is not None:
        value = check_penalty(function(gradient, *args))
        with torch.no_grad():
            norms = reference.gradient_norm(_joined(leaves), group_size)
        return weight * value.to(accumulation_dtype(value.dtype)).mean(), norms
    settings: dict[str, Any] = {
        "weight": weight, "target": target, "one_sided": one_sided, "group_size": group_size
    }  # fmt: skip
    # A lower precision would round the operator's derivative before the caller scales the loss.
    if torch.compiler.is_compiling() or len(leaves) > 1 or leaves[0].dtype not in (torch.float32, torch.float64):
        return _plain_penalty(_joined(leaves), **settings)
    return _Penalty.apply(leaves[0], settings)  # type: ignore[no-any-return,no-untyped-call]


def _leaf(sample: Tensor) -> Tensor:
    sample = sample.detach()
    return sample.requires_grad_() if sample.is_floating_point() else sample


def _joined(gradient: list[Tensor]) -> Tensor:
    return gradient[0] if len(gradient) == 1 else torch.cat([leaf.flatten(1) for leaf in gradient], 1)


def _plain_penalty(
    gradient: Tensor, *, weight: float, target: float, one_sided: bool, group_size: int
) -> tuple[Tensor, Tensor]:
    norms = reference.gradient_norm(gradient, group_size)
    penalty = reference.penalty_from_norm(norms, weight=weight, target=target, one_sided=one_sided)
    return penalty, norms.detach()


class _Penalty(torch.autograd.Function):
    """The penalty at an input gradient and the norms, by one operator; differentiated twice, the plain form's.

    ``penalty_from_gradient`` has another function, which torch.func can transform; a call of that takes 25 us longer.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        penalty, _, norms, seed = torch.ops.wgan_fast.gradient_norm_penalty(gradient, **settings)
        ctx.mark_non_differentiable(norms)
        ctx.save_for_backward(gradient, seed)
        ctx.settings = settings
        return penalty, norms

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> Any:
        gradient, seed = ctx.saved_tensors
        if torch.is_grad_enabled():
            penalty, _ = _plain_penalty(gradient, **ctx.settings)
            (seed,) = torch.autograd.grad(penalty, gradient, create_graph=True)
        return cotangent * seed, None


def _input_gradient(scores: list[Tensor], leaves: list[Tensor], create_graph: bool) -> list[Tensor]:
    """Differentiate the sum of all scores; a sample's tensor that they do not depend on has zeros."""
    outputs = [part for part in scores if part.requires_grad]
    found: Sequence[Tensor | None] = [None]
    if outputs and leaves:
        ones = [torch.ones_like(part) for part in outputs]
        found = torch.autograd.grad(outputs, leaves, ones, create_graph=create_graph, allow_unused=True)
    if all(part is None for part in found):
        raise unconnected()
    return [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, found)]


def _with_zeros(penalty: Tensor, *, before: list[Any], samples: list[Tensor]) -> Tensor:
    """Have the penalty's backward leave zeros in what the dead pass alone would have reached.

    An optimizer tells a gradient of zeros from none: it decays its moments, and the weights.
    """
    if not penalty.requires_grad:
        return penalty
    leaves = set(leaves_of(before)).difference(samples)
    # An edge of the graph may carry nothing, as to the bias of a layer norm: small tensors get their zeros anyway.
    sought = {leaf for leaf in leaves if leaf.numel() > SMALL}
    for leaf in leaves_of([penalty.grad_fn]) if sought else ():
        sought.discard(leaf)
        if not sought:
            break
    missed = [leaf for leaf in leaves if leaf.numel() <= SMALL or leaf in sought]
    return _Zeros.apply(penalty, *missed) if missed else penalty  # type: ignore[no-untyped-call]


def leaves_of(functions: list[Any]) -> Iterator[Tensor]:
    """Yield the tensors in which a graph ends, some of them more than once."""
    pending, seen = list(functions), set(functions)
    while pending:
        function = pending.pop()
        if (leaf := getattr(function, "variable", None)) is not None:
            yield leaf
        for source, _ in function.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                pending.append(source)


SMALL = 2**12
"""Elements of a tensor whose zeros cost nothing to speak of."""


class _Zeros(torch.autograd.Function):
    """A value that has derivative 0 by some tensors."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tensors = tensors
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, *map(torch.zeros_like, ctx.tensors)


class _Attached(torch.autograd.Function):
    """A value whose gradients are known already; those that are None are zeros."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*[gradient for gradient in gradients if gradient is not None])
        ctx.unknown = [tensor if gradient is None else None for tensor, gradient in zip(tensors, gradients)]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        gradients = ctx.saved_tensors
        with torch.no_grad():
            scaled = _Attached.scaled(gradients, cotangent)
        found = [next(scaled) if t is None else t.new_zeros(t.shape) for t in ctx.unknown]
        return None, None, *once(found)

    @staticmethod
    def scaled(gradients: Sequence[Tensor], cotangent: Tensor) -> Iterator[Tensor]:
        """Multiply each by a number."""
        if all(gradient.dtype == cotangent.dtype for gradient in gradients):
            return iter(torch._foreach_mul(list(gradients), cotangent) if gradients else ())
        # A scaled loss's cotangent may be past what a lower precision holds.
        return iter([(gradient.to(cotangent.dtype) * cotangent).to(gradient.dtype) for gradient in gradients])


def once(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Have gradients that are constants raise where they are differentiated again, instead of counting for nothing."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not torch.is_grad_enabled() or not present:
        return gradients
    error = torch._C._functions.DelayedError(
        b'gradients in four passes cannot be differentiated again: engine="autograd" gives ones that can', len(present)
    )
    marked = error(*[gradient.detach().requires_grad_() for gradient in present])
    found = iter(marked if isinstance(marked, tuple) else (marked,))
    return [None if gradient is None else next(found) for gradient in gradients]


def attach(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return ``value`` such that its ``.backward()`` gives ``tensors`` their ``gradients``, scaled from above.

    Once differentiable: the gradients themselves are constants, and zeros where they are None. Without tensors the
    result can be differentiated all the same, as that of autograd, whose graph ends in the samples.
    """
    if not torch.is_grad_enabled():
        return value
    if not tensors:
        tensors, gradients = [value.new_zeros((), requires_grad=True)], [None]
    return _Attached.apply(value, list(gradients), *tensors)  # type: ignore[no-any-return,no-untyped-call]


def forget_gradients(module: nn.Module) -> None:
    """Set the gradients of a module's parameters to None, as its ``zero_grad`` does in three times the time."""
    if type(module).zero_grad is not nn.Module.zero_grad:
        module.zero_grad(set_to_none=True)
        return
    pending, seen = [module], {module}
    while pending:
        owner = pending.pop()
        for parameter in owner._parameters.values():
            if parameter is not None:
                parameter.grad = None
        for child in owner._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def leave(tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Give ``tensors`` their ``gradients`` as a backward pass would: add them, or carry them on, and run hooks."""
    carried = []
    for tensor, gradient in zip(tensors, gradients):
        if gradient is None:
            continue
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks or not tensor.is_leaf:
            carried.append((tensor, gradient))
        elif tensor.grad is None:
            tensor.grad = gradient
        else:
            tensor.grad.add_(gradient)
    if carried:
        torch.autograd.backward([t for t, _ in carried], [g for _, g in carried])
