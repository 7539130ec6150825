"""Calls that repeat: replayed as CUDA graphs, which read their inputs from static buffers."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, users_level

WARM_UP = 3
"""Calls of every kind that run uncaptured first: libraries allocate workspaces and optimizers their state in them."""


class StaticInputs:
    """Buffers that always lie at the same address.

    Args:
        example: A batch like those to come.
        count: How many of them a call takes.
    """

    def __init__(self, example: Tensor, count: int) -> None:
        self.buffer = torch.empty((count, *example.shape), dtype=example.dtype, device=example.device)

    def fill(self, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy the batches in, and return the views that hold them.

        Raises:
            ValueError: They are not as many, or not of the shape, dtype and device of the first ones.
        """
        like = self.buffer
        if len(batches) != len(like) or any(
            (batch.shape, batch.dtype, batch.device) != (like.shape[1:], like.dtype, like.device) for batch in batches
        ):
            got = ", ".join(f"{list(batch.shape)} {batch.dtype} on {batch.device}" for batch in batches)
            raise ValueError(f"batches must be {len(like)} of {list(like.shape[1:])} {like.dtype}, got {got}")
        views = like.unbind()
        torch._foreach_copy_(list(views), list(batches))
        return views


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: Any


class GraphedCalls:
    """Runs a function of batches; on CUDA, after a warm-up, by replaying graphs of it.

    On a CPU the function runs on the static buffers every time, so that this path is the same up to the replay.

    Args:
        function: Takes groups of batches; returns tensors, which every replay overwrites.
        device: Where it computes.
        gives_way: Whether to go on without graphs, and say so, where one cannot be captured.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, *, gives_way: bool = False) -> None:
        self._function, self._device, self._gives_way = function, device, gives_way
        self._inputs: list[StaticInputs] = []
        self._stream = _stream(device)
        self.clear()

    def clear(self) -> None:
        """Forget every graph: tensors that they read or wrote have been replaced."""
        # One pool for all: only one graph runs at a time, and none needs what another left but its result.
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None
        self._graphs: dict[Hashable, _Captured] = {}
        self._calls: dict[Hashable, int] = {}

    def __call__(self, *groups: Sequence[Tensor], key: Hashable = None) -> Any:
        """Run the function.

        Args:
            *groups: Batches of one shape and dtype each; as many groups, of as many, at every call.
            key: What else decides the operations that run; each key has a graph of its own.

        Raises:
            InputError: The function does something that a graph cannot hold.
        """
        if not self._inputs:
            self._inputs = [StaticInputs(batches[0], len(batches)) for batches in groups]
        static = [inputs.fill(batches) for inputs, batches in zip(self._inputs, groups)]
        if self._stream is None:
            return self._function(*static)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= WARM_UP:
            return self._warm_up(static, self._stream)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._capture(static)
            except InputError as error:
                if not self._gives_way:
                    raise
                warnings.warn(f"{error}, as happens now", RuntimeWarning, stacklevel=users_level())
                self._stream, self._graphs = None, {}
                return self._function(*static)
        captured = self._graphs[key]
        captured.graph.replay()
        return captured.result

    def _warm_up(self, static: list[tuple[Tensor, ...]], stream: torch.cuda.Stream) -> Any:
        """Run it for real on another stream, as a capture must be: nothing may be tied to the default stream."""
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self._function(*static)
        current.wait_stream(stream)
        return result

    def _capture(self, static: list[tuple[Tensor, ...]]) -> _Captured:
        """Record the operations without running them; random numbers are drawn anew at every replay."""
        graph = torch.cuda.CUDAGraph()
        drawn = torch.cuda.get_rng_state(self._device)
        try:
            # Threads that pin memory for the data may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = self._function(*static)
        except RuntimeError as error:
            _release_generator(self._device, drawn)
            raise InputError(
                f"cuda_graph cannot capture this training: {str(error).partition(chr(10))[0]}; train without it"
            ) from error
        return _Captured(graph, result)


def _release_generator(device: torch.device, state: Tensor) -> None:
    """Give the default generator back its state: a capture that fails leaves it refusing to draw outside of one."""
    fresh = torch.Generator(device)
    fresh.set_state(state)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.default_generators[index].graphsafe_set_state(fresh)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
