"""Writes down every ATen operator that runs under it, as one flat FX graph.

The passes are ordinary Python over tensors; running them on fake tensors under a ``Recorder`` turns them into a
graph that needs neither the passes nor autograd. Equal calls are recorded once.
"""

import operator
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from .stand_ins import evaluate

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}
"""Operators that return their argument: what they return is the argument's node."""

_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.expand.default}
"""Operators that return an alias of their argument where it has the shape asked for."""

_REDUCTIONS = {torch.ops.aten.mean.default, torch.ops.aten.sum.default}
"""Operators that say the same with and without the dtype of their argument."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that appends to ``graph`` what it sees.

    Attributes:
        graph: The graph being written.
        constants: Tensors that the recorded code closes over, by attribute name.
        label: Name given to the nodes recorded from here on.
        piece: Which piece of the step these nodes are in: between pieces, somebody else computes.
        segment: Where these nodes run, in this piece: the graph is ordered by segment, as far as its data flow allows.
        cuts: What each piece but the last gives.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.label = ""
        self.piece = 0
        self.segment = (0, 0)
        self.cuts: list[Any] = []
        self.given_away: list[bool] = []
        # Fake tensors own no memory; holding them keeps their ids from being reused.
        self._seen: dict[int, tuple[Tensor, fx.Node]] = {}
        self._calls: dict[Hashable, fx.Node] = {}
        self._owners: dict[int, set[fx.Node]] = {}

    def input(self, name: str, example: Tensor) -> Tensor:
        """Add a graph input that looks like ``example``; returns its stand-in."""
        with _disable_current_modes():
            if self.fake.is_our_fake(example):
                with self.fake:
                    fake = torch.empty_strided(
                        example.shape, example.stride(), dtype=example.dtype, device=example.device
                    )
            else:
                fake = self.fake.from_tensor(example, static_shapes=True).detach()
        self._bind(fake, self.graph.placeholder(name))
        return fake

    def numbers(self, *names: str) -> dict[str, fx.Node]:
        """Add graph inputs that are Python numbers."""
        made = {name: self.graph.placeholder(name) for name in names}
        for node in made.values():
            node.meta.update(val=1.0, segment=self.segment)
        return made

    def constant(self, name: str, value: Tensor) -> Tensor:
        """Add a tensor that the graph owns; returns its stand-in."""
        name = f"constant_{name}".replace(".", "_")
        fake = self.fake.from_tensor(value, static_shapes=True).detach()
        self.constants[name] = value
        self._bind(fake, self.graph.get_attr(name))
        return fake

    def cut(self, values: Any, *, given_away: bool = False) -> None:
        """End a piece, which gives ``values``, a nest of tensors; inputs from here on are of the next one.

        Args:
            values: What whoever computes between the pieces may read, and nobody else writes to.
            given_away: Whether they may be written to.
        """
        self.cuts.append(values)
        self.given_away.append(given_away)
        self.piece += 1
        self.segment = (self.piece, 0)

    def output(self, values: Any) -> None:
        """Close the graph: ``values`` is a nest of tensors and None; before it come those of the cuts."""
        self.graph.output(tree_map_only(Tensor, self.node, (*self.cuts, values)))

    def node(self, tensor: Tensor) -> fx.Node:
        """Return the node that computes ``tensor``."""
        if id(tensor) not in self._seen:
            if self.fake.is_our_fake(tensor):
                raise RuntimeError(f"a tensor of shape {list(tensor.shape)} was made outside the recording")
            self._bind(tensor, self._lift(tensor))
        return self._seen[id(tensor)][1]

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Name the nodes recorded inside the block."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta.setdefault("val", tensor)
        node.meta.setdefault("segment", self.segment)
        self._owners.setdefault(tensor.untyped_storage()._cdata, set()).add(node)
        self._seen[id(tensor)] = (tensor, node)

    def _lift(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self.graph.get_attr(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on the fake tensors and record it."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return evaluate(self.fake, func, args, kwargs)
        if func in _REDUCTIONS and kwargs.get("dtype") == args[0].dtype:
            kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
        if func in _ALIASES or (func in _RESHAPES and list(args[0].shape) == list(args[1])):
            out = evaluate(self.fake, func, args, kwargs)
            self._bind(out, self.node(args[0]))
            return out
        node_args, node_kwargs = tree_map_only(Tensor, self.node, (args, kwargs))
        out = evaluate(self.fake, func, args, kwargs)
        leaves, _ = tree_flatten(out)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return out
        if func._schema.is_mutable:
            return self._mutate(func, args, out, node_args, node_kwargs)
        repeatable = torch.Tag.nondeterministic_seeded not in func.tags
        key = (func, repr((node_args, node_kwargs)))
        node = self._calls.get(key) if repeatable else None
        # A node of a later segment would pull that segment, and its buffer updates, before this one.
        if node is None or node.meta["segment"] > self.segment:
            node = self.graph.create_node("call_function", func, node_args, node_kwargs, name=self.label or None)
            if repeatable:
                self._calls[key] = node
        self._bind_all(out, node)
        return out

    def _mutate(self, func: Any, args: Any, out: Any, node_args: Any, node_kwargs: Any) -> Any:
        """Record an in-place operator: in its functional form where nothing else shares the memory."""
        target = args[0]
        functional = functional_form(func)
        storage = target.untyped_storage()._cdata
        private = target._base is None and self._owners.get(storage, set()) <= {self.node(target)}
        if functional is not None and private and self.node(target).op == "call_function":
            node = self.graph.create_node("call_function", functional, node_args, node_kwargs, name=self.label or None)
            self._owners[storage] = set()
        else:
            node = self.graph.create_node("call_function", func, node_args, node_kwargs, name=self.label or None)
            stale = self._owners.get(storage, set())
            for key in [key for key, made in self._calls.items() if made in stale or stale & set(made.all_input_nodes)]:
                del self._calls[key]
        self._bind_all(out, node)
        return out

    def _bind_all(self, out: Any, node: fx.Node) -> None:
        node.meta.setdefault("segment", self.segment)
        if isinstance(out, Tensor):
            self._bind(out, node)
            return
        node.meta.setdefault("val", out)
        for i, leaf in enumerate(out):
            if isinstance(leaf, Tensor):
                self._bind(leaf, self._element(node, i))

    def _element(self, node: fx.Node, i: int) -> fx.Node:
        key = (node, i)
        if key not in self._calls:
            self._calls[key] = self.graph.create_node(
                "call_function", operator.getitem, (node, i), name=f"{node.name}_{i}"
            )
        return self._calls[key]


def functional_form(func: Any) -> Any:
    """Return the operator that computes what an in-place or ``out=`` one writes; None where there is none."""
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
    taken = _signature(func, without_out=True)
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        makes = not candidate._schema.is_mutable and not any(out.alias_info for out in candidate._schema.returns)
        if makes and _signature(candidate) == taken:
            return candidate
    return None


def _signature(func: Any, without_out: bool = False) -> list[tuple[str, str, str]]:
    # With the defaults: a call that leaves bernoulli_'s p to its default cannot be one of bernoulli.p.
    arguments = [argument for argument in func._schema.arguments if not (without_out and argument.is_out)]
    return [(argument.name, str(argument.type), repr(argument.default_value)) for argument in arguments]
