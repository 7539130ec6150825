"""The four passes over a captured critic, as plain code over tensors.

Nothing here knows about graphs being written: run on real tensors it computes, run under a ``Recorder`` it leaves
the flat graph. Notation as in the rest of the package: activations a, cotangents δ, tangents t, and β, the
cotangent of the activations that curvature creates.
"""

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from .capture import STOPS_GRADIENT, Captured, CaptureError, first_line, where
from .independence import Dims
from .operators import WITH_RULES, Call, Slot, rule_for
from .operators.base import on_gpu
from .operators.linear import Affine
from .operators.structure import LinearMap

Values = dict[fx.Node, Any]
Label = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Roles:
    """What each node of the critic depends on.

    Attributes:
        sampled: Nodes with a row per sample, or computed from one.
        varying: Nodes that depend on the point at which the gradient is penalised.
        learned: Nodes that depend on a trainable parameter.
    """

    sampled: set[fx.Node]
    varying: set[fx.Node]
    learned: set[fx.Node]

    @classmethod
    def of(cls, captured: Captured) -> "Roles":
        """Follow the graph from its inputs; gradients stop at integers and where autograd was off."""
        sampled, varying, learned = set(captured.sampled), set(captured.samples), set(captured.trainable)
        for node in captured.calls():
            sources = node.all_input_nodes
            if any(source in sampled for source in sources):
                sampled.add(node)
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.is_complex():
                raise CaptureError(f"{where(node)} makes complex numbers, which have no rule")
            if node.meta.get(STOPS_GRADIENT) or (isinstance(value, Tensor) and not value.is_floating_point()):
                continue
            if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
                continue
            if any(source in varying for source in sources):
                varying.add(node)
            if any(source in learned for source in sources):
                learned.add(node)
        return cls(sampled, varying, learned)


@dataclass(frozen=True)
class AffinePrefix:
    """The start of a critic in which every node is affine in the samples.

    What lies between real and fake there is what lies between their values, so for a piecewise-linear critic the
    interpolates themselves are never needed.

    Attributes:
        nodes: In their order.
        ends: Those that others read.
    """

    nodes: list[fx.Node]
    ends: list[fx.Node]


def affine_prefix(captured: Captured, roles: Roles, dims: Dims) -> AffinePrefix:
    """Follow the samples through what is affine in them and keeps them in rows."""
    affine = {captured.x}
    for node in captured.calls():
        sources = [source for source in node.all_input_nodes if source in roles.sampled]
        if not sources or not isinstance(node.target, WITH_RULES) or not set(sources) <= affine:
            continue
        rule, value = rule_for(node.target), node.meta.get("val")
        if not isinstance(rule, Affine | LinearMap) or len(sources) > 1 or dims.get(node) != 0:
            continue
        # A cast to integers is a step, and one to another precision rounds.
        if not isinstance(value, Tensor) or value.dtype != captured.x.meta["val"].dtype:
            continue
        if isinstance(rule, LinearMap) or node.args[0] is sources[0]:
            affine.add(node)
    nodes = [node for node in captured.calls() if node in affine]
    return AffinePrefix(nodes, [node for node in nodes if not set(node.users) <= affine or node in captured.outputs])


class Run:
    """The critic over one set of rows: the value of every node and every call that made one.

    Attributes:
        leading: The values of some nodes without the points, which come last, where these need not be made.
    """

    def __init__(self, captured: Captured, label: Label | None = None) -> None:
        self.captured = captured
        self.values: Values = {}
        self.calls: dict[fx.Node, Call] = {}
        self.leading: Values = {}
        self.label: Label = label or (lambda name: nullcontext())

    def evaluate(self, nodes: Sequence[fx.Node], sampled: set[fx.Node]) -> None:
        """Run ``nodes`` forward, from the values of their inputs."""
        for node in nodes:
            if not isinstance(node.target, WITH_RULES):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
                self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                continue
            call = self.calls[node] = self.call(node, sampled)
            with self.label(node.name), explained(node):
                call.output = self.values[node] = rule_for(node.target).forward(call)

    def call(self, node: fx.Node, sampled: set[fx.Node]) -> Call:
        """Bind the operator of ``node`` to the values of its arguments."""
        slots: dict[fx.Node, Slot] = {}

        def bind(source: fx.Node) -> Any:
            value = self.values[source]
            return slots.setdefault(source, Slot(len(slots))) if isinstance(value, Tensor) else value

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), bind)
        return Call(
            node.target, tuple(args), kwargs, [self.values[s] for s in slots], [s in sampled for s in slots],
            captured=node.meta.get("val"),
        )  # fmt: skip

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes of a call's operands, in the order of its slots."""
        found: dict[fx.Node, None] = {}
        fx.node.map_arg(
            (node.args, dict(node.kwargs)),
            lambda source: found.setdefault(source, None) if isinstance(self.values[source], Tensor) else None,
        )
        return list(found)


class Rows(Run):
    """Some rows of a run: its values sliced on demand.

    Args:
        run: The whole.
        dims: Batch dimension of every node with rows.
        start: First row, as a fraction of the batch given by numerator.
        stop: Behind the last row, likewise.
        total: Denominator of both.
        numbers: Values of the nodes that are plain numbers, for this many rows.
    """

    def __init__(self, run: Run, dims: Dims, start: int, stop: int, total: int, numbers: Values) -> None:
        super().__init__(run.captured, run.label)
        self._run, self._dims, self._numbers = run, dims, numbers
        self._range = (start, stop, total)
        self._lines = run.captured.convolves_lines
        self.values = _Lazy(self._value)
        self.calls = _Lazy(self._call)

    def take(self, node: fx.Node, value: Any) -> Any:
        """Slice a value that lies like that of ``node``."""
        start, stop, total = self._range
        if node not in self._dims or (start, stop) == (0, total):
            return value
        dim = self._dims[node]

        def rows(tensor: Tensor) -> Tensor:
            size = tensor.shape[dim]
            return tensor.narrow(dim, size * start // total, size * (stop - start) // total)

        return tree_map_only(Tensor, rows, value)

    def put(self, node: fx.Node, whole: Tensor, rows: Tensor, leading: Tensor | None = None) -> Tensor:
        """Return ``whole`` with these rows, which come last, replaced; ``leading`` is all before them, where known."""
        start, _, total = self._range
        if start == 0:
            return rows
        dim = self._dims[node]
        if dim == 0 and self._lines and _lies_lifted(whole):
            lifted = None if leading is None else leading.unsqueeze(2)
            return self.put(node, whole.unsqueeze(2), rows.unsqueeze(2), lifted).squeeze(2)
        if leading is not None:
            return torch.cat([leading.to(whole.dtype), rows], dim)
        return torch.cat([whole.narrow(dim, 0, whole.shape[dim] * start // total), rows], dim)

    def scale(self, node: fx.Node, value: Tensor, factors: Tensor) -> Tensor:
        """Multiply these rows by one factor per score."""
        dim = self._dims[node]
        repeats = value.shape[dim] // factors.shape[0]
        factors = factors.repeat_interleave(repeats) if repeats > 1 else factors
        return value * factors.reshape([-1 if d == dim else 1 for d in range(value.dim())]).to(value.dtype)

    def _value(self, node: fx.Node) -> Any:
        value = self._run.values[node]
        if isinstance(value, Tensor | list | tuple):
            return self.take(node, value)
        return self._numbers.get(node, value)

    def _call(self, node: fx.Node) -> Call:
        whole = self._run.calls[node]
        call = self.call(node, {s for s, flag in zip(self._run.operands(node), whole.sampled) if flag})
        if call.op is not whole.op:
            # The rule chose another form of the operator.
            call.op, call.args, call.kwargs = whole.op, whole.args, whole.kwargs
        for i, (source, x) in enumerate(zip(self._run.operands(node), whole.operands)):
            if x is not self._run.values[source]:  # laid out otherwise by the rule
                call.operands[i] = self.take(source, x)
        call.output = self.values[node]
        call.saved = {name: self.take(node, tensor) for name, tensor in whole.saved.items()}
        return call


class _Lazy(dict[fx.Node, Any]):
    def __init__(self, make: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, node: fx.Node) -> Any:
        self[node] = value = self._make(node)
        return value


class explained:  # noqa: N801 (reads as a clause)
    """Turn what a rule raises into a ``CaptureError`` that names the operator and the user's line."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Translate."""
        if isinstance(error, Exception) and not isinstance(error, CaptureError):
            raise CaptureError(f"{where(self.node)} cannot run in four passes: {first_line(error)}") from error


def _lies_lifted(x: Tensor) -> bool:
    """Whether it lies channels-last as images of height 1 do: as 1-D convolutions take it on a CPU."""
    return (
        x.dim() == 3
        and not on_gpu(x)
        and not x.is_contiguous()
        and x.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)
    )


def laid_out(value: Tensor, like: Tensor, lines: bool) -> Tensor:
    """Return ``value`` channels-last where ``like`` is, and not where it is not: to mix the two is slow.

    Args:
        value: What is laid out.
        like: Whose layout it is to have.
        lines: Whether what has three dimensions may lie so, too.
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if value.shape != like.shape:
        return value
    if lines and _lies_lifted(like) != _lies_lifted(value) and (like.is_contiguous() or value.is_contiguous()):
        return laid_out(value.unsqueeze(2), like.unsqueeze(2), lines).squeeze(2)
    if layout is None:
        return value
    either = (torch.contiguous_format, layout)
    ours, theirs = ([x.is_contiguous(memory_format=form) for form in either] for x in (value, like))
    return value if ours == theirs or not any(theirs) else value.contiguous(memory_format=either[theirs.index(True)])


class Cotangents:
    """Cotangents by node of a graph, summed where several consumers contribute."""

    def __init__(self, captured: Captured) -> None:
        self._lines = captured.convolves_lines
        self._sums: dict[Hashable, Any] = {}

    def __contains__(self, node: Hashable) -> bool:
        return node in self._sums

    def get(self, node: Hashable) -> Any:
        """Return the sum so far; None for nothing."""
        return self._sums.get(node)

    def add(self, node: Hashable, value: Tensor | None, like: Any = None) -> None:
        """Add a contribution, in the dtype and layout of the node's own value."""
        if value is None:
            return
        if isinstance(like, Tensor):
            value = laid_out(value.to(like.dtype), like, self._lines)
        self._sums[node] = value if node not in self._sums else self._sums[node] + value

    def pass_on(self, run: Run, node: fx.Node, cotangent: Tensor | None) -> None:
        """Add the cotangent of ``parent[index]`` to that element of the parent's."""
        parent, index = node.args
        if cotangent is None:
            return
        elements = list(self._sums.get(parent) or [None] * len(run.values[parent]))  # type: ignore[arg-type,index]
        elements[index] = cotangent if elements[index] is None else elements[index] + cotangent  # type: ignore[index]
        self._sums[parent] = elements  # type: ignore[index]

    def pull(self, run: Run, node: fx.Node, wanted: Sequence[fx.Node], gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient per wanted operand of ``node``."""
        for source, gradient in zip(wanted, gradients):
            self.add(source, gradient, run.values[source])


Pull = Callable[[list[int], Sequence[Tensor | None]], None]
"""Adds the gradients of the operands with these numbers."""


@dataclass
class Block:
    """Rows of the critic that go through the passes together.

    Attributes:
        run: All the rows.
        loss: The leading rows that only the loss sees; None if there are none.
        points: The trailing rows at which the gradient is penalised; None if there are none.
        lead: The batches that are the leading rows.
        trail: Those that are the trailing ones.
        scores: The outputs whose gradient is penalised.
        factors: Where the loss sees the points too, dL/ds of each; the loss's cotangent there is that times δ.
        seeds: In place of the factors, dL/ds by output, where scores mix samples or are several to each.
    """

    run: Run
    loss: Run | None
    points: Rows | None
    lead: list[str]
    trail: list[str]
    scores: list[fx.Node]
    factors: Tensor | None = None
    seeds: Mapping[fx.Node, Tensor] = field(default_factory=dict)


class FourPasses:
    """Passes 2, 3 and 4 over one block; pass 1 is ``Run.evaluate``."""

    def __init__(self, block: Block, roles: Roles, weight_cotangents: Cotangents) -> None:
        self.block, self.roles, self.shared = block, roles, weight_cotangents
        self.captured = block.run.captured
        self.nodes = [node for node in self.captured.calls() if node in roles.sampled]
        self.before = _before(block.scores)
        self.penalised = self.before | set(block.scores)
        self.delta, self.point_delta = Cotangents(self.captured), Cotangents(self.captured)
        self.tangent: Values = {}
        self.curved: set[str] = set()

    def cotangents(self, seeds: Mapping[fx.Node, Tensor]) -> list[Tensor | None]:
        """Pass 2: carry ``seeds`` (like the outputs) back; returns the input gradient at the points."""
        run, points = self.block.run, self.block.points
        for output, seed in seeds.items():
            self.delta.add(output, seed)
            if output in self.block.scores and output not in self.roles.learned:
                # Without a trainable parameter in it, the critic still has an input gradient.
                self.point_delta.add(output, points.take(output, seed) if points else None)
        for node in reversed(self.nodes):
            if node in self.roles.learned:
                self._back(node, run, self.delta, lambda s: s in self.roles.learned)
                if points is not None:
                    self._back(node, points, self.point_delta, self._only_points, self._point(node))
            elif points is not None:
                self._back(node, points, self.point_delta, self._only_points)
        return [self.point_delta.get(leaf) for leaf in self.captured.samples]

    def _only_points(self, source: fx.Node) -> bool:
        return source in self.roles.varying and source not in self.roles.learned

    def _point(self, node: fx.Node) -> Any:
        """δ of ``node`` at the points."""
        if self.block.points is None:
            return None
        if node in self.delta:
            return self.block.points.take(node, self.delta.get(node))
        return self.point_delta.get(node)

    def _back(
        self,
        node: fx.Node,
        run: Run,
        into: Cotangents,
        chosen: Callable[[fx.Node], bool],
        cotangent: Any = None,
    ) -> None:
        cotangent = into.get(node) if cotangent is None else cotangent
        if cotangent is None:
            return
        if node.target is operator.getitem:
            into.pass_on(run, node, cotangent if chosen(node.args[0]) else None)  # type: ignore[arg-type]
            return
        call = self._call(run, node)
        if call is None:
            return
        operands = run.operands(node)
        wanted = [i for i, s in enumerate(operands) if s in self.roles.sampled and chosen(s)]
        if wanted:
            with run.label(f"delta_{node.name}"), explained(node):
                gradients = rule_for(node.target).vjp(call, cotangent, wanted)
            into.pull(run, node, [operands[i] for i in wanted], gradients)

    @staticmethod
    def _call(run: Run, node: fx.Node) -> Call | None:
        return run.calls[node] if isinstance(node.target, WITH_RULES) else None

    def tangents(self, v: Sequence[Tensor]) -> None:
        """Pass 3: carry ``v`` (like the points) forward through the linearised critic."""
        points = self.block.points
        assert points is not None
        self.tangent.update(zip(self.captured.samples, v))
        for node in self.nodes:
            if node not in self.roles.varying or node not in self.before:
                continue
            if node.target is operator.getitem:
                parent = self.tangent.get(node.args[0])  # type: ignore[arg-type]
                self.tangent[node] = None if parent is None else parent[node.args[1]]
                continue
            call = self._call(points, node)
            if call is None:
                continue
            tangents = self._tangents_of(points, node, call)
            if all(t is None for t in tangents):
                continue
            with points.label(f"tangent_{node.name}"), explained(node):
                tangent = rule_for(node.target).jvp(call, tangents)
            self.tangent[node] = tree_map_only(Tensor, lambda t: t, tangent)

    def _tangents_of(self, points: Rows, node: fx.Node, call: Call) -> list[Tensor | None]:
        tangents = [self.tangent.get(source) for source in points.operands(node)]
        return [
            t.to(x.dtype) if isinstance(t, Tensor) and t.dtype != x.dtype else t
            for t, x in zip(tangents, call.operands)
        ]

    def weights(self) -> None:
        """Pass 4: gradients of the weights, and β from the last curved operator down."""
        beta = self._weights_and_curvature()
        for node in self.captured.trainable:
            if node in self.roles.sampled:
                self._rows_of(node, beta)

    def _rows_of(self, node: fx.Node, beta: Cotangents) -> None:
        """Add the gradient of a further argument with a row per sample, which enters with every batch."""
        points, loss, lead, trail = self.block.points, self.block.loss, self.block.lead, self.block.trail
        shares: list[tuple[list[str], Tensor]] = []
        if node in self.delta:
            delta = self.delta.get(node)
            if points is None:
                shares.append((lead, delta))
            elif loss is not None:
                shares.append((lead, self._loss_rows(node, delta)))
            if points is not None and self.block.factors is not None:
                shares.append((trail, points.scale(node, self._point(node), self.block.factors)))
        if node in beta:
            shares.append((trail, beta.get(node)))
        for names, share in shares:
            for name, part in zip(names, share.chunk(len(names))):
                self.shared.add((node, name), part, part)

    def _weights_and_curvature(self) -> Cotangents:
        beta = Cotangents(self.captured)
        for output, seed in self.block.seeds.items():
            beta.add(output, seed, self.block.run.values[output])
        for node in reversed(self.nodes):
            if node not in self.roles.learned:
                continue
            if node.target is operator.getitem:
                beta.pass_on(self.block.run, node, beta.get(node))
                continue
            call = self._call(self.block.run, node)
            if call is None:
                continue
            operands = self.block.run.operands(node)
            weights = [i for i, s in enumerate(operands) if s not in self.roles.sampled and s in self.roles.learned]
            inner = [i for i, s in enumerate(operands) if s in self.roles.sampled and s in self.roles.learned]
            with self.block.run.label(f"grad_{node.name}"), explained(node):
                if weights and node in self.delta:
                    self._weights(node, call, operands, weights, beta.get(node))
            with self.block.run.label(f"beta_{node.name}"), explained(node):
                if inner and self.block.points is not None and node in self.penalised:
                    self._curvature(node, operands, inner, beta)
        return beta

    def _curvature(self, node: fx.Node, operands: list[fx.Node], inner: list[int], beta: Cotangents) -> None:
        points = self.block.points
        assert points is not None
        call = points.calls[node]
        rule = rule_for(node.target)
        sources = [operands[i] for i in inner]
        tangents = self._tangents_of(points, node, call)
        delta = self._point(node)
        if delta is not None and any(t is not None for t in tangents):
            curvature = rule.second(call, tangents, delta, inner)
            if any(share is not None for share in curvature):
                self.curved.add(str(node.target))
            beta.pull(points, node, sources, curvature)
        if node in beta:
            beta.pull(points, node, sources, rule.vjp(call, beta.get(node), inner))

    def _weights(self, node: fx.Node, call: Call, operands: list[fx.Node], weights: list[int], beta: Any) -> None:
        """Add the gradients of a node's weights, for loss and penalty together where one VJP serves both."""
        rule, delta = rule_for(node.target), self.delta.get(node)

        def pull(chosen: list[int], gradients: Sequence[Tensor | None]) -> None:
            self.shared.pull(self.block.run, node, [operands[i] for i in chosen], gradients)

        if self.block.points is None or node not in self.penalised:
            pull(weights, rule.vjp(call, delta, weights))
            return
        data = call.slot(rule.data) if rule.data else None
        tangents = self._tangents_of(self.block.points, node, self.block.points.calls[node])
        linear = [i for i in weights if data is not None and i == call.slot("weight")]
        if linear and tangents[data] is not None and call.operands[data].shape[0] != 0:  # type: ignore[index]
            tangent: Tensor = tangents[data]  # type: ignore[assignment,index]
            if beta is not None:
                self._linear_and_curved(node, call, (linear, weights), data, tangent, beta, pull)  # type: ignore[arg-type]
                return
            joined = self._with_tangent(call, operands[data], data, tangent)  # type: ignore[index,arg-type]
            pull(linear, rule.vjp(joined, delta, linear))
            others = [i for i in weights if i not in linear]
        else:
            others = weights
        self._apart(node, others, [] if linear else tangents, pull)
        if beta is not None:
            pull(weights, rule.vjp(self.block.points.calls[node], beta, weights))

    def _linear_and_curved(
        self,
        node: fx.Node,
        call: Call,
        weights: tuple[list[int], list[int]],
        data: int,
        tangent: Tensor,
        beta: Tensor,
        pull: Pull,
    ) -> None:
        """Put the curvature's cotangent where the penalty's was: the rest is an ordinary backward pass."""
        points, rule, (linear, all_of_them) = self.block.points, rule_for(node.target), weights
        assert points is not None
        point_delta = self._point(node)
        pull(linear, rule.vjp(points.calls[node].with_operand(data, tangent), point_delta, linear))
        if self.block.factors is not None:
            beta = points.scale(node, point_delta, self.block.factors) + beta
        pull(all_of_them, rule.vjp(call, points.put(node, self.delta.get(node), beta), all_of_them))

    def _with_tangent(self, call: Call, source: fx.Node, data: int, tangent: Tensor) -> Call:
        """One VJP serves loss and penalty: the tangent stands where the points were."""
        points = self.block.points
        assert points is not None
        if self.block.factors is not None:
            tangent = points.scale(source, points.take(source, call.operands[data]), self.block.factors) + tangent
        leading = self.block.run.leading.get(source)
        return call.with_operand(data, points.put(source, call.operands[data], tangent, leading))

    def _apart(self, node: fx.Node, weights: list[int], tangents: Sequence[Tensor | None], pull: Pull) -> None:
        """Add the loss's share, the share of the points that the loss sees too, and the penalty's."""
        points, loss, rule = self.block.points, self.block.loss, rule_for(node.target)
        assert points is not None
        if not weights:
            return
        call, delta = points.calls[node], self._point(node)
        if loss is not None:
            pull(weights, rule.vjp(loss.calls[node], self._loss_rows(node, self.delta.get(node)), weights))
        if self.block.factors is not None:
            pull(weights, rule.vjp(call, points.scale(node, delta, self.block.factors), weights))
        if any(t is not None for t in tangents):
            pull(weights, rule.second(call, tangents, delta, weights))

    def _loss_rows(self, node: fx.Node, value: Tensor) -> Tensor:
        return self.block.loss.take(node, value) if isinstance(self.block.loss, Rows) else value


def _before(outputs: list[fx.Node]) -> set[fx.Node]:
    """Find what some outputs are computed from."""
    pending, found = list(outputs), set[fx.Node]()
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def shared_gradients(run: Run, nodes: Iterator[fx.Node], learned: set[fx.Node], into: Cotangents) -> None:
    """Carry the cotangents of values that no sample enters back to the parameters, by the ordinary chain rule."""
    for node in nodes:
        if node not in learned or node not in into:
            continue
        if node.target is operator.getitem:
            into.pass_on(run, node, into.get(node))
            continue
        call, operands = run.calls[node], run.operands(node)
        wanted = [i for i, source in enumerate(operands) if source in learned]
        with run.label(f"grad_{node.name}"), explained(node):
            gradients = rule_for(node.target).vjp(call, into.get(node), wanted)
        into.pull(run, node, [operands[i] for i in wanted], gradients)


def penalty_seed(
    gradient: Sequence[Tensor], *, weight: float, target: float, one_sided: bool, group_size: int
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Turn the input gradient into what pass 3 starts from.

    Args:
        gradient: g ``[N, *D]``, in each of the samples' tensors.
        weight: w.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        group_size: Samples that share one norm.

    Returns:
        v = (w/N) ψ'(‖g‖) g/‖g‖ ``[N, *D]`` (0 where g = 0) in each, the penalty, the mean norm, and the norms ``[N]``.
    """
    joined = gradient[0] if len(gradient) == 1 else torch.cat([g.flatten(1) for g in gradient], 1)
    penalty, mean_norm, norms, v = torch.ops.wgan_fast.gradient_norm_penalty(
        joined, weight, target, one_sided, group_size
    )
    if len(gradient) == 1:
        return [v], penalty, mean_norm, norms
    parts = v.split([g[0].numel() for g in gradient], 1)
    return [part.reshape(g.shape).to(g.dtype) for part, g in zip(parts, gradient)], penalty, mean_norm, norms


def number_values(values: Mapping[fx.Node, Any]) -> Values:
    """Return the values that are plain numbers, such as sizes."""
    return {node: value for node, value in values.items() if not isinstance(value, Tensor | list | tuple)}
