"""Rewrites of the recorded graph that change when memory is used and how often, and nothing that it computes."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from .record import Recorder

aten = torch.ops.aten


def finish(recorder: Recorder) -> fx.GraphModule:
    """Drop dead nodes, fold constants, and build the module."""
    graph = recorder.graph
    graph.eliminate_dead_code()
    _fold_constants(recorder)
    _order_by_first_use(graph)
    graph.eliminate_dead_code()
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    root = torch.nn.Module()
    for name, value in recorder.constants.items():
        if name in used:
            root.register_buffer(name, value, persistent=False)
    graph.lint()
    return fx.GraphModule(root, graph, class_name="FourPassStep")


def _fold_constants(recorder: Recorder) -> None:
    """Evaluate once what depends on no input, such as the seeds of a loss that is linear in the scores."""
    graph = recorder.graph
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = recorder.constants[node.target]
        if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and (schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags):
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)
    for node, value in known.items():
        needed = any(user not in known for user in node.users)
        if node.op == "call_function" and needed and isinstance(value, Tensor):
            name = f"constant_{node.name}"
            recorder.constants[name] = value.contiguous()
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name), lambda user: user not in known)


def _order_by_first_use(graph: fx.Graph) -> None:
    """Move views and slices down to their first use, so that nothing is held for their sake."""
    order: dict[fx.Node, None] = {}

    def place(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in order:
                place(source)
        order[node] = None

    for node in graph.nodes:
        if node.target not in _VIEWS and node not in order:
            place(node)
    end = graph.output_node()
    for node in order:
        if node is not end:
            end.prepend(node)


_VIEWS = {aten.slice.Tensor, aten.t.default, aten.view.default, aten.narrow.default, aten.transpose.int}


def write_over(graph: fx.Graph) -> None:
    """Put a tangent into the rows of a buffer that nothing else reads, instead of concatenating a new one.

    Turns ``cat([a[:k], t])``, where a is an activation without another later use, into ``a[k:].copy_(t)``.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is not aten.cat.default or len(node.args[0]) != 2:
            continue
        dim = node.args[1] if len(node.args) > 1 else 0
        head, tail = node.args[0]
        if head.target not in (aten.slice.Tensor, aten.narrow.default) or not isinstance(dim, int):
            continue
        whole = head.args[0]
        if not isinstance(whole, fx.Node) or not _overwritable(whole, head, node, position):
            continue
        val, new = whole.meta["val"], node.meta["val"]
        if (val.shape, val.dtype, val.stride()) != (new.shape, new.dtype, new.stride()) or head.args[1] != dim:
            continue
        if head.args[2] != 0:
            continue
        with graph.inserting_before(node):
            rows = graph.call_function(aten.slice.Tensor, (whole, dim, head.meta["val"].shape[dim], val.shape[dim]))
            graph.call_function(aten.copy_.default, (rows, tail))
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        if not head.users:
            graph.erase_node(head)


def _overwritable(whole: fx.Node, head: fx.Node, node: fx.Node, position: dict[fx.Node, int]) -> bool:
    if whole.op != "call_function" or _returns_view(whole):
        return False
    pending = [user for user in whole.users if user is not head]
    while pending:
        user = pending.pop()
        if position.get(user, 1 << 60) > position[node]:
            return False
        if _returns_view(user):
            pending.extend(user.users)
    return all(user is node for user in head.users)


def _returns_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op != "output"
    return any(result.alias_info is not None for result in schema.returns) or node.target in (
        aten.reshape.default, aten._reshape_alias.default, aten._unsafe_view.default,
    )  # fmt: skip


def example_values(node: fx.Node) -> Any:
    """Shapes of what a node returns, for reports."""
    return tree_map_only(Tensor, lambda t: tuple(t.shape), node.meta.get("val"))
