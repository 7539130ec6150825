"""Programs: a flat graph of float32 matrices, written down for ``wgan_fast::run_program``.

What a plan of few, small operators costs is the host, fresh memory, and passes over memory that do nothing but
multiply by a mask. A program is the same graph as instructions over memory that was planned once: products, with what
follows them element by element applied to each tile as it is made. The graph is its truth: an operator that is not
written down here leaves the graph to PyTorch.
"""

import math
import operator
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.run_program import AVAILABLE, BF16
from .capture import first_line
from .optimize import readers_of
from .stand_ins import gives_view

aten = torch.ops.aten

# In the order of csrc/tiles.cpp and csrc/program.h.
(
    COPY, ADD, MULTIPLY, DIVIDE, SCALE, LEAKY_RELU, RELU, LEAKY_RELU_BACKWARD, THRESHOLD_BACKWARD, MASK,
    LERP, ADD_RELU, ADD_LEAKY_RELU, SIGNS, GATE, GATE_LEAKY,
) = range(16)  # fmt: skip
_AFTER_SUM = {RELU: ADD_RELU, LEAKY_RELU: ADD_LEAKY_RELU}
"""What becomes of an activation that overwrites a sum: both in one."""
KERNEL, SUM, NORM_PENALTY, DRAW = range(4)
ARENA = 0
MOST_BF16 = 1.5e9
"""FLOPs of a graph in bfloat16 from which on oneDNN's products, one by one, are faster. Measured on Zen 4, the time of
oneDNN's to that of programs: 1.5 at 0.17e9, 1.7 at 0.48e9, 0.97 at 2.7e9, 0.82 at 6.6e9."""
PANEL, KEPT_DEPTH, FEW_ROWS = 32, 2560, 128
"""Columns of a product's tile, at most; depth up to which a right side that products share is kept, laid out; rows up
to which a product reads its right side where it lies."""


class UnwrittenError(Exception):
    """A graph has something that programs do not have."""


@dataclass(eq=False)
class Buffer:
    """Memory of a program.

    Attributes:
        numel: Floats in it.
        base: Number of an input's or output's memory; ``ARENA`` for planned memory.
        ready: The last instruction that writes to it; -1 for what is given.
        offset: Where it lies in planned memory.
        within: The buffer, and the offset there, that it became part of.
    """

    numel: int
    base: int = ARENA
    ready: int = -1
    offset: int = 0
    within: "tuple[Buffer, int] | None" = None

    def resolved(self) -> "tuple[Buffer, int]":
        """Return the buffer whose memory it is, and where it starts in that."""
        if self.within is None:
            return self, 0
        buffer, start = self.within[0].resolved()
        return buffer, start + self.within[1]


@dataclass(eq=False)
class View:
    """A tensor in a buffer: ``like`` is on the meta device, with its shape, strides and offset.

    Attributes:
        kernel: The kernel that makes exactly this matrix, and so may go on with it tile by tile.
    """

    buffer: Buffer
    like: Tensor
    kernel: "Kernel | None" = None

    def viewed(self, function: Callable[[Tensor], Tensor]) -> "View":
        """Apply an operator that returns a view."""
        return View(self.buffer, function(self.like))

    def matrix(self, shape: Sequence[int]) -> "Matrix":
        """Return it, broadcast to a shape, as a matrix of rows and columns."""
        like, first = self.like.expand(shape), 0 if len(shape) < 2 else 1
        strides = [_one_stride(like.shape[part], like.stride()[part]) for part in (slice(first), slice(first, None))]
        return Matrix(self.buffer, int(self.like.storage_offset()), *strides)


@dataclass
class Matrix:
    """Where the elements of a matrix lie; strides in elements."""

    buffer: Buffer
    offset: int
    row: int
    column: int

    def turned(self) -> "Matrix":
        """Return its transpose."""
        return Matrix(self.buffer, self.offset, self.column, self.row)

    def words(self) -> list[int]:
        """Write it down."""
        buffer, start = self.buffer.resolved()
        return [buffer.base, buffer.offset + start + self.offset, self.row, self.column]


@dataclass
class Joined:
    """Tensors that follow each other along the first dimension, not yet in one memory."""

    parts: list[View]


@dataclass
class Bits:
    """A random mask of rows, times a scale."""

    view: View
    scale: float = 1.0


@dataclass
class Statement:
    """``to = code(*sources)`` with numbers."""

    code: int
    to: Matrix
    sources: list[Matrix]
    numbers: list[float]

    def words(self) -> list[int]:
        """Write it down."""
        empty = [0, 0, 0, 0]
        sources = [source.words() for source in self.sources] + [empty] * (3 - len(self.sources))
        numbers = [*self.numbers, 0.0, 0.0][:2]
        return [self.code, *self.to.words(), *chain(*sources), *map(_word, numbers)]


@dataclass(eq=False)
class Kernel:
    """A matrix: a product, if it has segments (left, right, depth), and what is made of it.

    Attributes:
        kept: Whether the right side as it is laid out for products is kept in ``right``: 0 for not, 1 for the first
            product with it, 2 for a later one.
        bf16: Whether what is multiplied is rounded to bfloat16.
    """

    shape: Sequence[int]
    rows: int
    columns: int
    to: Matrix | None = None
    segments: list[tuple[Matrix, Matrix, int]] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    bf16: bool = False
    kept: int = 0
    right: Matrix | None = None

    def words(self) -> list[int]:
        """Write it down."""
        segments = chain(*[[*a.words(), *b.words(), depth] for a, b, depth in self.segments])
        statements = chain(*[statement.words() for statement in self.statements])
        to, right = ([0, 0, 0, 0] if place is None else place.words() for place in (self.to, self.right))
        counts = [len(self.segments), len(self.statements)]
        head = [self.rows, self.columns, *to, int(self.bf16), self.kept, *right, *counts]
        return [KERNEL, *head, *segments, *statements]

    def flops(self) -> int:
        """Count those of its product."""
        return 2 * self.rows * self.columns * sum(depth for *_, depth in self.segments)

    def turn_if_narrow(self) -> None:
        """Write a product of few columns down as its transpose: what would be laid out is then read where it lies."""
        narrow = self.columns <= FEW_ROWS < self.rows and not (self.statements or self.kept or self.bf16)
        if self.to is None or not narrow or any(left.row != 1 or depth == 1 for left, _, depth in self.segments):
            return
        self.rows, self.columns, self.to = self.columns, self.rows, self.to.turned()
        self.segments = [(right.turned(), left.turned(), depth) for left, right, depth in self.segments]

    def matrices(self) -> Iterator[Matrix]:
        """Yield all that it touches."""
        yield from (place for place in (self.to, self.right) if place is not None)
        for left, right, _ in self.segments:
            yield from (left, right)
        for statement in self.statements:
            yield from (statement.to, *statement.sources)


@dataclass
class Other:
    """Any other instruction; what is a ``Matrix`` in it is written down as such."""

    kind: int
    fields: list[Any]

    def words(self) -> list[int]:
        """Write it down."""
        return [self.kind, *chain(*[f.words() if isinstance(f, Matrix) else [f] for f in self.fields])]

    def matrices(self) -> Iterator[Matrix]:
        """Yield all that it touches."""
        return (field for field in self.fields if isinstance(field, Matrix))


class Program:
    """A graph that has been written down.

    Args:
        words: What ``wgan_fast::run_program`` takes.
        given: What it is given besides: the graph's inputs by position, with their strides, and constants.
        structure: What the graph returns, as Python over ``out`` and, for views of what it is given, ``tensors``.
        numbers: Positions of the penalty's weight and target among the inputs; none without a penalty.
        draws: Whether it draws random numbers: its own, seeded by PyTorch's default generator.
    """

    def __init__(
        self,
        words: list[int],
        given: list[tuple[int, tuple[int, ...]] | Tensor],
        structure: str,
        numbers: list[int],
        draws: bool,
    ) -> None:
        self._words = torch.tensor(words, dtype=torch.int64, device="cpu")
        self._numbers = numbers
        self._inputs = [source for source in given if not isinstance(source, Tensor)]
        self._constants = [source for source in given if isinstance(source, Tensor)]
        self._draws = draws
        self._arrange: Callable[..., Any] = eval(f"lambda out, tensors: {structure}", {"laid_out": _laid_out})

    def __call__(self, tensors: Sequence[Any]) -> Any:
        """Run it on the graph's inputs; returns what the graph does."""
        weight, target = [tensors[i] for i in self._numbers] or (0.0, 0.0)
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if self._draws else 0
        inputs = [_laid_out(tensors[i], stride) for i, stride in self._inputs] + self._constants
        made = torch.ops.wgan_fast.run_program.default(self._words, inputs, weight, target, seed)
        return self._arrange(made, tensors)


def _laid_out(tensor: Tensor, stride: tuple[int, ...], *part: Any) -> Tensor:
    if tensor.stride() != stride:
        tensor = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    if not part:
        return tensor
    shape, strides, offset = part
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def same_draws() -> bool:
    """Whether the environment asks for PyTorch's own stream of random numbers where critics draw some."""
    return os.environ.get("WGAN_FAST_SAME_DRAWS", "") not in ("", "0")


def program_of(piece: fx.GraphModule, *, leaves: bool = False) -> Program | str:
    """Write a flat graph down, or say in a clause why it cannot be.

    Args:
        piece: The graph.
        leaves: Whether the last of what it returns is left for a later piece, which only reads it.
    """
    if not AVAILABLE:
        return "the extension is not there"
    try:
        return _Writer(piece, leaves).written()
    except Exception as error:
        # Whatever goes wrong: PyTorch's operators are there.
        return str(error) if isinstance(error, UnwrittenError) else f"it cannot be written: {first_line(error)}"


@dataclass
class _Fresh:
    """Memory that nothing has been written to."""

    shape: list[int]


@dataclass
class _Scaled:
    """A number among the graph's inputs, by position, times a factor."""

    position: int
    factor: float = 1.0


class _Writer:
    """Writes one graph down, operator after operator; what it makes of a node is in ``values``."""

    def __init__(self, piece: fx.GraphModule, leaves: bool) -> None:
        self.piece, self.leaves = piece, leaves
        self.values: dict[fx.Node, Any] = {}
        self.instructions: list[Kernel | Other] = []
        self.given: list[tuple[Buffer, Any]] = []
        self.buffers: list[Buffer] = []
        self.numbers: list[int] = []
        self.same: dict[fx.Node, fx.Node] = {}
        self.streams = 0
        self.made: dict[Buffer, tuple[Kernel, int, Matrix]] = {}
        self.signs: dict[tuple[Buffer, int], Bits] = {}

    def written(self) -> Program:
        """Write everything down."""
        position, outputs = 0, None
        for node in self.piece.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node, position)
                position += 1
            elif node.op == "get_attr":
                constant = getattr(self.piece, node.target).contiguous()
                constant = constant.float() if constant.dtype == torch.bfloat16 else constant
                self.values[node] = self._input(constant, constant)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                outputs = node.args[0]
        shapes: list[torch.Size] = []
        structure = self._structure(outputs, shapes, self.leaves)
        self._keep_right_sides()
        for instruction in self.instructions:
            if isinstance(instruction, Kernel):
                instruction.turn_if_narrow()
        if sum(kernel.bf16 * kernel.flops() for kernel in self.instructions if isinstance(kernel, Kernel)) > MOST_BF16:
            raise UnwrittenError("PyTorch's products of bfloat16 are faster at such sizes")
        used = {matrix.buffer.resolved()[0] for matrix in self._matrices()}
        given = [(buffer, source) for buffer, source in self.given if buffer in used]
        given.sort(key=lambda pair: isinstance(pair[1], Tensor))
        for number, (buffer, _) in enumerate(given):
            buffer.base = 1 + number
        for buffer in self.buffers:
            if buffer.base < 0:
                buffer.base = len(given) - buffer.base
        header = [self._plan_memory(), len(given), *[buffer.numel for buffer, _ in given], len(shapes)]
        for shape in shapes:
            header += [len(shape), *shape]
        words = header
        for instruction in self.instructions:
            kind, *body = instruction.words()
            words += [kind, len(body), *body]
        return Program(words, [source for _, source in given], structure, self.numbers, self.streams > 0)

    def _keep_right_sides(self) -> None:
        """Have products with one right side, such as a layer's weight, lay it out for themselves once."""
        known: dict[Any, list[Kernel]] = {}
        for instruction in self.instructions:
            if isinstance(instruction, Kernel) and len(instruction.segments) == 1 and instruction.columns > 1:
                _, right, depth = instruction.segments[0]
                if depth <= KEPT_DEPTH and (instruction.rows > FEW_ROWS or instruction.bf16):
                    place = right.buffer, right.offset, right.row, right.column
                    known.setdefault((instruction.bf16, place, instruction.columns, depth), []).append(instruction)
        for (*_, columns, depth), kernels in known.items():
            if len(kernels) > 1:
                kept = self._new((depth, -(-columns // PANEL) * PANEL))
                for number, kernel in enumerate(kernels):
                    kernel.kept, kernel.right = min(1 + number, 2), _operand(kept)

    def _matrices(self) -> Iterator[Matrix]:
        for instruction in self.instructions:
            yield from instruction.matrices()

    def _plan_memory(self) -> int:
        """Give every buffer of planned memory its place, beside those that live at the same time; returns the size."""
        spans: dict[Buffer, tuple[int, int]] = {}
        for index, instruction in enumerate(self.instructions):
            for matrix in instruction.matrices():
                buffer = matrix.buffer.resolved()[0]
                if buffer.base == ARENA:
                    spans[buffer] = (spans.get(buffer, (index, index))[0], index)
        placed: list[Buffer] = []
        size = 0
        for buffer in sorted(spans, key=lambda buffer: -buffer.numel):
            first, last = spans[buffer]
            others = [other for other in placed if spans[other][0] <= last and first <= spans[other][1]]
            offset = 0
            for other in sorted(others, key=lambda other: other.offset):
                if offset + buffer.numel <= other.offset:
                    break
                offset = max(offset, other.offset + _whole_lines(other.numel))
            buffer.offset = offset
            placed.append(buffer)
            size = max(size, offset + _whole_lines(buffer.numel))
        return size

    # What a node's value is.

    def _placeholder(self, node: fx.Node, position: int) -> Any:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return self._input(val, (position, val.stride())) if _is_plain(val) else None
        return _Scaled(position)

    def _input(self, like: Tensor, source: Any) -> Any:
        if not _is_plain(like):
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride())) if like.numel() else 0
        buffer = Buffer(like.numel())
        if like.numel() == 0 or extent < like.numel():
            return None
        self.given.append((buffer, source))
        return View(buffer, torch.empty_strided(like.shape, like.stride(), device="meta"))

    def _view(self, node: Any) -> View:
        """Return a node's value as a tensor in one buffer."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if isinstance(value, Joined):
            value = self.values[node] = self._join(node, value)
        if not isinstance(value, View):
            raise UnwrittenError(f"{node} is no float32 tensor that programs have")
        if value.like.numel() == 0:
            raise UnwrittenError(f"{node} is empty")
        return value

    def _new(self, shape: Sequence[int]) -> View:
        like = torch.empty(tuple(shape), device="meta")
        buffer = Buffer(like.numel())
        self.buffers.append(buffer)
        return View(buffer, like)

    def _add(self, kind: int, *fields: Any) -> None:
        index = len(self.instructions)
        self.instructions.append(Other(kind, list(fields)))
        for matrix in self.instructions[-1].matrices():
            if matrix.buffer.base == ARENA and matrix.buffer.ready < 0:
                matrix.buffer.ready = index

    # Operators.

    def _call(self, node: fx.Node) -> Any:
        target = node.target
        value: Any = self.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if target is operator.getitem:
            return value[node.args[1]]
        if target is operator.mul and isinstance(value, _Scaled):
            return _Scaled(value.position, value.factor * node.args[1])  # type: ignore[operator, arg-type]
        if target in _WRITERS:
            val = node.meta.get("val")
            if isinstance(val, Tensor) and (not (_is_plain(val) or _is_rounded(val)) or val.numel() == 0):
                raise UnwrittenError(f"{node} is not float32 on a CPU, or is empty")
            return _WRITERS[target](self, node, *node.args, **node.kwargs)
        if gives_view(target) and target is not aten.as_strided.default:
            return self._viewed(node)
        raise UnwrittenError(f"{target} has no place in programs")

    def _viewed(self, node: fx.Node) -> Any:
        source, *rest = node.args
        value = self.values[source]  # type: ignore[index]

        def view(like: Tensor) -> Any:
            return node.target(like, *rest, **node.kwargs)  # type: ignore[operator]

        if isinstance(value, _Fresh):
            shape = view(torch.empty(value.shape, device="meta"))
            if shape.shape != torch.Size(value.shape) or not shape.is_contiguous():
                raise UnwrittenError(f"{node} rearranges memory that is to be filled at random")
            return value
        if isinstance(value, Bits):
            before, like = value.view.like, view(value.view.like)
            if like.dim() != 2 or like.shape[1:] != before.shape[1:] or like.stride() != before.stride():
                raise UnwrittenError(f"{node} rearranges a random mask")
            return Bits(View(value.view.buffer, like), value.scale)
        value = self._view(source)
        made = view(value.like)
        if isinstance(made, Tensor):
            return View(value.buffer, made)
        return [View(value.buffer, part) for part in made]

    def _statement(self, code: int, node: fx.Node, sources: Sequence[Any], *numbers: float) -> View:
        """Compute a node element by element."""
        views = [self._view(source) for source in sources]
        kernel, index = self._kernel(node.meta["val"].shape, views)
        return self._stated(code, kernel, index, views, numbers, self._reused(kernel, node, sources, views))

    def _kernel(self, shape: Sequence[int], sources: Sequence[View]) -> tuple[Kernel, int]:
        """Return the kernel that made the latest of some sources, tile by tile, or a new one."""
        rows, columns = _rows_and_columns(shape)
        newest = max((view.buffer.resolved()[0].ready for view in sources), default=-1)
        latest = [view.kernel for view in sources if view.buffer.resolved()[0].ready == newest]
        kernel = self.instructions[newest] if newest >= 0 else None
        if (
            isinstance(kernel, Kernel)
            and tuple(kernel.shape) == tuple(shape)
            and all(made_by is kernel for made_by in latest)
        ):
            return kernel, newest
        self.instructions.append(Kernel(shape, rows, columns))
        return self.instructions[-1], len(self.instructions) - 1  # type: ignore[return-value]

    def _stated(
        self,
        code: int,
        kernel: Kernel,
        index: int,
        sources: Sequence[View],
        numbers: Sequence[float] = (),
        to: View | None = None,
        bits: Bits | None = None,
    ) -> View:
        if to is None:
            to = self._new(kernel.shape)
            to.kernel = kernel
        buffer = to.buffer.resolved()[0]
        buffer.ready = max(buffer.ready, index)
        matrices = [source.matrix(kernel.shape) for source in sources]
        if bits:
            matrices.append(Matrix(bits.view.buffer, int(bits.view.like.storage_offset()), bits.view.like.stride(0), 0))
        place = to.matrix(kernel.shape)
        before = kernel.statements[-1] if kernel.statements else None
        if (
            code in _AFTER_SUM
            and before is not None
            and (before.code, before.numbers) == (ADD, [1.0])
            and (before.to == place == matrices[0])
        ):
            kernel.statements[-1] = Statement(_AFTER_SUM[code], place, before.sources, list(numbers))
        else:
            kernel.statements.append(Statement(code, place, matrices, list(numbers)))
        if code in _AFTER_SUM and to.kernel is kernel and len(kernel.shape) == 2:
            self.made[to.buffer] = kernel, index, place
        return to

    def _gated(self, code: int, without_bits: int, node: fx.Node, vector: fx.Node, x: fx.Node, number: float) -> View:
        """Let a vector through where x is above zero; of an activation made here, its signs are kept as bits."""
        view, gate = self._view(vector), self._view(x)
        made = self.made.get(gate.buffer)
        rows, columns = _rows_and_columns(node.meta["val"].shape)
        if (
            made is None
            or made[0].columns != columns
            or gate.like.stride() != (columns, 1)
            or view.like.shape != gate.like.shape
            or view.like.stride(1) != 1
        ):
            return self._statement(without_bits, node, [vector, x], number)
        kernel, index, to = made
        key = gate.buffer, code
        if key not in self.signs:
            words = -(-columns // 32)
            bits = self._new((kernel.rows, words))
            bits.buffer.ready = index
            place = Matrix(bits.buffer, 0, words, 0)
            kernel.statements.append(Statement(SIGNS, place, [to], [float(code == GATE)]))
            self.signs[key] = Bits(bits)
        bits = self.signs[key].view
        words = bits.like.shape[1]
        first = gate.like.storage_offset() // columns
        part = View(bits.buffer, bits.like.as_strided((rows, columns), (words, 0), first * words))
        target, at = self._kernel(node.meta["val"].shape, [view, part])
        reused = self._reused(target, node, [vector], [view])
        return self._stated(code, target, at, [view], [number], reused, Bits(part))

    def _copy(self, source: View, to: View) -> None:
        self.instructions.append(Kernel(source.like.shape, *_rows_and_columns(source.like.shape)))
        self._stated(COPY, self.instructions[-1], len(self.instructions) - 1, [source], to=to)  # type: ignore[arg-type]

    def _reused(self, kernel: Kernel, node: fx.Node, sources: Sequence[Any], views: Sequence[View]) -> View | None:
        """Return a source that the kernel itself made and that nothing else reads: it is overwritten."""
        for source, view in zip(sources, views):
            fills = view.kernel is kernel and view.like.shape == kernel.shape and view.buffer.within is None
            if fills and self._readers(source) == {node}:
                return view
        return None

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """Find everything that reads a node's memory, under its other names too."""
        while node in self.same:
            node = self.same[node]
        found, pending = set[fx.Node](), [node]
        while pending:
            for reader in readers_of(pending.pop()):
                if reader.target is aten._to_copy.default:
                    pending.append(reader)
                else:
                    found.add(reader)
        return found

    def _product(self, node: fx.Node, left: Any, right: Any) -> View:
        joined = self.values.get(right)
        if isinstance(joined, Joined):
            parts, start = [], 0
            for part in joined.parts:
                depth = part.like.shape[0]
                parts.append((self._view(left).viewed(lambda like: like.narrow(1, start, depth)), part, depth))  # noqa: B023
                start += depth
        else:
            parts = [(self._view(left), self._view(right), self._view(right).like.shape[0])]
        shape = node.meta["val"].shape
        segments = [(_operand(a), _operand(b), depth) for a, b, depth in parts]
        return self._multiplied(shape, segments, bf16=node.meta["val"].dtype == torch.bfloat16)

    def _outer(self, node: fx.Node, one: Any, other: Any) -> View | None:
        """Multiply a column with a row, as a product of depth 1; None for other factors."""
        shape = node.meta["val"].shape
        rows, columns = _rows_and_columns(shape)
        a, b = (self._view(factor).matrix(shape) for factor in (one, other))
        for left, right in ((a, b), (b, a)):
            if left.column == 0 == right.row and right.column == 1 and rows > 1 and columns >= PANEL:
                return self._multiplied(shape, [(left, right, 1)])
        return None

    def _multiplied(self, shape: Sequence[int], segments: list[tuple[Matrix, Matrix, int]], **options: Any) -> View:
        kernel = Kernel(shape, *_rows_and_columns(shape), segments=segments, **options)
        made = self._new(shape)
        made.kernel, made.buffer.ready = kernel, len(self.instructions)
        self.instructions.append(kernel)
        kernel.to = made.matrix(shape)
        return made

    def _join(self, node: fx.Node, joined: Joined, dim: int = 0) -> View:
        """Put tensors into one memory: those that nothing else reads are made there."""
        whole = self._new(node.meta["val"].shape)
        start = 0
        for part in joined.parts:
            size = part.like.shape[dim]
            place = whole.viewed(lambda like: like.narrow(dim, start, size))  # noqa: B023
            start += size
            buffer = part.buffer
            if dim == 0 and self._is_own(buffer) and _fills(part):
                buffer.within = whole.buffer, int(place.like.storage_offset())
                whole.buffer.ready = max(whole.buffer.ready, buffer.ready)
            else:
                self._copy(part, place)
        return whole

    def _is_own(self, buffer: Buffer) -> bool:
        return buffer in self.buffers and buffer.base == ARENA and buffer.within is None

    def _summed(self, node: fx.Node, matrix: View, scale: float) -> View:
        """Sum a matrix over its rows."""
        rows, columns = matrix.like.shape
        made = self._new(node.meta["val"].shape)
        to = Matrix(made.buffer, 0, 0, 1)
        self._add(SUM, rows, columns, _operand(matrix), to, _word(scale))
        return made

    # Outputs.

    def _structure(self, outputs: Any, shapes: list[torch.Size], leaves: bool = False, own: bool = True) -> str:
        """Have outputs in memory of their own, unless they are only read; returns the nest of them as Python."""
        if isinstance(outputs, tuple | list):
            left = len(outputs) - 1 if leaves else None
            parts = [self._structure(each, shapes, own=own and i != left) for i, each in enumerate(outputs)]
            return f"[{', '.join(parts)}]"
        if not isinstance(outputs, fx.Node):
            if outputs is not None:
                raise UnwrittenError("it returns something else than tensors")
            return "None"
        source = self.values.get(outputs)
        if not own and isinstance(source, _Scaled) and source.factor == 1:
            return f"tensors[{source.position}]"
        given = next((of for buffer, of in self.given if isinstance(source, View) and buffer is source.buffer), None)
        if not own and isinstance(given, tuple):
            position, stride = given
            like = source.like  # type: ignore[union-attr]
            part = f"{tuple(like.shape)}, {like.stride()}, {like.storage_offset()}"
            return f"laid_out(tensors[{position}], {stride}, {part})"
        view, val = self._view(outputs), outputs.meta["val"]
        if not val.is_contiguous() or not _is_plain(val):
            raise UnwrittenError(f"{outputs} is not contiguous, or not float32")
        if not (self._is_own(view.buffer) and _fills(view)):
            source, view = view, self._new(val.shape)
            self._copy(source, view)
        view.buffer.base = -1 - len(shapes)
        shapes.append(val.shape)
        return f"out[{len(shapes) - 1}]"


def _operand(view: View) -> Matrix:
    return Matrix(view.buffer, int(view.like.storage_offset()), *view.like.stride())


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def _one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the stride between elements of several dimensions taken as one."""
    dims = [(size, stride) for size, stride in zip(sizes, strides) if size != 1]
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != size * inner:
            raise UnwrittenError("a tensor's elements do not lie in rows")
    return dims[-1][1] if dims else 0


def _fills(view: View) -> bool:
    return view.like.is_contiguous() and view.like.numel() == view.buffer.numel


def _is_plain(val: Tensor) -> bool:
    return val.dtype == torch.float32 and val.device.type == "cpu" and val.layout == torch.strided


def _is_rounded(val: Tensor) -> bool:
    """Whether a value is in bfloat16: here only what is multiplied is rounded to that, everything else is not."""
    return BF16 and val.dtype == torch.bfloat16 and val.device.type == "cpu" and val.layout == torch.strided


def _whole_lines(floats: int) -> int:
    return (floats + 15) // 16 * 16


def _word(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


_Written = Callable[..., Any]
_WRITERS: dict[Any, _Written] = {}


def _writes(*targets: Any) -> Callable[[_Written], _Written]:
    def register(write: _Written) -> _Written:
        _WRITERS.update(dict.fromkeys(targets, write))
        return write

    return register


@_writes(aten.mm.default)
def _mm(w: _Writer, node: fx.Node, left: fx.Node, right: fx.Node) -> View:
    return w._product(node, left, right)


@_writes(aten.addmm.default, aten._addmm_activation.default)
def _addmm(w: _Writer, node: fx.Node, bias: fx.Node, left: fx.Node, right: fx.Node, **options: Any) -> View:
    if options:
        raise UnwrittenError(f"{node} has options {', '.join(options)}")
    product = w._product(node, left, right)
    kernel, index = product.kernel, product.buffer.ready
    assert kernel is not None
    w._stated(ADD, kernel, index, [product, w._view(bias)], [1.0], product)
    if node.target is aten._addmm_activation.default:
        w._stated(RELU, kernel, index, [product], to=product)
    return product


@_writes(aten.cat.default)
def _cat(w: _Writer, node: fx.Node, tensors: Sequence[fx.Node], dim: int = 0) -> Any:
    joined = Joined([w._view(tensor) for tensor in tensors])
    dim %= node.meta["val"].dim()
    products = [user.target is aten.mm.default and user.args[1] is node is not user.args[0] for user in node.users]
    return joined if dim == 0 and all(products) else w._join(node, joined, dim)


@_writes(aten.reshape.default)
def _reshape(w: _Writer, node: fx.Node, tensor: fx.Node, shape: Sequence[int]) -> Any:
    view = w._view(tensor)
    try:
        return view.viewed(lambda like: like.view(shape))
    except RuntimeError:
        made = w._new(view.like.shape)
        w._copy(view, made)
        return made.viewed(lambda like: like.view(shape))


@_writes(aten._to_copy.default)
def _to_copy(w: _Writer, node: fx.Node, tensor: fx.Node, dtype: Any = None, **options: Any) -> Any:
    if options or dtype not in (torch.float32, torch.bfloat16):
        raise UnwrittenError(f"{node} converts to something else than float32 or bfloat16")
    # Another name of the same value: products round what they take.
    w.same[node] = tensor
    value = w.values[tensor]
    return value if isinstance(value, Bits) else w._view(tensor)


@_writes(aten.clone.default)
def _clone(w: _Writer, node: fx.Node, tensor: fx.Node, memory_format: Any = None) -> View:
    made = w._new(node.meta["val"].shape)
    w._copy(w._view(tensor), made)
    return made


@_writes(aten.add.Tensor)
def _add(w: _Writer, node: fx.Node, tensor: fx.Node, other: Any, alpha: float = 1) -> View:
    if not isinstance(other, fx.Node):
        return w._statement(SCALE, node, [tensor], 1.0, alpha * other)
    return w._statement(ADD, node, [tensor, other], alpha)


@_writes(aten.sub.Tensor)
def _sub(w: _Writer, node: fx.Node, tensor: fx.Node, other: Any, alpha: float = 1) -> View:
    return _add(w, node, tensor, other, -alpha)  # type: ignore[no-any-return]


@_writes(aten.mul.Tensor, aten.mul.Scalar)
def _mul(w: _Writer, node: fx.Node, tensor: fx.Node, other: Any) -> View:
    if not isinstance(other, fx.Node):
        return w._statement(SCALE, node, [tensor], other, 0.0)
    for source, bits in ((tensor, w.values[other]), (other, w.values[tensor])):
        if isinstance(bits, Bits):
            view, shape = w._view(source), node.meta["val"].shape
            if bits.view.like.shape != shape or view.like.shape != shape or view.like.stride(1) != 1:
                raise UnwrittenError(f"{node} spreads a random mask")
            kernel, index = w._kernel(shape, [view, bits.view])
            to = w._reused(kernel, node, [source], [view])
            return w._stated(MASK, kernel, index, [view], [bits.scale], to, bits)
    return w._outer(node, tensor, other) or w._statement(MULTIPLY, node, [tensor, other])


@_writes(aten.div.Tensor, aten.div_.Tensor)
def _div(w: _Writer, node: fx.Node, tensor: fx.Node, other: Any) -> Any:
    value = w.values[tensor]
    if isinstance(value, Bits) and not isinstance(other, fx.Node):
        return Bits(value.view, value.scale / other)
    if node.target is aten.div_.Tensor:
        raise UnwrittenError(f"{node} writes to memory that it was given")
    if not isinstance(other, fx.Node):
        return w._statement(SCALE, node, [tensor], 1 / other, 0.0)
    return w._statement(DIVIDE, node, [tensor, other])


@_writes(aten.rsub.Scalar)
def _rsub(w: _Writer, node: fx.Node, tensor: fx.Node, other: float, alpha: float = 1) -> View:
    return w._statement(SCALE, node, [tensor], -alpha, other)


@_writes(aten.pow.Tensor_Scalar)
def _pow(w: _Writer, node: fx.Node, tensor: fx.Node, exponent: float) -> View:
    if exponent == 1:
        return w._statement(COPY, node, [tensor])
    if exponent != 2:
        raise UnwrittenError(f"{node} is a power other than a square")
    return w._statement(MULTIPLY, node, [tensor, tensor])


@_writes(aten.neg.default)
def _neg(w: _Writer, node: fx.Node, tensor: fx.Node) -> View:
    return w._statement(SCALE, node, [tensor], -1.0, 0.0)


@_writes(aten.relu.default)
def _relu(w: _Writer, node: fx.Node, tensor: fx.Node) -> View:
    return w._statement(RELU, node, [tensor])


@_writes(aten.leaky_relu.default)
def _leaky_relu(w: _Writer, node: fx.Node, tensor: fx.Node, slope: float = 0.01) -> View:
    return w._statement(LEAKY_RELU, node, [tensor], slope)


@_writes(aten.leaky_relu_backward.default)
def _leaky_relu_backward(w: _Writer, node: fx.Node, vector: fx.Node, x: fx.Node, slope: float, _: bool) -> View:
    return w._gated(GATE_LEAKY, LEAKY_RELU_BACKWARD, node, vector, x, slope)


@_writes(aten.threshold_backward.default)
def _threshold_backward(w: _Writer, node: fx.Node, vector: fx.Node, x: fx.Node, threshold: float) -> View:
    if threshold != 0:
        return w._statement(THRESHOLD_BACKWARD, node, [vector, x], threshold)
    return w._gated(GATE, THRESHOLD_BACKWARD, node, vector, x, 0.0)


@_writes(aten.sum.dim_IntList)
def _sum_rows(w: _Writer, node: fx.Node, tensor: fx.Node, dims: Any, keepdim: bool = False, **options: Any) -> View:
    view = w._view(tensor)
    if options or view.like.dim() != 2 or not dims or len(dims) != 1:
        raise UnwrittenError(f"{node} is a sum over more than the rows of a matrix")
    across = dims[0] % 2 == 1
    matrix = view.viewed(torch.t) if across else view
    return w._summed(node, matrix, 1.0)


@_writes(aten.sum.default, aten.mean.default)
def _sum_all(w: _Writer, node: fx.Node, tensor: fx.Node, **options: Any) -> View:
    view = w._view(tensor)
    if options:
        raise UnwrittenError(f"{node} has options {', '.join(options)}")
    count = view.like.numel()
    try:
        column = view.viewed(lambda like: like.view(count, 1))
    except RuntimeError:
        raise UnwrittenError(f"{node} is a sum over memory with gaps") from None
    return w._summed(node, column, 1.0 if node.target is aten.sum.default else 1 / count)


@_writes(torch.ops.wgan_fast.gradient_norm_penalty.default)
def _gradient_norm_penalty(
    w: _Writer, node: fx.Node, gradient: fx.Node, weight: Any, target: Any, one_sided: bool, group_size: int = 1
) -> list[View]:
    view = w._view(gradient)
    if not view.like.is_contiguous():
        view = w._statement(COPY, node, [gradient])
    weight, target = (w.values.get(number) if isinstance(number, fx.Node) else None for number in (weight, target))
    if not isinstance(weight, _Scaled) or not isinstance(target, _Scaled):
        raise UnwrittenError(f"{node} has a weight and a target that are no inputs")
    numbers = [weight.position, target.position]
    if target.factor != 1 or w.numbers not in ([], numbers):
        raise UnwrittenError(f"{node} has a weight and a target of its own")
    w.numbers = numbers
    groups = view.like.shape[0] // group_size
    value, mean_norm, norms, seed = (w._new(shape) for shape in ((), (), (groups,), view.like.shape))
    places = [each.matrix(each.like.shape) for each in (view, value, mean_norm, norms, seed)]
    w._add(NORM_PENALTY, groups, view.like.numel() // groups, int(one_sided), _word(weight.factor), *places)
    return [value, mean_norm, norms, seed]


@_writes(torch.ops.wgan_fast.interpolate.default)
def _interpolate(w: _Writer, node: fx.Node, real: fx.Node, fake: fx.Node, alpha: fx.Node) -> View:
    views = [w._view(source) for source in (real, fake, alpha)]
    if not all(view.like.is_contiguous() for view in views):
        raise UnwrittenError(f"{node} mixes samples with gaps between them")
    # α is one a group, whose samples follow each other.
    groups = views[2].like.shape[0]
    shape = (groups, views[0].like.numel() // groups)
    sources = [view.viewed(lambda like: like.reshape(groups, -1)) for view in views]
    kernel, index = w._kernel(shape, sources)
    made = w._stated(LERP, kernel, index, sources)
    return made.viewed(lambda like: like.view(node.meta["val"].shape))


@_writes(aten.new_empty.default)
def _new_empty(w: _Writer, node: fx.Node, tensor: fx.Node, shape: list[int], **options: Any) -> _Fresh:
    return _Fresh(shape)


@_writes(aten.bernoulli_.float)
def _bernoulli(w: _Writer, node: fx.Node, fresh: fx.Node, p: float = 0.5, generator: Any = None) -> Bits:
    memory, keep = w.values[fresh], round(p * 2**32)
    if same_draws():
        raise UnwrittenError("WGAN_FAST_SAME_DRAWS asks for PyTorch's own random numbers")
    if not isinstance(memory, _Fresh) or len(memory.shape) != 2 or not 0 < keep < 2**32 or generator is not None:
        raise UnwrittenError(f"{node} is no random mask of rows")
    rows, columns = memory.shape
    words = -(-columns // 32)
    view = w._new((rows, words))
    w._add(DRAW, rows * words, keep, w.streams, _operand(view))
    w.streams += 1
    return Bits(View(view.buffer, torch.empty(rows * words, device="meta").as_strided((rows, columns), (words, 0))))
