"""Reads ``autograd.Function``s out of Dynamo's graph, where each is a pair of graphs.

Four passes run the function itself: Dynamo traces its backward without gradients, so that what is applied in there has
lost a backward of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from .operators import Slot
from .operators.functions import layout

NOTE = "autograd_function"
"""Key in ``node.meta``: the ``Note`` of a node of Dynamo's."""


class UnknownError(Exception):
    """It is not certain what a function computes; the message says why in a clause."""


@dataclass
class Note:
    """What Dynamo was told to trace.

    Attributes:
        function: The function.
        arguments: What it was given, with a ``Slot`` for each of the node's arguments among that; None if unknown.
        within: Functions that its forward or its backward applied.
        changes: Whether its forward changes what is neither its own nor its context's.
    """

    function: Any
    arguments: tuple[Any, ...] | None = None
    within: list[Any] = field(default_factory=list)
    changes: bool = False


def is_function(node: fx.Node) -> bool:
    """Whether a node of Dynamo's stands for a function with a backward of its own."""
    return "autograd_function_apply" in str(node.target)


class Application(NamedTuple):
    """What a node of Dynamo's stands for.

    Attributes:
        function: The function.
        args: What it is given; nodes of the same graph, and numbers.
        of_operands: Of each tensor among that, whether a gradient of it is ``required``, whether also where the samples
            require none, because it is ``learned``, and its memory format in ``layouts``.
    """

    function: Any
    args: tuple[Any, ...]
    of_operands: dict[str, Any]


def applied(
    trace: fx.GraphModule, node: fx.Node, samples: Sequence[fx.Node], numbers: Mapping[fx.Node, float | None]
) -> Application:
    """Return the function that a node stands for, and its arguments.

    Args:
        trace: The graph.
        node: The node.
        samples: The placeholders of the samples.
        numbers: Placeholders that stand for Python's numbers, with their values, or None where these are not settled.

    Raises:
        UnknownError: They cannot be told from the note, or there is none.
    """
    note = node.meta.get(NOTE)
    if note is None or note.arguments is None:
        raise UnknownError("whose arguments are not known")
    if note.changes:
        raise UnknownError("whose forward changes what is not its own")
    if node.kwargs.get("dirty_idx"):
        raise UnknownError("that writes to what it is given")
    bodies = [getattr(trace, str(body.target)) for body in node.args[:2]]  # type: ignore[union-attr]
    if any(type(inner.target).__name__ == "numpy_to_tensor_wrapper" for body in bodies for inner in body.graph.nodes):
        raise UnknownError("that computes with NumPy")
    given = tree_map_only(Slot, lambda slot: numbers.get(place := node.args[slot.index], place), note.arguments)
    operands = [argument for argument in given if isinstance(argument, fx.Node) and _is_tensor(argument)]
    sources = [source for source in node.args[2:] if isinstance(source, fx.Node) and _is_tensor(source)]
    if any(numbers.get(source, 0.0) is None for source in sources):
        raise UnknownError("that reads a number which may change")
    if not all(source in numbers or _is_part(source, operands) for source in sources):
        raise UnknownError("that reads a tensor which it is not given")
    for leaf in tree_leaves(given):
        size = isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("example_value"), torch.SymInt | int)
        if leaf not in operands and not size and type(leaf) not in _PLAIN:
            raise UnknownError(f"that is given a {type(leaf).__name__} which is no tensor or number")
    values = [operand.meta["example_value"] for operand in operands]
    of_operands: dict[str, Any] = {
        "required": tuple(value.requires_grad for value in values),
        "learned": tuple(_is_learned(operand, samples) for operand in operands),
        "layouts": tuple(map(layout, values)),
    }
    return Application(note.function, given, of_operands)


_PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.device}
"""What can be written down in a graph."""
_PARTS = {"T", "mT", "H", "mH", "data", "real"}
"""Attributes of tensors that Dynamo reads ahead of a function that reads them."""


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _is_part(node: Any, operands: list[fx.Node]) -> bool:
    """Whether a tensor is one that a function was given, or an attribute of such a one."""
    while isinstance(node, fx.Node) and node.target is getattr and node.args[1] in _PARTS:
        node = node.args[0]
    return node in operands


def _is_learned(node: fx.Node, samples: Sequence[fx.Node]) -> bool:
    """Whether a tensor requires a gradient by way of others than the samples."""
    nodes, seen = [node], set(samples)
    for source in nodes:
        values = tree_leaves(source.meta.get("example_value"))
        if source in seen or not any(isinstance(value, Tensor) and value.requires_grad for value in values):
            continue
        if source.op == "placeholder":
            return True
        seen.add(source)
        nodes += source.all_input_nodes
    return False
