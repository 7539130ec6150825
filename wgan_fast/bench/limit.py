"""What a step could cost at best: its counted units at the machine's own rate for these shapes.

The rate comes from PyTorch's ordinary operators: the matrix products and convolutions of one forward and one backward
over the batches of a step, and of one forward over the penalised points for the tangents, replayed alone on tensors of
the same shapes, in the memory format and by the library that is faster for each: what PyTorch takes for a matrix
product, or oneDNN. Nothing between them is timed, and the engine has no say in how they run: where it runs them slower,
that shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..critic_step import Precision
from .measure import count, fastest_of
from .step import Step
from .workloads import Workload

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._addmm_activation.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
}
_MATRICES = {_aten.mm.default, _aten.addmm.default, _aten._addmm_activation.default}


def _onednn() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass
class _Call:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    nbytes: int

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def forms(self) -> list["_Call"]:
        """Return the call on contiguous and on channels-last images, or by either library for matrices."""
        if self.function in _MATRICES and self.args[-1].device.type == "cpu" and _onednn():
            *_, left, right = self.args
            arguments: tuple[Any, ...] = (left, right.t(), None, "none", [], "")
            return [self, _Call(torch.ops.mkldnn._linear_pointwise, arguments, {}, self.nbytes)]
        if not any(isinstance(x, Tensor) and x.dim() == 4 for x in self.args):
            return [self]
        return [self._laid_out(memory_format) for memory_format in (torch.contiguous_format, torch.channels_last)]

    def _laid_out(self, memory_format: torch.memory_format) -> "_Call":
        def lay_out(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x

        return replace(self, args=tree_map_only(Tensor, lay_out, self.args))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the matrix products and convolutions that run, with tensors of their own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            copies = tree_map_only(Tensor, lambda x: x.detach().clone(), args)
            nbytes = sum(x.nbytes for x in tree_leaves((args, out)) if isinstance(x, Tensor))
            self.calls.append(_Call(func, copies, dict(kwargs or {}), nbytes))
        return out


def limit(workload: Workload, ours: Step, precision: Precision = "fp32") -> Step:
    """Make a step that runs for as long as the workload must, and computes nothing of use.

    It takes the longer of two times: the FLOPs that our step is counted to do, at the replayed rate, and a copy of as
    many bytes as the replayed operators read and write.

    Args:
        workload: What would be computed.
        ours: Our step, whose FLOPs are counted.
        precision: As in ``CriticStep``.
    """
    device, penalty, autocast = workload.real.device, workload.penalty, precision == "bf16"
    tangents = 0 if penalty is None else 2 if penalty.at == "both" else 1
    blocks = 3 if penalty is not None and penalty.at == "interpolates" else 2
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        joined = _fastest(_differentiated(workload, torch.cat([workload.real] * blocks)), device)
        apart = _fastest(_differentiated(workload, workload.real), device)
        tangent = _fastest(_forward(workload), device)
    replays = [partial(_run, calls + tangent * tangents) for calls in (joined, apart * blocks)]
    replay = min(replays, key=lambda run: fastest_of(run, device))
    ours()  # plans
    scale = count(ours).flops / count(replay).flops
    source = torch.empty(sum(call.nbytes for call in replay.args[0]) // 2, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    if fastest_of(copy, device) > scale * fastest_of(replay, device):
        return Step(lambda alpha: copy(), workload.critic)
    return Step(lambda alpha: replay(), workload.critic, scale=scale)


def _forward(workload: Workload) -> list[_Call]:
    products = _Products()
    with products, torch.no_grad():
        workload.critic(workload.real)
    return products.calls


def _differentiated(workload: Workload, batch: Tensor) -> list[_Call]:
    products = _Products()
    with products:
        workload.critic(batch).sum().backward()
    workload.critic.zero_grad(set_to_none=True)
    return products.calls


def _fastest(calls: list[_Call], device: torch.device) -> list[_Call]:
    """Each call in the form in which it is fastest."""
    return [min(call.forms(), key=lambda form: fastest_of(form, device)) for call in calls]


def _run(calls: list[_Call]) -> None:
    for call in calls:
        call()
