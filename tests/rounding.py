"""How far rounding alone may move a result: Monte Carlo arithmetic (Parker 1997, UCLA CSD-970002).

Every number that an operator has rounded is multiplied by 1 ± ε, each with a sign of its own, and the result's
deviation divided by ε: what one unit of relative error in every rounding does to it, cancellation included. A bias
before a normalisation has the gradient 0, the sum of summands that are not; the deviation has the size of those.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

EPSILON = 2.0**-30
"""Far above float64's own 2⁻⁵³, which drowns in it, and far below 1, so that deviations are linear in it."""

PROBES = 4


_TAKEN_APART = get_decompositions(
    [
        getattr(torch.ops.aten, f"{name}{direction}")
        for name in ("native_batch_norm", "native_group_norm", "native_layer_norm")
        for direction in ("", "_backward")
    ]
    + [torch.ops.aten._softmax_backward_data, torch.ops.aten._log_softmax_backward_data]
)
"""Operators whose summands cancel within: their roundings are those of the operators that they stand for."""


class Perturbed(TorchDispatchMode):
    """Multiplies what operators return by 1 ± ε, forward and backward."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._signs = torch.Generator("cpu").manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TAKEN_APART:
            with self:
                return _TAKEN_APART[func](*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor | float)]
        exact = np.concatenate([np.empty(0), *[_numbers(x).ravel() for x in given]])
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns):
            return out
        written = any(result.alias_info is not None for result in func._schema.returns)

        def perturb(result: Tensor) -> Tensor:
            if not result.is_floating_point() or result._is_zerotensor() or result.is_meta:
                return result
            # An integer, such as the bound of a clamp, and a number that was given are as they should be: to move
            # them would break ties that every implementation has.
            rounded = (result != result.round()) & ~torch.from_numpy(np.isin(_numbers(result), exact)).to(result.device)
            drawn = torch.randint(0, 2, result.shape, generator=self._signs, device="cpu").to(result.device)
            signs = 2 * drawn.double() - 1
            factor = torch.where(rounded, 1 + EPSILON * signs, 1.0).to(result.dtype)
            return result.mul_(factor) if written else result * factor

        return tree_map_only(Tensor, perturb, out)


def _numbers(value: Tensor | float) -> np.ndarray[Any, Any]:
    if isinstance(value, float):
        return np.array([value])
    # Autograd's stand-ins for zeros and for shapes have no memory to look at.
    return np.zeros(1) if value._is_zerotensor() or value.is_meta else value.detach().cpu().numpy()


def deviations(function: Callable[[nn.Module], Sequence[Tensor]], critic: nn.Module) -> list[float]:
    """Root mean square of ‖deviation‖ / ε for each tensor that ``function`` returns of a copy of ``critic``."""
    exact = [x.detach() for x in function(copy.deepcopy(critic))]
    squares = torch.zeros(len(exact), dtype=torch.float64)
    for seed in range(PROBES):
        fresh = copy.deepcopy(critic)
        with Perturbed(seed):
            moved = function(fresh)
        squares += torch.stack([(m.detach() - x).double().square().sum() for m, x in zip(moved, exact)])
    return ((squares / PROBES).sqrt() / EPSILON).tolist()
