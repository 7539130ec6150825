"""Captures a critic as a graph of high-level ATen operators with ``torch.export``.

What the graph says is made plain on the way: in-place operators on activations become their functional forms,
blocks under ``no_grad`` are inlined and marked, and inputs are sorted into parameters, buffers, constants and the
critic's own arguments.
"""

import copy
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_unflatten

from ..checks import check_scores
from .record import functional_form

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
_ASSERTIONS = ("_assert", "sym_constrain_range")


class CaptureError(RuntimeError):
    """The critic cannot run in four passes; the message says which operator, where and why."""


@dataclass
class Captured:
    """A critic as a graph.

    Attributes:
        graph: Placeholders, then ATen operators, then one output: the scores.
        parameters: Placeholder to qualified parameter name.
        buffers: Placeholder to qualified buffer name.
        constants: Placeholder to the tensor it stands for.
        inputs: Placeholders of the flattened ``(args, kwargs)``, in order.
        dynamic: Whether the graph holds for other batch sizes.
        written: The attributes that the critic's forward writes: the module's id and the attribute's name.
    """

    graph: fx.Graph
    parameters: dict[fx.Node, str] = field(default_factory=dict)
    buffers: dict[fx.Node, str] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    dynamic: bool = True
    written: set[tuple[int, str]] = field(default_factory=set)

    @property
    def scores(self) -> fx.Node:
        """The node of the critic's output."""
        return self.graph.output_node().args[0]  # type: ignore[return-value]

    def calls(self) -> list[fx.Node]:
        """Every operator in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


def where(node: fx.Node) -> str:
    """Describe a node for an error message: its operator and the user's source line."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [
        i for i, line in enumerate(trace) if line.strip().startswith("File ") and "/torch/" not in line.split(",")[0]
    ]
    source = " ".join(line.strip() for line in trace[frames[-1] : frames[-1] + 2]) if frames else ""
    return f"{node.target}" + (f" at {source}" if source else "")


_NOT_THE_CRITIC = tuple(map(os.path.dirname, (torch.__file__, __file__)))
_STANDARD_LIBRARY = os.path.dirname(os.__file__)


def first_line(error: BaseException) -> str:
    """What an exception says, short enough for a message."""
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


def capture(critic: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Captured:
    """Capture ``critic(*args, **kwargs)``.

    Args:
        critic: The module.
        args: Example positional arguments; the first is the batch ``[N, *D]``. Tensors whose first dimension is N
            are taken to have one row per sample.
        kwargs: Example keyword arguments.

    Raises:
        CaptureError: The critic branches on data, mutates its activations through views, or changes what flows
            backward through it.
        TypeError: The critic does not return a tensor.
    """
    written = _try_on(critic, args, kwargs)
    try:
        program, dynamic = _export(critic, args, dict(kwargs), dynamic=True), True
    except Exception:
        try:
            program, dynamic = _export(critic, args, dict(kwargs), dynamic=False), False
        except Exception as error:
            raise CaptureError(
                f"torch.export could not capture the critic{raised_at(error)}: {first_line(error)}"
            ) from error
    captured = Captured(fx.Graph(), dynamic=dynamic, written=written)
    env: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for spec, node in zip(program.graph_signature.input_specs, placeholders):
        new = env[node] = captured.graph.node_copy(node)
        if spec.kind == InputKind.PARAMETER:
            captured.parameters[new] = spec.target
        elif spec.kind == InputKind.BUFFER:
            captured.buffers[new] = spec.target
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            captured.constants[new] = program.constants[spec.target]
        elif spec.kind == InputKind.USER_INPUT:
            captured.inputs.append(new)
        else:
            raise CaptureError(f"the critic holds a {spec.kind.name.lower()} ({spec.target}), which has no rule")
    outputs = _inline(program.graph_module, captured.graph, env, stops_gradient=False)
    scores = tree_unflatten(outputs, program.call_spec.out_spec)
    if not isinstance(scores, fx.Node):
        check_scores(scores, args[0])
    captured.graph.output(scores)
    return captured


def _try_on(critic: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[tuple[int, str]]:
    """Run a copy of the critic without data, for what a capture would not see.

    Returns:
        The attributes that its forward writes: the module's id and the attribute's name.

    Raises:
        CaptureError: Its backward pass is not what its forward pass says, or its forward pass counts.
    """
    for name, module in critic.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(f"module {name or 'critic'} has backward hooks, which four passes would not call")
    mode, hooks = FakeTensorMode(allow_non_fake_inputs=True), _TensorHooks()

    def stand_in(x: Tensor) -> Tensor:
        return mode.from_tensor(x.detach(), static_shapes=True).requires_grad_(x.is_floating_point())

    try:
        with _quiet(), torch.enable_grad(), mode, hooks:
            given, named = tree_map_only(Tensor, stand_in, (args, dict(kwargs)))
            # Tensors that a module simply holds cannot be copied under the mode, nor those with a graph at all.
            held = {id(x): mode.from_tensor(x.detach(), static_shapes=True) for x in _held(critic)}
            twin = copy.deepcopy(critic, held)
            states = [list(map(plain_attributes, twin.modules()))]
            calls = []
            # The first call may also fill what the critic keeps.
            for _ in range(3):
                with _Calls() as recorded:
                    scores = twin(*given, **named)
                calls.append(recorded.made)
                states.append(list(map(plain_attributes, twin.modules())))
    except Exception:
        # What does not run without data is not captured either, for a reason that the export words better.
        return set()
    if hooks.found:
        raise CaptureError("the critic registers a hook on a tensor's gradient, which four passes would not call")
    pending, seen = [getattr(scores, "grad_fn", None)], set[Any]()
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if isinstance(function, BackwardCFunction):
            raise CaptureError(
                f"the critic calls {type(function).__name__.removesuffix('Backward')}, an "
                "autograd.Function with a backward of its own"
            )
        pending.extend(source for source, _ in function.next_functions)
    if calls[1] != calls[2]:
        raise CaptureError("the critic's forward computes something else at every call, with numbers that it changes")
    return {
        (id(module), name)
        for module, before, after in zip(critic.modules(), states[0], states[-1])
        for name, value in after.items()
        if before.get(name, ...) != value
    }


def plain_attributes(module: nn.Module) -> dict[str, Hashable]:
    """What a module holds itself: numbers, flags and names, lists and dictionaries of them, and which tensors."""
    found: dict[str, Hashable] = {}
    for name, value in module.__dict__.items():
        if name in _INHERITED:
            continue
        kind = type(value)
        if kind in _PLAIN:
            found[name] = value
        elif kind in _SEQUENCES and _PLAIN.issuperset(map(type, value)):
            found[name] = tuple(value)
        elif kind is dict and _PLAIN.issuperset(map(type, value.values())):
            found[name] = tuple(value.items())
        elif isinstance(value, Tensor):
            found[name] = id(value)
    return found


def _held(critic: nn.Module) -> list[Tensor]:
    """The tensors that are attributes of modules, or in their lists, and neither parameters nor buffers."""
    own = [value for module in critic.modules() for name, value in vars(module).items() if name not in _INHERITED]
    return [leaf for leaf in tree_leaves(own) if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]


_INHERITED = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = {bool, int, float, str, type(None), torch.dtype}
_SEQUENCES = {tuple, list}


class _TensorHooks(TorchFunctionMode):
    """Notices hooks on the gradients of tensors."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook)
        return func(*args, **(kwargs or {}))


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which operators run, with which numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func, [x for x in tree_leaves((args, kwargs)) if not isinstance(x, Tensor)]))
        return func(*args, **(kwargs or {}))


def _export(critic: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Any:
    rows = args[0].shape[0]

    def shape(leaf: Any) -> Any:
        per_sample = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows
        return {0: torch.export.Dim.AUTO} if per_sample else None

    shapes: Any = None
    if dynamic:
        shapes_args, shapes_kwargs = tree_map(shape, (args, kwargs))
        shapes = dict(inspect.signature(critic.forward).bind(*shapes_args, **shapes_kwargs).arguments)
        shapes |= shapes.pop("kwargs", {}) if "kwargs" not in kwargs else {}
    detached = tree_map_only(Tensor, lambda t: t.detach(), (args, kwargs))
    with _quiet(), torch.enable_grad():
        return torch.export.export(critic, detached[0], detached[1], dynamic_shapes=shapes, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch prints about a critic that it cannot export: the ``CaptureError`` says it."""
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            log.setLevel(level)


def _inline(module: fx.GraphModule, graph: fx.Graph, env: dict[fx.Node, fx.Node], stops_gradient: bool) -> Any:
    """Copy the nodes of ``module`` into ``graph``; returns what its output node maps to."""
    tuples: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        return tuples[node] if node in tuples else env[node]

    for node in module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.node.map_arg(node.args[0], value)
        if node.op == "get_attr":
            attribute = module.get_submodule(node.target) if hasattr(module, node.target) else None
            if not isinstance(attribute, fx.GraphModule):
                raise CaptureError(f"the critic closes over {node.target}, which has no rule")
            continue
        name = getattr(node.target, "__name__", str(node.target))
        if name == "wrap_with_set_grad_enabled":
            enabled, submodule, *operands = node.args
            body = module.get_submodule(submodule.target)
            inner = [n for n in body.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
            scope = {n: value(operand) for n, operand in zip(inner, operands)}
            tuples[node] = _inline(body, graph, scope, stops_gradient or not enabled)  # type: ignore[arg-type]
        elif name == "getitem" and node.args[0] in tuples:
            tuples[node] = tuples[node.args[0]][node.args[1]]
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"{where(node)} is a higher-order operator, which has no rule")
        elif not name.startswith(_ASSERTIONS):
            written = _written(node)
            lasting = written is not None and _is_buffer(written, module.graph)
            new = graph.node_copy(node, value)
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
                new = graph.call_function(torch.ops.aten.copy_.default, (value(written), new))
                new.meta = dict(node.meta)
                made.append(new)
            if stops_gradient or _DETACHING & {node.target, made[0].target}:
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


def _is_buffer(node: fx.Node, graph: fx.Graph) -> bool:
    """Whether ``node`` is a parameter or buffer, or a view of one: updates of those are meant to last."""
    return _storage(node) in {_storage(n) for n in graph.nodes if n.op == "placeholder" and not _is_argument(n)}


def _is_argument(placeholder: fx.Node) -> bool:
    return not placeholder.name.startswith(("p_", "b_", "c_"))


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
    """The tensors that ``node`` is, followed through in-place operators."""
    return [user for user in node.users if getattr(getattr(user.target, "_schema", None), "is_mutable", False)]
