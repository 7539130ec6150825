"""Shows on recorded operators which values are linear in some others."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..record import Recorder

_SHAPED = {"zeros_like", "new_zeros", "ones_like", "new_ones", "empty_like", "new_empty", "full_like", "new_full"}
"""Operators that read of their argument no more than its form."""
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
"""Which argument says what is filled in."""

_TOGETHER: dict[str, list[set[int]]] = {
    name: chosen
    for names, chosen in (
        ("add sub", [{0, 1}]),
        ("mul mm bmm", [{0}, {1}]),
        ("convolution", [{0, 2}, {1, 2}]),
        ("constant_pad_nd index_put masked_fill", [{0, 2}]),
        ("where", [{1, 2}]),
        ("cat stack clone _to_copy detach alias neg div mean sum cumsum tril triu", [{0}]),
        ("view _unsafe_view reshape _reshape_alias expand permute transpose t squeeze unsqueeze", [{0}]),
        ("getitem slice select narrow split split_with_sizes unbind diagonal unfold index index_select gather", [{0}]),
        ("flip roll repeat pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d", [{0}]),
        ("replication_pad1d replication_pad2d avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d", [{0}]),
        ("upsample_nearest1d upsample_nearest2d upsample_bilinear2d", [{0}]),
        ("_softmax_backward_data _log_softmax_backward_data", [{0}]),
    )
    for name in names.split()
}
"""Sets of arguments in which an operator is linear together, while the others are fixed; one that is left out is zero.
Every operator called ``backward`` is linear in its first besides."""


class Linearity:
    """What of a recorded graph depends on some inputs, and how.

    Args:
        recorder: What has recorded it.
        inputs: Nodes that it may depend on.

    Attributes:
        zero: Nodes that are nothing but zeros.
        moved: Nodes that depend on the inputs.
    """

    def __init__(self, recorder: Recorder, inputs: Sequence[fx.Node]) -> None:
        self.zero: set[fx.Node] = set()
        self.moved = set(inputs)
        self._linear = set(inputs)
        for node in recorder.graph.nodes:
            if node.op == "get_attr":
                constant = recorder.constants[str(node.target)]
                if type(constant) is Tensor and not constant.any():
                    self.zero.add(node)
            elif node.op == "call_function" and (_is_filled_with_zeros(node) or self._keeps(node, self.zero)):
                self.zero.add(node)
            elif not self.moved.isdisjoint(node.all_input_nodes) and _name(node) not in _SHAPED:
                self.moved.add(node)
                if self._keeps(node, self._linear, fixed=True):
                    self._linear.add(node)

    def bend(self, node: fx.Node) -> Any:
        """Return the first operator by which ``node`` is not linear in the inputs; None where it is."""
        if node in self._linear or node in self.zero:
            return None
        bends = (self.bend(source) for source in node.all_input_nodes if source in self.moved)
        return next((bend for bend in bends if bend is not None), node.target)

    def _keeps(self, node: fx.Node, kept: set[fx.Node], fixed: bool = False) -> bool:
        """Whether a node is linear in arguments that are ``kept`` or zero; the others, if ``fixed``, have not moved."""
        values = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]
        known = node.target is operator.getitem or getattr(node.target, "namespace", "") == "aten"
        if not known or "rounding_mode" in node.kwargs or not all(value.is_floating_point() for value in values):
            return False
        first = [{0}] if _name(node).endswith("_backward") else []
        return any(self._together(node, chosen, kept, fixed) for chosen in _TOGETHER.get(_name(node), first))

    def _together(self, node: fx.Node, chosen: set[int], kept: set[fx.Node], fixed: bool) -> bool:
        inside = tree_leaves([argument for i, argument in enumerate(node.args) if i in chosen])
        outside = tree_leaves(([argument for i, argument in enumerate(node.args) if i not in chosen], node.kwargs))
        if fixed and any(isinstance(leaf, fx.Node) and leaf in self.moved for leaf in outside):
            return False
        zeros = [leaf in self.zero if isinstance(leaf, fx.Node) else not leaf for leaf in inside]
        return any(isinstance(leaf, fx.Node) for leaf in inside) and all(
            zero or (isinstance(leaf, fx.Node) and leaf in kept) for leaf, zero in zip(inside, zeros)
        )


def _is_filled_with_zeros(node: fx.Node) -> bool:
    filled = _FILLED.get(_name(node))
    if filled is None:
        return _name(node) in _ZEROS
    return not isinstance(node.args[filled], fx.Node) and not node.args[filled]


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))
