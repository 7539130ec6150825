"""A flat graph that can be run: plain ATen and ``wgan_fast::`` operators, with no autograd inside."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from .counting import flops_of
from .objective import StepOutput
from .stand_ins import is_view

Layout = dict[str, tuple[torch.Size, tuple[int, ...]]]


class FlatStep:
    """Runs a flat graph on what a critic reads and on batches.

    Args:
        graph: The graph; its inputs are the live ones, then the batches, then the penalty's weight and target.
        live: Which inputs of the captured critic it takes.
        layout: The batches that it takes, by name, with the shape and strides that it was planned for.
        device: Type of the device that it was planned for.

    Attributes:
        compiled: Runs in the graph's place; None until something is put there.
        runs: How often it has been run.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        live: Sequence[int],
        layout: Layout,
        device: str,
    ) -> None:
        self.graph, self.live, self.layout, self.device = graph, live, layout, device
        self.compiled: Callable[..., Any] | None = None
        self.runs = 0

    def run(
        self, inputs: Sequence[Any], batches: Mapping[str, Tensor], weight: float | None, target: float
    ) -> StepOutput:
        """Run the graph.

        Args:
            inputs: The inputs of the captured graph.
            batches: What the objective takes of ``real``, ``fake`` and ``points`` by name.
            weight: The penalty's factor; None without a penalty.
            target: The norm that costs nothing.
        """
        self.runs += 1
        tensors: list[Any] = [inputs[i] for i in self.live]
        tensors += [_laid_out(batches[name].detach(), like) for name, like in self.layout.items()]
        if weight is not None:
            tensors += [weight, target]
        on = torch.is_autocast_enabled(self.device)
        with torch.no_grad(), torch.autocast(self.device, enabled=False) if on else nullcontext():
            return StepOutput(*(self.compiled or self._run_eagerly)(*tensors))

    def _run_eagerly(self, *tensors: Any) -> Any:
        # Nothing here is differentiated: passing every operator on through autograd, and the graph through what a
        # module's call looks for, costs a tenth of a small step.
        with torch._C._AutoDispatchBelowAutograd():
            return self.graph.forward(*tensors)

    def flops(self) -> int:
        """Matmul and convolution FLOPs of the step."""
        counted = 0
        for node in self.graph.graph.nodes:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta.get("val"))
            counted += flops_of(node.target, args, kwargs, node.meta.get("val"))
        return counted

    def launches(self) -> int:
        """Operators of the graph that are not views."""
        return sum(node.op == "call_function" and not is_view(node.target) for node in self.graph.graph.nodes)

    @property
    def code(self) -> str:
        """The flat graph as Python."""
        return self.graph.code


def _laid_out(tensor: Tensor, like: tuple[torch.Size, tuple[int, ...]]) -> Tensor:
    """Give a batch the strides that it was planned with."""
    shape, stride = like
    if tensor.stride() == stride or tensor.shape != shape:
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
