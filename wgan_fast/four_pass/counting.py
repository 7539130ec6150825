"""Counts operators as they run: matmul and convolution FLOPs, launches, and bytes read and written."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .operators import FLOPS
from .stand_ins import evaluate, is_view


class Cost(NamedTuple):
    """Of one step.

    Attributes:
        flops: Of its matrix products and convolutions.
        launches: Its operators that are not views.
        bytes: What these read and write.
    """

    flops: int
    launches: int
    bytes: int

    def seconds(self) -> float:
        """Estimate the time on two cores of a server; only a comparison of two such means anything."""
        return self.flops / 40e9 + self.bytes / 8e9 + self.launches * 4e-6


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs under it, in this thread alone, which ``FlopCounterMode`` does not.

    Args:
        fake: The mode of the stand-ins that it runs on.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = fake
        self.cost = Cost(0, 0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count ``func``."""
        out = evaluate(self._fake, func, args, kwargs or {})
        if func.namespace != "prim" and not is_view(func) and func is not torch.ops.aten.detach.default:
            flops, launches, moved = self.cost
            touched = tensor_bytes((args, kwargs, out))
            self.cost = Cost(flops + flops_of(func, args, kwargs or {}, out), launches + 1, moved + touched)
        return out


def flops_of(target: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Count the FLOPs of one operator applied to tensors."""
    count = _flops().get(getattr(target, "overloadpacket", None))
    return 0 if count is None else count(*args, **kwargs, out_val=out)


def tensor_bytes(values: Any) -> int:
    """Sum the bytes of all tensors in a nest."""
    return sum(value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor))


@cache
def _flops() -> dict[Any, Any]:
    """Return what PyTorch counts, and what it leaves out; imported when first needed, since it imports Triton."""
    from torch.utils.flop_counter import flop_registry

    return {**flop_registry, **FLOPS}
