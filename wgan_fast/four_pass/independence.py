"""Proves on the graph that no sample's values depend on another sample of its batch.

Each node that holds rows of samples gets the dimension along which they lie, operator by operator. Where that
holds for every node, batches can be joined, sliced and scaled by sample; the first node for which it cannot be
shown makes the critic batch-coupled, which is a matter of schedule and never of correctness.
"""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from .capture import Captured, where
from .operators import ROWS, SIZED, Applied, Call
from .operators.rows import Placed, aligned
from .stand_ins import is_elementwise

Dims = dict[fx.Node, int]


class CoupledError(Exception):
    """A node is not proven to keep samples apart; the message names it."""


def opaque(captured: Captured) -> str | None:
    """Say which node the proof cannot look into; None where it can into all."""
    functions = [where(node) for node in captured.calls() if isinstance(node.target, Applied)]
    return f"{functions[0]} is an autograd.Function, which is not proven to keep samples apart" if functions else None


def batch_dims(
    captured: Captured,
    calls: Mapping[fx.Node, Call],
    small: Mapping[fx.Node, Any],
    large: Mapping[fx.Node, Any],
) -> Dims:
    """Return the batch dimension of every node that has one.

    Args:
        captured: The critic.
        calls: Its operators, applied to the small batch.
        small: Values of every node for one batch size.
        large: Values of every node for a multiple of it.

    Raises:
        CoupledError: Samples are not proven apart.
    """
    dims: Dims = {}
    for node in captured.graph.nodes:
        value = small.get(node, None)
        if node in calls and _counts_samples(node, small, large):
            raise CoupledError(f"{where(node)} computes with the number of samples")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.shape != large[node].shape:
            dims[node] = 0
        if node.target is operator.getitem and node.args[0] in dims:
            dims[node] = dims[node.args[0]]
            continue
        if node not in calls or not _moved(small[node], large[node]):
            if isinstance(value, Tensor) and node in calls and any(source in dims for source in node.all_input_nodes):
                raise CoupledError(f"{where(node)} mixes samples")
            continue
        dim = _batch_dim(node, calls[node], dims, small, large)
        if dim is None:
            raise CoupledError(f"{where(node)} is not proven to keep samples apart")
        dims[node] = dim
    return dims


def _counts_samples(node: fx.Node, small: Mapping[fx.Node, Any], large: Mapping[fx.Node, Any]) -> bool:
    """Whether an operator is given a number that grows with the batch, other than as a size."""
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    numbers = [source for source in node.all_input_nodes if isinstance(small[source], int | float)]
    return name not in SIZED and any(small[source] != large[source] for source in numbers)


def _moved(small: Any, large: Any) -> bool:
    if isinstance(small, Tensor):
        return small.shape != large.shape  # type: ignore[no-any-return]
    return isinstance(small, list | tuple) and any(_moved(s, b) for s, b in zip(small, large))


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _batch_dim(
    node: fx.Node, call: Call, dims: Dims, small: Mapping[fx.Node, Any], large: Mapping[fx.Node, Any]
) -> int | None:
    sources = [source for source in node.all_input_nodes if isinstance(small[source], Tensor)]
    out, grown = _first(small[node]), _first(large[node])
    if out.dim() != grown.dim():
        return None
    changed = [d for d in range(out.dim()) if out.shape[d] != grown.shape[d]]
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    rows = aligned if is_elementwise(node.target) else ROWS.get(name)
    if len(changed) != 1 or rows is None:
        return None
    shapes = [small[source].shape for source in sources]
    dim = rows(call, Placed([dims.get(source) for source in sources], shapes, out, changed[0]))
    # The proof and the shapes must agree, and the rows must grow with the batch.
    return dim if dim == changed[0] else None
