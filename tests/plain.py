"""A penalty as people write it, of samples, scores and penalties of any form, by PyTorch's own double backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

N = 6


def opened(critic: Callable[..., Any], points: Any, pick: Callable[[Any], Any], *args: Any, **kwargs: Any) -> tuple:
    """Scores at some points, what the critic returned there, and the gradient of their sum, nested as the points."""
    x = tree_map(lambda leaf: leaf.detach().clone().requires_grad_(leaf.is_floating_point()), points)
    leaves = [leaf for leaf in tree_leaves(x) if leaf.requires_grad]
    output = critic(x, *args, **kwargs)
    scores = pick(output)
    parts = scores if isinstance(scores, list) else [scores]
    found = torch.autograd.grad(
        parts, leaves, [torch.ones_like(s) for s in parts], create_graph=True, allow_unused=True
    )
    given = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found)])
    return scores, output, tree_map(lambda leaf: next(given) if leaf.requires_grad else None, x)


def norms(gradient: Any) -> Tensor:
    parts = [leaf.flatten(1) for leaf in tree_leaves(gradient) if leaf is not None]
    return torch.cat(parts, 1).norm(dim=1)


def penalty(
    critic: Callable[..., Any],
    points: Any,
    pick: Callable[[Any], Any] = lambda output: output,
    own: Callable[[Any], Tensor] | None = None,
    *args: Any,
    weight: float = 10.0,
    target: float = 1.0,
    **kwargs: Any,
) -> Tensor:
    _, _, gradient = opened(critic, points, pick, *args, **kwargs)
    return weight * (own(gradient) if own else (norms(gradient) - target) ** 2).mean()


def mixed(real: Any, fake: Any, alpha: Tensor) -> Any:
    def mix(x: Tensor, y: Tensor) -> Tensor:
        a = alpha.view(-1, *[1] * (x.dim() - 1))
        return a * x + (1 - a) * y if x.is_floating_point() else x

    return tree_map(mix, real, fake)


def gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """What ``value.backward()`` leaves in some tensors; None where it leaves none."""
    for tensor in tensors:
        tensor.grad = None
    value.backward()
    found = [None if tensor.grad is None else tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


def assert_same(ours: Tensor, theirs: Tensor, module: nn.Module | Sequence[Tensor]) -> None:
    """Compare values, and every gradient: None with None."""
    tensors = list(module.parameters()) if isinstance(module, nn.Module) else list(module)
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-10, atol=1e-12)
    assert_same_gradients(gradients(ours, tensors), gradients(theirs, tensors))


def assert_same_gradients(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    assert [g is None for g in ours] == [g is None for g in theirs], "None in other places"
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
