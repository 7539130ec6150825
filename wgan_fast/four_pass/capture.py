"""Lowers a critic's traced forward to a graph of high-level ATen operators.

What the graph says is made plain on the way: in-place operators on activations become their functional forms, blocks
under ``no_grad`` are marked, and numbers that a trace made inputs become tensors.
"""

import itertools
import operator
import os
import re
import traceback
import types
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from .functions import Application, UnknownError, applied, is_function
from .operators import Applied
from .record import functional_form

aten = torch.ops.aten

_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}

STOPS_GRADIENT = "stops_gradient"
"""Key in ``node.meta``: autograd does not see this node."""

_DETACHING = {
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.bernoulli.default,
    torch.ops.aten.bernoulli.p,
    torch.ops.aten.exponential.default,
    torch.ops.aten.normal_functional.default,
    torch.ops.aten.rand_like.default,
    torch.ops.aten.randn_like.default,
    torch.ops.aten.uniform.default,
}
"""Operators whose results do not move with their arguments."""
_ALONG_LINES = {torch.ops.aten.conv1d.default, torch.ops.aten.conv1d.padding, torch.ops.aten.conv_transpose1d.default}
_ASSERTIONS = ("_assert", "sym_constrain_range")


class CaptureError(RuntimeError):
    """The critic cannot run in four passes; the message says which operator, where and why."""


@dataclass(frozen=True)
class Output:
    """An output of a captured graph, in the nest that the critic returns."""

    number: int


@dataclass
class Captured:
    """A critic as a graph.

    Attributes:
        graph: Placeholders, then ATen operators, then the outputs.
        inputs: A placeholder for every input of the traced forward, in its order: tensors, and numbers that may change.
        samples: Those of the samples that the gradient is taken in.
        sampled: Those with a row per sample, further arguments such as labels among them; with their positions among
            the leaves of all that the critic is called with.
        leaves: How many of those leaves are samples; they come first.
        trainable: Those that require gradients, the samples aside.
        picks: What is made of the critic's output, its scores, say: nests of outputs by number, and what is no tensor.
        constants: Placeholder to the tensor that is written down in the critic's code.
        functions: The same as a module of tensor functions, which autograd can differentiate.
        dynamic: Whether the graph holds for other batch sizes.
    """

    graph: fx.Graph
    inputs: list[fx.Node] = field(default_factory=list)
    samples: list[fx.Node] = field(default_factory=list)
    sampled: dict[fx.Node, int] = field(default_factory=dict)
    leaves: int = 1
    trainable: list[fx.Node] = field(default_factory=list)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    picks: tuple[Any, ...] = ()
    dynamic: bool = True
    functions: fx.GraphModule = None  # type: ignore[assignment]

    @property
    def convolves_lines(self) -> bool:
        """Whether there are 1-D convolutions, which on a CPU lay out as images of height 1 what they make."""
        return any(node.target in _ALONG_LINES for node in self.graph.nodes)

    @property
    def x(self) -> fx.Node:
        """The first of the samples."""
        return self.samples[0]

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes of what the critic returns, as far as it is asked for."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def picked(self, number: int) -> list[fx.Node]:
        """Return the outputs of one pick."""
        outputs, leaves = self.outputs, tree_leaves(self.picks[number])
        return list(dict.fromkeys(outputs[leaf.number] for leaf in leaves if isinstance(leaf, Output)))

    def calls(self) -> list[fx.Node]:
        """Every operator in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


_NOT_THE_CRITIC = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
_STANDARD_LIBRARY = os.path.dirname(os.__file__)


def where(node: fx.Node) -> str:
    """Describe a node for an error message: its operator and the user's source line."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [
        i
        for i, line in enumerate(trace)
        if line.strip().startswith('File "') and not line.strip().removeprefix('File "').startswith(_NOT_THE_CRITIC)
    ]
    source = " ".join(line.strip() for line in trace[frames[-1] : frames[-1] + 2]) if frames else ""
    target = node.target
    name = target if isinstance(target, str | torch._ops.OpOverload) else getattr(target, "__name__", target)
    return f"{name}" + (f" at {source}" if source else "")


def first_line(error: BaseException) -> str:
    """Return what an exception says, short enough for a message."""
    return (str(error).strip().splitlines() or [repr(error)])[0]


def raised_at(error: BaseException) -> str:
    """Describe where in the critic's own code ``error`` arose, in the words of ``where``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        # Decorators of the standard library and generated code stand between the critic's frames and torch's.
        outside = file.startswith(("<", *_NOT_THE_CRITIC)) or os.path.dirname(file) == _STANDARD_LIBRARY
        if not outside:
            return f' at File "{file}", line {frame.lineno}, in {frame.name} {frame.line}'
    return ""


def lower(
    trace: fx.GraphModule,
    picks: tuple[Any, ...],
    samples: Sequence[fx.Node],
    sampled: Mapping[fx.Node, int],
    leaves: int,
    numbers: Mapping[fx.Node, float | None],
) -> Captured:
    """Lower a graph of tensor functions, as Dynamo makes it.

    Args:
        trace: The graph; the placeholders' ``example_value`` are fake tensors of one mode, and numbers.
        picks: What is made of the critic's output: nests of its nodes.
        samples: Its placeholders of the samples that the gradient is taken in.
        sampled: Its placeholders with a row per sample, with their positions.
        leaves: How many of those positions are samples'.
        numbers: Its placeholders of 0-dim tensors that stand for Python's floating-point numbers: with their values,
            or None to compute with the tensors.

    Raises:
        CaptureError: The forward writes to its activations through views, or does what has no rule.
    """
    placeholders = [node for node in trace.graph.nodes if node.op == "placeholder"]
    outputs = list(dict.fromkeys(node for node in tree_leaves(picks) if isinstance(node, fx.Node)))
    functions = _functions(trace, outputs, samples, numbers)
    lowered = _to_aten(functions, [node.meta["example_value"] for node in placeholders])
    captured = Captured(fx.Graph(), functions=functions, leaves=leaves)
    env: dict[fx.Node, fx.Node] = {}
    given = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    captured.inputs = [captured.graph.placeholder(_short_name(node)) for node in placeholders]
    for old, source, new in zip(given, placeholders, captured.inputs):
        new.meta["val"] = value = source.meta["example_value"]
        env[old] = new
        if source in samples:
            captured.samples.append(new)
        elif isinstance(value, Tensor) and value.requires_grad:
            captured.trainable.append(new)
        if source in sampled:
            captured.sampled[new] = sampled[source]
    captured.samples.sort(key=captured.sampled.__getitem__)
    captured.picks = tree_map(lambda leaf: Output(outputs.index(leaf)) if isinstance(leaf, fx.Node) else leaf, picks)
    rows = samples[0].meta["example_value"].shape[0]
    captured.dynamic = isinstance(rows, torch.SymInt)
    for old in given:
        value = env[old].meta["val"]
        if captured.dynamic and isinstance(value, torch.SymInt) and value.node.expr == rows.node.expr:
            # Read from the samples themselves, so that joined batches are as long as they are.
            env[old] = captured.graph.call_function(torch.ops.aten.sym_size.int, (captured.x, 0))
            env[old].meta["val"] = value
    captured.graph.output(tuple(_plain(lowered, captured, env)))
    _keep_rows_apart(captured.graph)
    return captured


def _keep_rows_apart(graph: fx.Graph) -> None:
    """Take linear layers on tensors as they are where a forward flattens them first and unflattens what comes out.

    ``[T, N, E] → [T·N, E] → linear → [T, N, F]``, as in multi-head attention, loses track of the samples in between.
    """
    for linear in list(graph.nodes):
        users = list(linear.users)
        if linear.target is not aten.linear.default or len(users) != 1:
            continue
        flat, unflat = linear.args[0], users[0]
        if flat.target not in _RESHAPES or unflat.target not in _RESHAPES or flat.meta["val"].dim() != 2:
            continue
        whole, leading, features = flat.args[0], unflat.meta["val"].shape[:-1], flat.meta["val"].shape[-1]
        sizes = unflat.args[1][:-1]
        known = all(size < flat for size in sizes if isinstance(size, fx.Node)) and isinstance(features, int)
        marks = {node.meta.get(STOPS_GRADIENT, False) for node in (flat, linear, unflat)}
        shape = [*whole.meta["val"].shape[: len(leading)], linear.meta["val"].shape[-1]]
        # What may be a copy of memory that is written to later must stay one.
        written = any(_writes(node) for node in itertools.dropwhile(partial(operator.is_not, flat), graph.nodes))
        if written or not known or len(marks) > 1 or _expressions(shape) != _expressions(unflat.meta["val"].shape):
            continue
        with graph.inserting_before(flat):
            rows = graph.call_function(aten.reshape.default, (whole, [*sizes, features]))
        with whole.meta["val"].fake_mode:
            rows.meta = {**flat.meta, "val": whole.meta["val"].reshape(*leading, features)}
        linear.args = (rows, *linear.args[1:])
        linear.meta["val"] = unflat.meta["val"]
        unflat.replace_all_uses_with(linear)
        graph.erase_node(unflat)
        if not flat.users:
            graph.erase_node(flat)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _expressions(sizes: Sequence[Any]) -> list[Any]:
    """Sizes that can be compared without deciding anything about them."""
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


def _short_name(placeholder: fx.Node) -> str:
    """Name a parameter or buffer as its module does: ``p_0_weight``, ``b_1_running_mean``."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = str(getattr(source, "name", ""))
    kind = next((kind for kind in ("_parameters", "_buffers") if kind in name), None)
    if kind is None or not name.startswith("L['critic']"):
        return placeholder.name
    return "_".join([kind[1], *re.findall(r"\['(\w+)'\]", name)[1:]])


def _functions(
    trace: fx.GraphModule,
    outputs: list[fx.Node],
    samples: Sequence[fx.Node],
    numbers: Mapping[fx.Node, float | None],
) -> fx.GraphModule:
    """Make numbers tensors, and inference mode what it is to autograd; the result is the outputs alone."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inference: dict[fx.Node, bool] = {}
    enabled = True
    for node in trace.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "output":
            break
        if node.op == "get_attr" and isinstance(getattr(trace, str(node.target), None), Tensor):
            raise CaptureError(f"the critic closes over {node.target}, which has no rule")
        if name == "item" and node.args[0] in numbers:
            value = numbers[node.args[0]]
            env[node] = env[node.args[0]] if value is None else value  # type: ignore[assignment]
            continue
        if name == "_set_grad_enabled":
            enabled = bool(node.args[0])
        elif name == "_enter_inference_mode":
            # To autograd what is made in there is a constant, as under no_grad.
            inference[node] = enabled
            enabled = enabled and not node.args[0]
            graph.call_function(torch._C._set_grad_enabled, (enabled,))
            continue
        elif name == "_exit_inference_mode":
            enabled = inference[node.args[0]]
            graph.call_function(torch._C._set_grad_enabled, (enabled,))
            continue
        elif name in _HOOKS:
            raise CaptureError(
                f"{where(node)} registers a hook on a tensor's gradient, which four passes would not call"
            )
        elif is_function(node):
            env[node] = _apply(graph, node, _application(trace, node, samples, numbers), env)
            continue
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            _check_wrapper(trace, node)
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.target is getattr and node.args[1:] == ("data",):
            env[node].target, env[node].args = torch.detach, env[node].args[:1]
    graph.output(tuple(env[node] for node in outputs))
    return fx.GraphModule(trace, graph)


def _application(
    trace: fx.GraphModule, node: fx.Node, samples: Sequence[fx.Node], numbers: Mapping[fx.Node, float | None]
) -> Application:
    try:
        return applied(trace, node, samples, numbers)
    except UnknownError as error:
        raise CaptureError(f"{where(node)} is an autograd.Function with a backward of its own, {error}") from None


def _apply(graph: fx.Graph, node: fx.Node, made: Application, env: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Put the function for which a node of Dynamo's stands in its place."""
    args = fx.node.map_arg(made.args, lambda source: env[source])
    new = graph.call_function(Applied(made.function), args, made.of_operands)
    new.meta = dict(node.meta)
    return new


def _check_wrapper(trace: fx.GraphModule, node: fx.Node) -> None:
    """Refuse a higher-order operator unless it only wraps, and what it wraps has no backward of its own."""
    if getattr(node.target, "__name__", "") not in _WRAPPERS:
        raise CaptureError(f"{where(node)} is a higher-order operator, which has no rule")
    body = getattr(trace, str(node.args[0].target))  # type: ignore[union-attr]
    for inner in body.graph.nodes:
        if is_function(inner):
            raise CaptureError(f"{where(inner)} is an autograd.Function with a backward of its own, in a checkpoint")
        if isinstance(inner.target, torch._ops.HigherOrderOperator):
            _check_wrapper(body, inner)


def _to_aten(functions: fx.GraphModule, fakes: list[Any]) -> fx.GraphModule:
    """Trace the functions once more, below those of ``torch.nn.functional``, on stand-ins."""

    def run(*values: Any) -> Any:
        with fx.traceback.preserve_node_meta():
            return _Interpreter(functions).run(*values)

    tensors = [fake for fake in fakes if isinstance(fake, Tensor)]
    devices = {fake.device.type for fake in tensors}
    with ExitStack() as stack:
        stack.enter_context(tensors[0].fake_mode)  # type: ignore[attr-defined]
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        return make_fx(run, pre_dispatch=True, tracing_mode="real")(*fakes)


class _Interpreter(fx.Interpreter):
    """Runs what checkpoints and the like wrap as if it were not wrapped: there is no double backward to save for.

    An ``autograd.Function`` stays one call.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one function."""
        if getattr(target, "__name__", "") in _WRAPPERS:
            body, *operands = args
            return _Interpreter(body).run(*operands)
        if isinstance(target, Applied):
            tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
            # Nor is it written down where the function switches gradients on or off.
            with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
                made = target(*args, **kwargs)
            proxies = tree_map_only(Tensor | torch.SymInt, tracer.unwrap_proxy, args)
            proxy = tracer.create_proxy("call_function", target, proxies, kwargs)
            return track_tensor_tree(made, proxy, constant=None, tracer=tracer)
        made = super().call_function(target, args, kwargs)
        if isinstance(target, types.FunctionType) and target.__module__ != "torch.nn.functional":
            _check_derivatives(made, (args, kwargs))
        return made


def _check_derivatives(made: Any, given: Any) -> None:
    """Refuse derivatives of the user's own in a function that ``allow_in_graph`` keeps the trace from looking into."""
    before, steps = ([x.grad_fn for x in tree_leaves(some) if isinstance(x, Tensor)] for some in (given, made))
    seen: set[Any] = {None, *before}
    step: Any
    for step in steps:
        if step not in seen and hasattr(step, "_forward_cls"):
            raise CaptureError(f"{step._forward_cls.__qualname__} has a backward of its own, hidden by allow_in_graph")
        steps += [] if step in seen else [further for further, _ in step.next_functions]
        seen.add(step)


_WRAPPERS = {"wrap", "tag_activation_checkpoint"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}


def _plain(module: fx.GraphModule, captured: Captured, env: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Copy the nodes of ``module`` into the captured graph; returns its outputs."""
    graph, enabled = captured.graph, True
    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return [env[output] for output in node.args[0]]
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "get_attr":
            constant = getattr(module, str(node.target))
            if isinstance(constant, FakeTensor):
                raise CaptureError("a tensor of the critic's is lost in the trace")
            env[node] = graph.placeholder(f"c_{node.target}")
            captured.constants[env[node]] = constant
        elif name == "_set_grad_enabled":
            enabled = bool(node.args[0])
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"{where(node)} is a higher-order operator, which has no rule")
        elif node.target is torch.ops.aten.detach_.default:
            for alias in _aliases(node.args[0], node, module.graph):
                env[alias] = graph.call_function(torch.ops.aten.detach.default, (env[alias],))
                env[alias].meta = {**node.meta, STOPS_GRADIENT: True}
            env[node] = env[node.args[0]]
        elif node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise CaptureError(f"{where(node)} reads a number from a tensor")
        elif not name.startswith(_ASSERTIONS):
            written = _written(node)
            lasting = written is not None and _lasts(env, written, module.graph, captured)
            new = graph.node_copy(node, env.__getitem__)
            if new.target is torch.ops.aten.lift_fresh_copy.default:
                # A tensor written in the critic's code; dispatch modes are not shown this way of copying it.
                new.target = torch.ops.aten.clone.default
            made = [new]
            if written is not None and (not lasting or "out" in node.kwargs):
                new.target = _functional(node)
                new.kwargs = {name: argument for name, argument in new.kwargs.items() if name != "out"}
            if written is not None and not lasting:
                for alias in _aliases(written, node, module.graph):
                    env[alias] = new
            elif written is not None and "out" in node.kwargs:
                new = graph.call_function(torch.ops.aten.copy_.default, (env[written], new))
                new.meta = dict(node.meta)
                made.append(new)
            if not enabled or _DETACHING & {node.target, made[0].target}:
                for call in made:
                    call.meta[STOPS_GRADIENT] = True
            env[node] = new
    raise CaptureError("the captured critic has no output")


def _storage(node: fx.Node) -> int | None:
    val = node.meta.get("val")
    return val.untyped_storage()._cdata if isinstance(val, Tensor) else None


def _written(node: fx.Node) -> fx.Node | None:
    """Return the argument that ``node`` writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return None
    written = [
        node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if len(written) != 1 or not isinstance(written[0], fx.Node):
        raise CaptureError(f"{where(node)} writes to several tensors, which has no rule")
    return written[0]


def _lasts(env: dict[fx.Node, fx.Node], node: fx.Node, graph: fx.Graph, captured: Captured) -> bool:
    """Whether ``node`` is, or is a view of, what lives outside the forward: updates of that are meant to last."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and env[n] not in captured.sampled]
    return _storage(node) in {_storage(n) for n in inputs}


def _functional(node: fx.Node) -> Any:
    functional = functional_form(node.target)
    if functional is None:
        raise CaptureError(f"{where(node)} writes to an activation and has no functional form")
    return functional


def _aliases(mutated: fx.Node, writer: fx.Node, graph: fx.Graph) -> list[fx.Node]:
    """Earlier nodes that are the very tensor that ``writer`` overwrites."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    same = []
    for node in graph.nodes:
        if order[node] >= order[writer] or _storage(node) != _storage(mutated):
            continue
        if (
            node.op != "placeholder"
            and node.meta["val"].shape == mutated.meta["val"].shape
            and (
                node is mutated
                or getattr(node.target, "_schema", None) is None
                or node.target._schema.is_mutable
                or mutated in _chain(node)
            )
        ):
            same.append(node)
        elif any(order[user] > order[writer] for user in node.users):
            raise CaptureError(f"{where(writer)} writes to a tensor of which another view is used later")
    return same


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the in-place operators that take ``node``: what they give is the same tensor."""
    return [user for user in node.users if getattr(getattr(user.target, "_schema", None), "is_mutable", False)]
