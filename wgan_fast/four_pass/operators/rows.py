"""Where the rows of samples lie in what an operator gives, from where they lie in its operands.

Each function here serves operators of one kind and returns a dimension, or None where samples are not shown to stay
apart. ``four_pass.independence`` walks the critic's graph with them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .base import Call


class Placed(NamedTuple):
    """How a call's tensors lie.

    Attributes:
        dims: The dimension of each operand that holds rows; None where it holds none.
        shapes: Of the operands.
        out: What the operator gives, or the first of it.
        grown: The one dimension of that which grows with the batch.
    """

    dims: list[int | None]
    shapes: list[torch.Size]
    out: Tensor
    grown: int


Where = Callable[[Call, Placed], int | None]
OfFirst = Callable[[Call, int, torch.Size, Placed], int | None]


def of_first(function: OfFirst) -> Where:
    """Lift a function of the first operand's rows; there must be no others."""

    def where(call: Call, at: Placed) -> int | None:
        if at.dims[0] is None or any(dim is not None for dim in at.dims[1:]):
            return None
        return function(call, at.dims[0], at.shapes[0], at)

    return where


def aligned(call: Call, at: Placed) -> int | None:
    """Elementwise, with broadcasting."""
    dims = {at.out.dim() - len(shape) + dim for dim, shape in zip(at.dims, at.shapes) if dim is not None}
    return dims.pop() if len(dims) == 1 else None


def made(call: Call, at: Placed) -> int | None:
    """Made anew, of a size that grows with the batch."""
    return at.grown


def looked_up(call: Call, at: Placed) -> int | None:
    """Rows of a table, at indices that are samples' or not."""
    return at.dims[1] if len(at.dims) > 1 and at.dims[0] is None else None


def joined(call: Call, at: Placed) -> int | None:
    """Follow the rows where tensors are joined along a dimension that is not the samples'."""
    dims = set(at.dims)
    dim = dims.pop()
    if dims or dim is None:
        return None
    axis = call.argument("dim") % at.out.dim()
    if call.op._schema.name == "aten::stack":
        return dim + (axis <= dim)  # type: ignore[no-any-return]
    return dim if axis != dim else None


@of_first
def keep_leading(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Layers over channels and space: rows lie in dimension 0 and nothing crosses it."""
    return 0 if dim == 0 and len(shape) == at.out.dim() and len(shape) > 1 else None


@of_first
def view(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Rows stay in blocks if as many elements come before them as did."""
    return at.grown if math.prod(shape[:dim]) == math.prod(at.out.shape[: at.grown]) else None


def view_as(call: Call, at: Placed) -> int | None:
    """Follow the rows as ``view`` does; the other tensor lends its shape alone."""
    return view(call, at._replace(dims=at.dims[:1]))


@of_first
def permute(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Wherever the dimension goes."""
    return [d % len(shape) for d in call.argument("dims")].index(dim)


@of_first
def movedim(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Wherever the dimension goes, behind one that moves past it or not."""
    source, destination = (call.argument(name) % len(shape) for name in ("source", "destination"))
    if dim == source:
        return destination  # type: ignore[no-any-return]
    return dim - (source < dim) + (destination <= dim - (source < dim))  # type: ignore[no-any-return]


@of_first
def transpose(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Swap the dimension with another one, if it is one of the two."""
    name = call.op._schema.name.removeprefix("aten::")
    if name in ("t", "numpy_T"):
        return len(shape) - 1 - dim
    names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
    pair = tuple(call.argument(d) % len(shape) for d in names)
    return pair[1 - pair.index(dim)] if dim in pair else dim


@of_first
def unsqueeze(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """One further back behind a new dimension."""
    return dim + (call.argument("dim") % at.out.dim() <= dim)  # type: ignore[no-any-return]


def _axes(call: Call, shape: torch.Size, name: str = "dim") -> set[int]:
    axes = call.argument(name)
    if axes is None or axes == []:
        return set(range(len(shape)))
    return {axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes)}


@of_first
def reduce(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Over other dimensions, which stay or go."""
    axes = _axes(call, shape)
    if dim in axes:
        return None
    return dim if at.out.dim() == len(shape) else dim - sum(axis < dim for axis in axes)


@of_first
def along(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Works along one other dimension, which stays."""
    return None if dim in _axes(call, shape) else dim


@of_first
def take(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Keep the dimension unless a slice along it leaves out some of the rows."""
    return dim if at.out.shape[dim] == shape[dim] or dim not in _axes(call, shape) else None


@of_first
def select(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """One further to the front where a dimension before it goes."""
    axis = call.argument("dim") % len(shape)
    return None if axis == dim else dim - (axis < dim)


@of_first
def windows(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Windows along one other dimension."""
    return None if dim == call.argument("dimension") % len(shape) else dim


def indexed(call: Call, at: Placed) -> int | None:
    """Find the dimension that grows where other ones alone are indexed, by what is no sample's."""
    dim, indices = at.dims[0], call.argument("indices")
    if dim is None or any(other is not None for other in at.dims[1:]):
        return None
    return at.grown if dim >= len(indices) or indices[dim] is None else None


def before_last(count: Callable[[Call], int]) -> Where:
    """Works on so many of the last dimensions."""
    return of_first(lambda call, dim, shape, at: dim if dim < len(shape) - count(call) else None)


def expand(call: Call, at: Placed) -> int | None:
    """Count the dimension from the end; what has no rows gets equal ones."""
    return at.grown if at.dims[0] is None else at.dims[0] + at.out.dim() - len(at.shapes[0])


@of_first
def repeat(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Count the dimension from the end, where the rows are not repeated themselves."""
    dim = dim + at.out.dim() - len(shape)
    return dim if call.argument("repeats")[dim] == 1 else None


@of_first
def in_evaluation(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Batch norm couples its batch in training alone."""
    return 0 if dim == 0 and not call.argument("training") else None


@of_first
def roll(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Along given dimensions; without any, along the flattened tensor."""
    axes = {axis % len(shape) for axis in call.argument("dims")}
    return dim if axes and dim not in axes else None


@of_first
def same(call: Call, dim: int, shape: torch.Size, at: Placed) -> int | None:
    """Where they lay."""
    return dim


def matmul(call: Call, at: Placed) -> int | None:
    """Find samples along a leading dimension of both factors, or along the rows of the left one alone."""
    dims, shapes = (at.dims * 2, at.shapes * 2) if len(at.dims) == 1 else (at.dims, at.shapes)
    (left, right), (a, b) = dims[:2], shapes[:2]
    if left is not None and right is None:
        return left if left < len(a) - 1 else None
    if left is None or right is None or len(a) != len(b):
        return None
    return left if left == right and left < len(a) - 2 else None


def attention(call: Call, at: Placed) -> int | None:
    """Along one leading dimension of everything."""
    dims = set(at.dims)
    dim = dims.pop()
    return dim if not dims and dim is not None and dim < at.out.dim() - 2 else None


def einsum(call: Call, at: Placed) -> int | None:
    """Find samples along one letter that the output keeps."""
    equation = call.argument("equation")
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "." in equation or len(terms) != len(at.dims):
        return None
    letters = {term[dim] for term, dim in zip(terms, at.dims) if dim is not None}
    if len(letters) != 1 or any(letters & set(term) for term, dim in zip(terms, at.dims) if dim is None):
        return None
    letter = letters.pop()
    return result.index(letter) if letter in result and all(term.count(letter) < 2 for term in terms) else None
