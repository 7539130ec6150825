"""A flat graph that can be run: plain ATen and ``wgan_fast::`` operators, with no autograd inside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.samples import constant
from .counting import flops_of
from .objective import Batches, StepOutput
from .program import Program
from .stand_ins import is_view

Layout = list[tuple[str, int, torch.Size, tuple[int, ...]]]
Answer = Callable[[Any], Sequence[Tensor | None]]
"""What is computed between two pieces: from what the first gives to what the second takes, None for zeros."""


class FlatStep:
    """Runs a flat graph on what a critic reads and on batches.

    Args:
        pieces: The graph, in one piece or, where others compute in between, in several. The first one's inputs are the
            live ones, then the batches, then the penalty's weight and target; a later one's are what those before it
            leave for it, then what it is given. Each but the last returns what it is asked for and what it leaves.
        programs: The pieces as programs, or why they cannot be.
        live: Which inputs of the captured critic it takes.
        layout: The tensors of batches that it takes: batch, position, and the shape and strides that were planned for.
        device: Type of the device that it was planned for.

    Attributes:
        compiled: Run in the pieces' place; none until some are put there.
        runs: How often it has been run.
    """

    def __init__(
        self,
        pieces: list[fx.GraphModule],
        programs: list[Program | str],
        live: Sequence[int],
        layout: Layout,
        device: str,
    ) -> None:
        self.pieces, self.programs, self.live, self.layout, self.device = pieces, programs, live, layout, device
        self.compiled: list[Callable[..., Any]] = []
        self.runs = 0
        self._given = [
            [
                node.meta["val"]
                for node in piece.graph.nodes
                if node.op == "placeholder" and node.meta["segment"][0] == i
            ]
            for i, piece in enumerate(pieces)
        ]

    def run(
        self, inputs: Sequence[Any], batches: Batches, weight: float | None, target: float, *answers: Answer
    ) -> StepOutput:
        """Run the graph.

        Args:
            inputs: The inputs of the captured graph.
            batches: What the objective takes of ``real``, ``fake`` and ``points`` by name.
            weight: The penalty's factor; None without a penalty.
            target: The norm that costs nothing.
            answers: What is computed between the pieces.
        """
        result = self.begin(inputs, batches, weight, target)
        for number, answer in enumerate(answers, 1):
            asked, left = result
            result = self.go_on(number, left, answer(asked))
        return StepOutput(*result)

    def begin(self, inputs: Sequence[Any], batches: Batches, weight: float | None = None, target: float = 0.0) -> Any:
        """Run the first piece; arguments as those of ``run``."""
        self.runs += 1
        tensors: list[Any] = [inputs[i] for i in self.live]
        tensors += [_laid_out(constant(batches[name][i]), shape, stride) for name, i, shape, stride in self.layout]
        tensors += [weight, target][: len(self._given[0]) - len(tensors)]
        return self._run(0, tensors)

    def go_on(self, number: int, left: Sequence[Any], given: Sequence[Tensor | None]) -> Any:
        """Run a later piece.

        Args:
            number: Which.
            left: What those before it left for it.
            given: What it is given, None for zeros.
        """
        likes = self._given[number]
        filled = [
            torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            if value is None
            else _laid_out(value.detach().to(like.dtype), like.shape, like.stride())
            for value, like in zip(given, likes, strict=True)
        ]
        return self._run(number, [*left, *filled])

    def _run(self, number: int, tensors: list[Any]) -> Any:
        program = self.programs[number]
        # Who looks at operators as they run is shown those of the graph.
        if isinstance(program, Program) and not self.compiled and not torch._C._len_torch_dispatch_stack():
            with torch._C._AutoDispatchBelowAutograd():
                return program(tensors)
        on = torch.is_autocast_enabled(self.device)
        with torch.no_grad(), torch.autocast(self.device, enabled=False) if on else nullcontext():
            if self.compiled:
                return self.compiled[number](*tensors)
            # Nothing here is differentiated: passing every operator on through autograd, and the graph through what a
            # module's call looks for, costs a tenth of a small step.
            with torch._C._AutoDispatchBelowAutograd():
                return self.pieces[number].forward(*tensors)

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes of all the pieces."""
        for piece in self.pieces:
            yield from piece.graph.nodes

    def flops(self) -> int:
        """Matmul and convolution FLOPs of the step."""
        counted = 0
        for node in self.nodes():
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: source.meta.get("val"))
            counted += flops_of(node.target, args, kwargs, node.meta.get("val"))
        return counted

    def launches(self) -> int:
        """Operators of the graph that are not views."""
        return sum(node.op == "call_function" and not is_view(node.target) for node in self.nodes())

    @property
    def code(self) -> str:
        """The flat graph as Python, piece after piece."""
        return "\n".join(piece.code for piece in self.pieces)


def _laid_out(tensor: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Give a batch the strides that it was planned with."""
    if tensor.stride() == stride or tensor.shape != shape:
        return tensor
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
