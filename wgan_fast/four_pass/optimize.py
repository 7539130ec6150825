"""Rewrites of the recorded graph that change when memory is used and how often, and nothing that it computes."""

import operator
import os
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .operators import IN_PLACE, OUT, on_gpu
from .record import Recorder
from .stand_ins import gives_view

aten = torch.ops.aten


def finish(recorder: Recorder) -> fx.GraphModule:
    """Drop dead nodes, fold constants, and build the module."""
    graph = recorder.graph
    graph.eliminate_dead_code()
    _fold_constants(recorder)
    graph.eliminate_dead_code()
    _cast_in_one_pass(graph)
    _order_by_first_use(graph)
    _own_outputs(graph, recorder.given_away)
    for node in graph.nodes:
        if node.target is aten.view.default:
            # Stand-ins misstate the strides of some operators (hardtanh_backward, log_sigmoid): a view may need a copy.
            node.target = aten.reshape.default
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
    # What is written to later, such as the memory of a random mask, is no constant.
    overwritten = _overwritten(graph)
    for node in graph.nodes:
        if _memory(node) in overwritten:
            continue
        if node.op == "get_attr":
            known[node] = recorder.constants[node.target]
        if node.target in _FILLED and node.meta["val"].numel() > 0:
            val = node.meta["val"]
            known[node] = torch.full(val.shape, _FILLED[node.target], dtype=val.dtype, device=val.device)
            continue
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
                constant = graph.get_attr(name)
            constant.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(constant, lambda user: user not in known)


def _cast_in_one_pass(graph: fx.Graph) -> None:
    """Lay out what is cast while it is cast, later: what it is cast from must stay as it is."""
    overwritten = _overwritten(graph)
    for node in graph.nodes:
        source = node.args[0] if node.target is aten.clone.default and "memory_format" in node.kwargs else None
        if not isinstance(source, fx.Node) or source.target is not aten._to_copy.default:
            continue
        if list(source.users) == [node] and _memory(source.all_input_nodes[0]) not in overwritten:
            node.target, node.args, node.kwargs = source.target, source.args, {**source.kwargs, **node.kwargs}


_FILLED = {aten.ones_like.default: 1, aten.zeros_like.default: 0}


def _order_by_first_use(graph: fx.Graph) -> None:
    """Run segment after segment, and views at their first use, so that nothing is held for their sake."""
    order: dict[fx.Node, None] = {}
    effects = [node for node in graph.nodes if _has_effect(node)]
    before = _memory_order(graph)
    for later, earlier in zip(effects[1:], effects):
        before[later].append(earlier)

    def place(node: fx.Node) -> None:
        pending = [node]
        while pending:
            needed = [*pending[-1].all_input_nodes, *before[pending[-1]]]
            missing = [source for source in needed if source not in order]
            if missing:
                pending.extend(reversed(missing))
            else:
                order[pending.pop()] = None

    end = graph.output_node()
    for node in sorted(
        graph.nodes, key=lambda node: node.meta.get("segment", (0, 0)) if node is not end else (len(graph.nodes), 0)
    ):
        if node.target not in _VIEWS and node not in order:
            place(node)
    for node in order:
        if node is not end:
            end.prepend(node)


def _memory_order(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Find what memory needs before each node: the last write to what it touches, the reads of what it overwrites."""
    before: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    writer: dict[int | None, fx.Node] = {}
    readers: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        written = _written(node)
        for memory in {_memory(touched) for touched in (node, *node.all_input_nodes)} - {None}:
            if memory in writer:
                before[node].append(writer[memory])
            if memory in written:
                before[node] += readers.pop(memory, [])
                writer[memory] = node
            else:
                readers.setdefault(memory, []).append(node)
    return before


def _memory(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    return val.untyped_storage()._cdata if isinstance(val, Tensor) else None


def _written(node: fx.Node) -> set[int | None]:
    """Return the memory that a node writes to, of what it was given."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return set()
    given = {a.name: value for a, value in zip(schema.arguments, node.args)} | dict(node.kwargs)
    written = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return {_memory(value) for value in written if isinstance(value, fx.Node)}


def _overwritten(graph: fx.Graph) -> set[int | None]:
    """Return the memory that some node writes to, of what it was given."""
    return set().union(*map(_written, graph.nodes))


def _own_outputs(graph: fx.Graph, given_away: list[bool]) -> None:
    """Give every output memory of its own: gradients are accumulated into, constants and inputs must not be."""
    end, seen = graph.output_node(), set[fx.Node]()

    def own(node: fx.Node) -> fx.Node:
        val, made = node.meta["val"], node
        while made.op == "call_function" and made.target is not operator.getitem and _returns_view(made):
            made = made.all_input_nodes[0]
        whole = made is node or (val.is_contiguous() and val.numel() == made.meta["val"].numel())
        shared = made in seen or not _owned(made) or not whole or 0 in val.stride() or _read_later(made)
        seen.add(made)
        if not shared:
            return node
        with graph.inserting_before(end):
            copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        copy.meta.update(val=val, segment=node.meta.get("segment", (0, 0)))
        return copy

    values: Any = end.args[0]
    end.args = (tuple(fx.node.map_arg(v, own) if away else v for v, away in zip(values, [*given_away, True])),)


def _read_later(node: fx.Node) -> bool:
    """Whether a later piece reads the memory of a node: whoever is given it in between may write to it."""
    piece = node.meta.get("segment", (0, 0))[0]
    readers = [reader for reader in readers_of(node) if reader.op != "output"]
    return any(reader.meta.get("segment", (piece, 0))[0] > piece for reader in readers)


def cut(module: fx.GraphModule, pieces: int) -> list[fx.GraphModule]:
    """Take a graph apart where it was cut.

    Each piece takes what those before it leave for it, then its own inputs; it returns what it is asked for and, if it
    is not the last, what the later ones need.
    """
    end = module.graph.output_node()
    if pieces == 1:
        end.args = end.args[0]  # type: ignore[assignment]
        return [module]
    of: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if node is not end:
            own = node.meta.get("segment", (0, 0))[0]
            of[node] = max([own, *[of[source] for source in node.all_input_nodes]])
    asked: list[Any] = list(end.args[0])  # type: ignore[arg-type]
    readers: dict[fx.Node, int] = {}
    for node, piece in of.items():
        for user in node.users:
            readers[node] = max(readers.get(node, piece), of.get(user, piece))
    for number, values in enumerate(asked):
        for node in _nodes_of(values):
            readers[node] = max(readers.get(node, 0), number)
    made = []
    for number in range(pieces):
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        carried = [
            node for node in of if of[node] < number and readers.get(node, 0) >= number and node.op != "get_attr"
        ]
        for node in [*carried, *[n for n in of if of[n] == number and n.op == "placeholder"]]:
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
        for node, piece in of.items():
            if node.op == "get_attr" or (piece == number and node.op != "placeholder"):
                env[node] = graph.node_copy(node, env.__getitem__)
        left = [node for node in of if of[node] <= number and readers.get(node, 0) > number and node.op != "get_attr"]
        result = fx.node.map_arg(asked[number], env.__getitem__)
        graph.output(result if number == pieces - 1 else (result, tuple(env[node] for node in left)))
        graph.eliminate_dead_code()
        made.append(fx.GraphModule(module, graph, class_name="FourPassStep"))
    return made


def _nodes_of(values: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, fx.Node)]


def _has_effect(node: fx.Node) -> bool:
    """Whether a node writes to a buffer or draws random numbers, and so keeps its place among its like."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags)  # type: ignore[union-attr]


_VIEWS = {aten.slice.Tensor, aten.t.default, aten.view.default, aten.narrow.default, aten.transpose.int}


def assemble(graph: fx.Graph) -> None:
    """Have a GPU mix, join, cast and lay out the samples of a step in one pass over them."""
    overwritten = _overwritten(graph)
    for node in list(graph.nodes):
        if (
            node.target is not aten.cat.default
            or len(node.args[0]) != 3
            or node.args[1:] not in ((), (0,))
            or node.kwargs
        ):
            continue
        real, fake, mixed = node.args[0]
        val = node.meta["val"]
        if mixed.target is not torch.ops.wgan_fast.interpolate.default or mixed.args[:2] != (real, fake):
            continue
        alike = {x.meta["val"].dtype for x in (real, fake)} == {val.dtype}
        read = [node, *mixed.all_input_nodes]
        if not on_gpu(val) or not alike or list(mixed.users) != [node] or {_memory(x) for x in read} & overwritten:
            continue
        readers = list(node.users)
        whole = readers[0] if len(readers) == 1 and _narrows(readers[0]) else node
        made = whole.meta["val"]
        if (channels_last := _channels_last(made)) is None:
            continue
        with graph.inserting_before(node):
            arguments = (real, fake, mixed.args[2], made.dtype, channels_last)
            together = graph.call_function(torch.ops.wgan_fast.assemble.default, arguments)
        together.meta.update(whole.meta)
        whole.replace_all_uses_with(together)
    graph.eliminate_dead_code()


def _narrows(node: fx.Node) -> bool:
    """Whether a node casts to half precision, however it lays that out."""
    return (
        node.target is aten._to_copy.default
        and node.kwargs.keys() <= {"dtype", "memory_format"}
        and node.meta["val"].dtype in (torch.bfloat16, torch.float16)
    )


def _channels_last(val: Tensor) -> bool | None:
    """Whether a batch lies with its channels last, or contiguously; None for anything else."""
    for last in (False, val.dim() in _LAYOUTS):
        layout = _LAYOUTS[val.dim()] if last else torch.contiguous_format
        if torch.empty(val.shape, device="meta", memory_format=layout).stride() == val.stride():
            return last
    return None


def leave_uncast(graph: fx.Graph) -> None:
    """Have a GPU's operators read in half precision what was widened for them alone."""
    overwritten = _overwritten(graph)
    for node in list(graph.nodes):
        if node.target in _UNCAST:
            _UNCAST[node.target](node, overwritten)
    graph.eliminate_dead_code()


def cast_together(graph: fx.Graph) -> None:
    """Have a GPU cast its weights together, and its gradients."""
    end, overwritten = graph.output_node(), _overwritten(graph)
    alike: dict[tuple[bool, Any, torch.dtype, torch.dtype], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is not aten._to_copy.default or _memory(node.all_input_nodes[0]) in overwritten:
            continue
        source, val, uncast = node.args[0], node.meta["val"], node.all_input_nodes[0].meta["val"]
        given, leaves = source.op == "placeholder", list(node.users) == [end]
        if (given or leaves) and on_gpu(val) and val.device == uncast.device and _in_one_order(val, uncast):
            alike.setdefault((given, val.device, uncast.dtype, val.dtype), []).append(node)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    groups = [(given, dtype, nodes) for (given, _, _, dtype), nodes in alike.items() if len(nodes) > 1]
    for given, dtype, nodes in groups:
        with graph.inserting_before(first if given else end):
            together = graph.call_function(torch.ops.wgan_fast.cast.default, ([node.args[0] for node in nodes], dtype))
            together.meta.update(nodes[0].meta, val=[node.meta["val"] for node in nodes])
            for i, node in enumerate(nodes):
                one = graph.call_function(operator.getitem, (together, i))
                val, uncast = node.meta["val"], node.all_input_nodes[0].meta["val"]
                one.meta.update(node.meta)
                if val.stride() != uncast.stride():  # of one channel: the same memory, called channels-last
                    one.meta["val"] = torch.empty_like(uncast, dtype=val.dtype)
                    one = graph.call_function(aten.as_strided.default, (one, val.shape, val.stride()))
                    one.meta.update(node.meta)
                node.replace_all_uses_with(one)
    for _, _, nodes in groups:  # one of them may be what the others were put before
        for node in nodes:
            graph.erase_node(node)


def _in_one_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape have their elements at the same places, whatever their strides are called."""
    strides = zip(one.shape, one.stride(), other.stride())
    return all(size == 1 or here == there for size, here, there in strides)


def _before_cast(cast: object, reader: fx.Node, overwritten: set[int | None]) -> Tensor | None:
    """Return what was widened to float32 on a GPU for one reader alone, and is still as it was when that reads it.

    Operators of a GPU widen what they read by themselves; anything else they would cast first.
    """
    if not isinstance(cast, fx.Node) or cast.target is not aten._to_copy.default or list(cast.users) != [reader]:
        return None
    uncast, val = cast.all_input_nodes[0].meta["val"], cast.meta["val"]
    widened = uncast.dtype in (torch.bfloat16, torch.float16) and val.dtype == torch.float32
    laid_out = cast.kwargs.get("memory_format", torch.preserve_format) is not torch.preserve_format
    here = on_gpu(val) and uncast.device == val.device and not laid_out
    return uncast if widened and here and _memory(cast.all_input_nodes[0]) not in overwritten else None


def _add_uncast(total: fx.Node, overwritten: set[int | None]) -> None:
    """Add to what is of float32 already what was widened to it."""
    one, cast = total.args[:2]
    if not isinstance(one, fx.Node) or not isinstance(cast, fx.Node) or one is cast:
        return
    alike = one.meta["val"].device == total.meta["val"].device and one.meta["val"].dtype == torch.float32
    if alike and one.meta["val"].dim() > 0 and _before_cast(cast, total, overwritten) is not None:
        total.replace_input_with(cast, cast.all_input_nodes[0])


def _average_uncast(mean: fx.Node, overwritten: set[int | None]) -> None:
    """Average in float32."""
    (cast,) = mean.args
    if not mean.kwargs and isinstance(cast, fx.Node) and _before_cast(cast, mean, overwritten) is not None:
        mean.args, mean.kwargs = (cast.all_input_nodes[0],), {"dtype": torch.float32}


def _penalise_uncast(penalty: fx.Node, overwritten: set[int | None]) -> None:
    """Give the norms, which are of float32, and v in the dtype of the gradient, to which it would be cast."""
    gradient, *settings = penalty.args
    uncast = _before_cast(gradient, penalty, overwritten)
    if uncast is None or not isinstance(gradient, fx.Node) or uncast.stride() != gradient.meta["val"].stride():
        return
    casts = [(seed, cast) for seed in penalty.users if seed.args[1] == _SEED for cast in seed.users]
    if len(casts) != 1:
        return
    ((seed, cast),) = casts
    if cast.target is not aten._to_copy.default:
        return
    val = cast.meta["val"]
    if (val.dtype, val.device, val.stride()) != (uncast.dtype, uncast.device, seed.meta["val"].stride()):
        return
    penalty.args = (gradient.all_input_nodes[0], *settings)
    seed.meta["val"] = val
    cast.replace_all_uses_with(seed)
    penalty.meta["val"] = (*penalty.meta["val"][:_SEED], val)


_SEED = 3
"""Place of v among the results of ``gradient_norm_penalty``."""

_UNCAST = {
    aten.add.Tensor: _add_uncast,
    aten.mean.default: _average_uncast,
    torch.ops.wgan_fast.gradient_norm_penalty.default: _penalise_uncast,
}
"""What a GPU's operators read in half the precision that the graph says, at no cost."""


PAD_CHANNELS = "WGAN_FAST_PAD_CHANNELS"
_PADDED = 8
"""Channels that cuDNN's kernels for half precision take without a copy."""


def pads_channels() -> bool:
    """Whether the environment asks for ``pad_channels``."""
    return os.environ.get(PAD_CHANNELS, "") not in ("", "0")


def pad_channels(graph: fx.Graph) -> None:
    """Have a GPU convolve samples of few channels in half precision over more of them, of zeros, laid out once.

    That is the critic's first layer, forward and for its weight's gradient; around each such call cuDNN would copy its
    operands by itself. What else reads the batch reads the channels that there are. Off unless it is asked for: of the
    two only the gradient was measured, 0.11 ms for 0.33 on an H200.
    """
    for batch in [node for node in graph.nodes if node.target is torch.ops.wgan_fast.assemble.default]:
        val, position = batch.meta["val"], _positions(graph)
        calls = sorted((node for node in batch.users if _convolves_all(node, batch)), key=position.__getitem__)
        weights = {node.args[_WEIGHT_AT[node.target]] for node in calls}
        fits = batch.args[4] and val.dtype in (torch.bfloat16, torch.float16) and val.shape[1] < _PADDED
        if not fits or not on_gpu(val) or len(weights) != 1 or calls[-1].target is aten.convolution.default:
            continue
        (weight,) = weights
        batch.args = (*batch.args[:5], _PADDED)
        with graph.inserting_before(calls[0]):
            padding = [0, 0] * (val.dim() - 2) + [0, _PADDED - val.shape[1]]
            wide = graph.call_function(aten.constant_pad_nd.default, (weight, padding))
        others = [node for node in batch.users if node not in calls]
        _replace_by_channels(batch, val, others)
        for node in calls:
            node.replace_input_with(weight, wide)
            if node.target is aten.convolution_backward.default:
                (gradient,) = node.users
                _replace_by_channels(gradient, val, list(gradient.users))


def _replace_by_channels(node: fx.Node, like: Tensor, users: list[fx.Node]) -> None:
    """Give users as many channels of a node as there are in a tensor."""
    with node.graph.inserting_after(node):
        some = node.graph.call_function(aten.slice.Tensor, (node, 1, 0, like.shape[1]))
    some.meta.update(node.meta)
    for user in users:
        user.replace_input_with(node, some)


_WEIGHT_AT = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _convolves_all(node: fx.Node, batch: fx.Node) -> bool:
    """Whether a node convolves a whole batch, or gives the gradient of the weight that did, and nothing else."""
    args: Any = node.args
    if node.target is aten.convolution.default:
        transposed, groups, alone = args[6], args[8], True
    elif node.target is aten.convolution_backward.default:
        transposed, groups = args[7], args[9]
        read = [user.args[1] for user in node.users]
        alone = list(args[10]) == [False, True, False] and read == [1]
    else:
        return False
    data = args[_WEIGHT_AT[node.target] - 1]
    return data is batch and alone and not transposed and groups == 1


def save_memory(graph: fx.Graph) -> None:
    """Let operators write where nobody reads any more, for eager execution; a compiler does this by itself."""
    _fuse_relu(graph)
    _write_tangents(graph)
    _accumulate(graph)
    _write_in_place(graph)
    graph.eliminate_dead_code()


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(graph.nodes)}


def _fuse_relu(graph: fx.Graph) -> None:
    for node in graph.nodes:
        source = node.args[0] if node.target is aten.relu.default else None
        if source is not None and source.target is aten.addmm.default and len(source.users) == 1:
            node.target, node.args, node.kwargs = aten._addmm_activation.default, source.args, source.kwargs


def _write_tangents(graph: fx.Graph) -> None:
    """Put a tangent into the rows of a buffer that nothing else reads, instead of concatenating a new one.

    Turns ``cat([a[:k], t])``, where a is an activation without another later use, into ``a[k:].copy_(t)``, and has
    the operator that makes t write there directly where it can.
    """
    position = _positions(graph)
    for node in list(graph.nodes):
        if node.target is not aten.cat.default or len(node.args[0]) != 2:
            continue
        dim = node.args[1] if len(node.args) > 1 else 0
        head, tail = node.args[0]
        if head.target is not aten.slice.Tensor or head.args[1:3] != (dim, 0) or list(head.users) != [node]:
            continue
        whole = head.args[0]
        val, new = whole.meta["val"], node.meta["val"]
        if (val.shape, val.dtype, val.stride()) != (new.shape, new.dtype, new.stride()):
            continue
        readers = readers_of(_origin(whole))
        if not _owned(_origin(whole)) or any(position.get(r, -1) > position[node] for r in readers):
            continue
        start = head.meta["val"].shape[dim]
        rows = graph.create_node("call_function", aten.slice.Tensor, (whole, dim, start, val.shape[dim]))
        rows.meta["val"] = tail.meta["val"]
        later = {r for r in readers if position.get(r, -1) > position.get(tail, 1 << 60)} - {head, node}
        if tail.target in OUT and tail.meta["val"].dtype == val.dtype and not later:
            tail.prepend(rows)
            overload, name = OUT[tail.target]
            tail.target, tail.kwargs = overload, {**tail.kwargs, name: rows}
        else:
            node.prepend(rows)
            with graph.inserting_before(node):
                graph.call_function(aten.copy_.default, (rows, tail))
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        graph.erase_node(head)


def _accumulate(graph: fx.Graph) -> None:
    """Add a product to a value as it is made: a weight's gradient by tangents, and by activations where there is β."""
    position = _positions(graph)
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        total, product = node.args
        if not (isinstance(total, fx.Node) and isinstance(product, fx.Node) and product.target is aten.mm.default):
            continue
        val, like = total.meta["val"], node.meta["val"]
        alike = (val.shape, val.dtype, val.stride()) == (like.shape, like.dtype, like.stride())
        if total is product or list(product.users) != [node] or not alike:
            continue
        if product.meta["val"].dtype != val.dtype:
            continue
        if _owned(total) and not any(position.get(r, -1) > position[node] for r in readers_of(total) - {node}):
            node.target, node.args = aten.addmm_.default, (total, *product.args)
            graph.erase_node(product)


def _write_in_place(graph: fx.Graph) -> None:
    """Let elementwise operators overwrite an argument that they are the last to read."""
    position = _positions(graph)
    for node in graph.nodes:
        if node.target not in IN_PLACE and not (node.target in OUT and "backward" in str(node.target)):
            continue
        source = node.args[0]
        others = [n for n in node.all_input_nodes if n is not source]
        if not isinstance(source, fx.Node) or list(node.args).count(source) > 1:
            continue
        origin = _origin(source)
        if not _owned(origin):
            continue
        val, new = source.meta.get("val"), node.meta.get("val")
        if not isinstance(val, Tensor) or (val.shape, val.dtype, val.stride()) != (
            new.shape,
            new.dtype,
            new.stride(),
        ):
            continue
        readers = readers_of(origin)
        if any(position.get(r, -1) > position[node] for r in readers) or any(o in {origin, *readers} for o in others):
            continue
        if node.target in IN_PLACE:
            node.target = IN_PLACE[node.target]
        else:
            overload, name = OUT[node.target]
            node.target, node.kwargs = overload, {**node.kwargs, name: source}


def _origin(node: fx.Node) -> fx.Node:
    """Return the node that made a node's memory, where it is all of that, perhaps under another shape."""
    while node.target in (aten.squeeze.dim, aten.unsqueeze.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _owned(node: fx.Node) -> bool:
    """Whether a node's memory is new and its own."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return not _returns_view(node.args[0])  # type: ignore[arg-type]
    return not _returns_view(node)


def readers_of(node: fx.Node) -> set[fx.Node]:
    """Everything that reads a node's memory, through views too."""
    found: set[fx.Node] = set()
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user not in found:
            found.add(user)
            if _returns_view(user):
                pending.extend(user.users)
    return found


def _returns_view(node: fx.Node) -> bool:
    if getattr(node.target, "_schema", None) is None:
        return node.op != "output"
    return gives_view(node.target)
