"""Notes which ``autograd.Function`` Dynamo writes down while it traces a forward, and finds what that reads besides."""

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.autograd import Function

from ..four_pass.capture import CaptureError
from ..four_pass.functions import NOTE, Note, is_function
from ..four_pass.operators import Slot


class _Open(threading.local):
    """The functions that this thread is tracing, one inside of the other."""

    def __init__(self) -> None:
        self.notes: list[Note] = []


_open = _Open()


@contextmanager
def noted() -> Iterator[None]:
    """Have Dynamo leave a ``Note`` with every function that it writes down; without one it is left to autograd."""
    dynamo = torch._dynamo
    around: list[tuple[Any, str, Any]] = [
        (getattr(dynamo.variables.misc, "AutogradFunctionVariable", None), "call_apply", _noting),
        (dynamo.side_effects.SideEffects, "check_allowed_side_effect", _watching),
    ]
    known = hasattr(dynamo.variables.base, "is_side_effect_safe") and all(hasattr(o, name) for o, name, _ in around)
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in around] if known else []
    for (owner, name, method), (_, _, wrap) in zip(kept, around):
        setattr(owner, name, wrap(method))
    try:
        yield
    finally:
        for owner, name, method in kept:
            setattr(owner, name, method)


def _noting(apply: Callable[..., Any]) -> Callable[..., Any]:
    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        note = Note(self.fn_cls)
        for outer in _open.notes:
            outer.within.append(self.fn_cls)
        _open.notes.append(note)
        try:
            result = apply(self, tx, args, kwargs)
        finally:
            _open.notes.pop()
        nodes = reversed(tx.output.current_tracer.graph.nodes)
        node = next((node for node in nodes if is_function(node)), None)
        if node is not None and NOTE not in node.meta:
            node.meta[NOTE] = note
            try:
                body = tx.output.nn_modules[node.args[0].target]
                note.arguments = None if kwargs else _arguments(args, node, body.graph.find_nodes(op="placeholder"))
            except Exception:
                # Something of which Dynamo makes no argument, an object say.
                note.arguments = None
        return result

    return call_apply


def _arguments(variables: Any, node: fx.Node, inner: list[fx.Node]) -> tuple[Any, ...]:
    """Return what a function is given, with slots for the arguments of the node and for the body's, which are these."""
    places: dict[Any, int] = {**{n: i for i, n in enumerate(inner, 2)}, **{n: i for i, n in enumerate(node.args)}}

    def slot(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Proxy):
            return leaf
        if leaf.node.target != "item":
            return Slot(places[leaf.node])
        place = places[leaf.node.args[0]]
        source: Any = node.args[place]
        assert source.meta["grapharg"].pass_arg_as_tensor, "a Python number that has become an input"
        return Slot(place)

    return tuple(
        v.as_python_constant() if v.is_python_constant() else fx.node.map_aggregate(v.as_proxy(), slot)
        for v in variables
    )


def _watching(check: Callable[..., Any]) -> Callable[..., Any]:
    def check_allowed_side_effect(self: Any, item: Any) -> Any:
        own = type(item).__name__ == "AutogradFunctionContextVariable"
        if _open.notes and not own and not torch._dynamo.variables.base.is_side_effect_safe(item.mutation_type):
            for note in _open.notes:
                note.changes = True
        return check(self, item)

    return check_allowed_side_effect


def unguarded(graph: fx.GraphModule) -> Iterator[tuple[Any, str, Any]]:
    """Find what double backward reads by the functions that a backward applies: Dynamo sees no more than their forward.

    Yields:
        Owners, names of their attributes, and what these are.

    Raises:
        CaptureError: Such a function reads what may change without being replaced.
    """
    for note in [node.meta[NOTE] for node in graph.graph.nodes if NOTE in node.meta]:
        yield note.function, "forward", note.function.forward
        yield note.function, "backward", note.function.backward
        seen: set[Any] = set()
        for function in note.within:
            yield function, "backward", function.backward
            yield from _reads(function.backward, seen)


def _reads(function: Any, seen: set[Any]) -> Iterator[tuple[Any, str, Any]]:
    if function in seen:
        return
    seen.add(function)
    module = sys.modules[function.__globals__["__name__"]]
    if vars(module) is not function.__globals__:
        raise CaptureError(f"{function.__qualname__} reads what belongs to no module, and may change unnoticed")
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    names = {name for code in codes for name in code.co_names if name in vars(module)}
    read = [(module, name) for name in names if not _is_known(module)]
    for owner, name in [*read, *[(cell, "cell_contents") for cell in function.__closure__ or ()]]:
        value = getattr(owner, name)
        yield owner, name, value
        if isinstance(value, type) and issubclass(value, Function):
            yield value, "forward", value.forward
            yield from _reads(value.forward, seen)
        elif isinstance(value, types.FunctionType) and not _is_known(value):
            yield from _reads(value, seen)
        elif type(value) not in _FIXED and not _is_known(value):
            raise CaptureError(f"{function.__qualname__} reads {value!r:.80}, which may change unnoticed")


_FIXED = {bool, int, float, str, type(None), torch.dtype, torch.device}


def _is_known(value: Any) -> bool:
    """Whether a module, a function or a class is PyTorch's, or the module of numbers."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in ("torch", "math")
    code = isinstance(value, type | types.FunctionType | types.BuiltinFunctionType)
    return code and str(value.__module__).partition(".")[0] in ("torch", "math")
