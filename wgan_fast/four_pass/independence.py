"""Proves on the graph that no sample's values depend on another sample of its batch.

Each node that holds rows of samples gets the dimension along which they lie, operator by operator. Where that
holds for every node, batches can be joined, sliced and scaled by sample; the first node for which it cannot be
shown makes the critic batch-coupled, which is a matter of schedule and never of correctness.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Captured, where
from .operators.base import Call
from .stand_ins import is_elementwise

aten = torch.ops.aten

Dims = dict[fx.Node, int]


class CoupledError(Exception):
    """A node is not proven to keep samples apart; the message names it."""


def batch_dims(
    captured: Captured,
    calls: Mapping[fx.Node, Call],
    small: Mapping[fx.Node, Any],
    large: Mapping[fx.Node, Any],
) -> Dims:
    """Return the batch dimension of every node that has one.

    Args:
        captured: The critic.
        calls: Its operators, applied to the small batch.
        small: Values of every node for one batch size.
        large: Values of every node for a multiple of it.

    Raises:
        CoupledError: Samples are not proven apart.
    """
    dims: Dims = {}
    for node in captured.graph.nodes:
        value = small.get(node, None)
        if node in calls and _counts_samples(node, small, large):
            raise CoupledError(f"{where(node)} computes with the number of samples")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.shape != large[node].shape:
            dims[node] = 0
        if node.target is operator.getitem and node.args[0] in dims:
            dims[node] = dims[node.args[0]]
            continue
        if node not in calls or not _moved(small[node], large[node]):
            if isinstance(value, Tensor) and node in calls and any(source in dims for source in node.all_input_nodes):
                raise CoupledError(f"{where(node)} mixes samples")
            continue
        dim = _batch_dim(node, calls[node], dims, small, large)
        if dim is None:
            raise CoupledError(f"{where(node)} is not proven to keep samples apart")
        dims[node] = dim
    return dims


def _counts_samples(node: fx.Node, small: Mapping[fx.Node, Any], large: Mapping[fx.Node, Any]) -> bool:
    """Whether an operator is given a number that grows with the batch, other than as a size."""
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    numbers = [source for source in node.all_input_nodes if isinstance(small[source], int | float)]
    return name not in _SIZED and any(small[source] != large[source] for source in numbers)


_SIZED = {
    "_unsafe_view",
    "empty",
    "expand",
    "narrow",
    "new_empty",
    "new_full",
    "new_ones",
    "new_zeros",
    "ones",
    "rand",
    "randn",
    "repeat",
    "reshape",
    "slice",
    "split_with_sizes",
    "sym_size",
    "unflatten",
    "view",
    "zeros",
}
"""Operators that take numbers as sizes alone; where rows mix all the same, the dimensions tell."""


def _moved(small: Any, large: Any) -> bool:
    if isinstance(small, Tensor):
        return small.shape != large.shape  # type: ignore[no-any-return]
    return isinstance(small, list | tuple) and any(_moved(s, b) for s, b in zip(small, large))


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _batch_dim(
    node: fx.Node, call: Call, dims: Dims, small: Mapping[fx.Node, Any], large: Mapping[fx.Node, Any]
) -> int | None:
    sources = [source for source in node.all_input_nodes if isinstance(small[source], Tensor)]
    given = [dims.get(source) for source in sources]
    shapes = [small[source].shape for source in sources]
    out, grown = _first(small[node]), _first(large[node])
    if out.dim() != grown.dim():
        return None
    changed = [d for d in range(out.dim()) if out.shape[d] != grown.shape[d]]
    if len(changed) != 1:
        return None
    dim = _propagate(node.target, call, given, shapes, out, changed[0])
    # The proof and the shapes must agree, and the rows must grow with the batch.
    return dim if dim == changed[0] else None


def _propagate(
    op: Any, call: Call, given: list[int | None], shapes: list[torch.Size], out: Tensor, changed: int
) -> int | None:
    name = op._schema.name.removeprefix("aten::")
    if is_elementwise(op) or name in _POINTWISE:
        aligned = {out.dim() - len(shape) + dim for dim, shape in zip(given, shapes) if dim is not None}
        return aligned.pop() if len(aligned) == 1 else None
    if name == "einsum":
        return _einsum(call.argument("equation"), given)
    if name in _FACTORIES:
        return changed
    if name in _JOINS:
        joined = set(given)
        dim = joined.pop()
        if joined or dim is None:
            return None
        axis = call.argument("dim")
        axis = axis % out.dim()
        if name == "stack":
            return dim + (axis <= dim)  # type: ignore[no-any-return]
        return dim if axis != dim else None
    if name == "view_as":
        given = given[:1]  # the other tensor lends its shape
    if given[0] is None or any(dim is not None for dim in given[1:]):
        return _PRODUCTS[name](call, given, shapes, out) if name in _PRODUCTS else _LATE.get(name)
    dim, shape = given[0], shapes[0]
    if name in _RULES:
        return _RULES[name](call, dim, shape, out, changed)
    if name in _PRODUCTS:
        return _PRODUCTS[name](call, given, shapes, out)
    return None


_POINTWISE = {
    "_to_copy",
    "alias",
    "alpha_dropout",
    "bernoulli",
    "celu",
    "clone",
    "contiguous",
    "copy",
    "detach",
    "dropout",
    "elu",
    "expand_as",
    "fill",
    "full_like",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "lerp",
    "log_sigmoid",
    "masked_fill",
    "mish",
    "ones_like",
    "prelu",
    "rand_like",
    "randn_like",
    "relu6",
    "rrelu",
    "selu",
    "silu",
    "softplus",
    "square",
    "threshold",
    "to",
    "to_copy",
    "type_as",
    "where",
    "zeros_like",
}
_FACTORIES = {"zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full"}
_JOINS = {"cat", "stack", "concat"}
_LATE = {"embedding": 0}

Rule = Callable[[Call, int, torch.Size, Tensor, int], int | None]


def _keep_leading(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    """Layers over channels and space: rows lie in dimension 0 and nothing crosses it."""
    return 0 if dim == 0 and len(shape) == out.dim() and len(shape) > 1 else None


def _view(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    """Rows stay in blocks if as many elements come before them as did."""
    return changed if math.prod(shape[:dim]) == math.prod(out.shape[:changed]) else None


def _permute(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    return [d % len(shape) for d in call.argument("dims")].index(dim)


def _transpose(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    name = call.op._schema.name
    pair = (0, 1) if name.endswith("::t") else tuple(call.argument(d) % len(shape) for d in ("dim0", "dim1"))
    return pair[1 - pair.index(dim)] if dim in pair else dim


def _unsqueeze(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    return dim + (call.argument("dim") % out.dim() <= dim)  # type: ignore[no-any-return]


def _axes(call: Call, dim: int, shape: torch.Size) -> set[int]:
    axes = call.argument("dim")
    if axes is None or axes == []:
        return set(range(len(shape)))
    return {axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes)}


def _reduce(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    axes = _axes(call, dim, shape)
    if dim in axes:
        return None
    return dim if out.dim() == len(shape) else dim - sum(axis < dim for axis in axes)


def _along(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    """Works along one dimension that stays."""
    return None if dim in _axes(call, dim, shape) else dim


def _slice(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    """A slice of the rows keeps samples apart only where it takes them all."""
    return dim if out.shape[dim] == shape[dim] or dim not in _axes(call, dim, shape) else None


def _select(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    axis = call.argument("dim") % len(shape)
    return None if axis == dim else dim - (axis < dim)


def _last_dims(count: Callable[[Call], int]) -> Rule:
    def rule(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
        return dim if dim < len(shape) - count(call) else None

    return rule


def _expand(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    return dim + out.dim() - len(shape)


def _repeat(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    dim = dim + out.dim() - len(shape)
    return dim if call.argument("repeats")[dim] == 1 else None


def _batch_norm(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    return 0 if dim == 0 and not call.argument("training") else None


def _roll(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    """Along given dimensions; without any, along the flattened tensor."""
    axes = {axis % len(shape) for axis in call.argument("dims")}
    return dim if axes and dim not in axes else None


def _same(call: Call, dim: int, shape: torch.Size, out: Tensor, changed: int) -> int | None:
    return dim


_RULES: dict[str, Rule] = {
    "_unsafe_view": _view,
    "adaptive_avg_pool1d": _keep_leading,
    "adaptive_avg_pool2d": _keep_leading,
    "adaptive_avg_pool3d": _keep_leading,
    "adaptive_max_pool2d": _keep_leading,
    "adaptive_max_pool3d": _keep_leading,
    "amax": _reduce,
    "amin": _reduce,
    "avg_pool1d": _keep_leading,
    "avg_pool2d": _keep_leading,
    "avg_pool3d": _keep_leading,
    "batch_norm": _batch_norm,
    "channel_shuffle": _keep_leading,
    "chunk": _along,
    "constant_pad_nd": _last_dims(lambda call: len(call.argument("pad")) // 2),
    "conv1d": _keep_leading,
    "conv2d": _keep_leading,
    "conv3d": _keep_leading,
    "conv_transpose1d": _keep_leading,
    "conv_transpose2d": _keep_leading,
    "conv_transpose3d": _keep_leading,
    "cumsum": _along,
    "embedding": _same,
    "expand": _expand,
    "feature_dropout": _keep_leading,
    "flatten": _view,
    "flip": _roll,
    "glu": _along,
    "group_norm": _keep_leading,
    "instance_norm": _keep_leading,
    "layer_norm": _last_dims(lambda call: len(call.argument("normalized_shape"))),
    "linalg_vector_norm": _reduce,
    "linear": _last_dims(lambda call: 1),
    "local_response_norm": _keep_leading,
    "log_softmax": _along,
    "logsumexp": _reduce,
    "max_pool1d": _keep_leading,
    "max_pool2d": _keep_leading,
    "max_pool3d": _keep_leading,
    "max": _reduce,
    "mean": _reduce,
    "min": _reduce,
    "narrow": _along,
    "norm": _reduce,
    "one_hot": _same,
    "pad": _last_dims(lambda call: len(call.argument("pad")) // 2),
    "permute": _permute,
    "pixel_shuffle": _keep_leading,
    "pixel_unshuffle": _keep_leading,
    "prod": _reduce,
    "repeat": _repeat,
    "reshape": _view,
    "rms_norm": _last_dims(lambda call: len(call.argument("normalized_shape"))),
    "roll": _roll,
    "select": _select,
    "slice": _slice,
    "softmax": _along,
    "sort": _along,
    "split": _along,
    "split_with_sizes": _along,
    "squeeze": _view,
    "std": _reduce,
    "sum": _reduce,
    "swapaxes": _transpose,
    "t": _transpose,
    "topk": _along,
    "transpose": _transpose,
    "unbind": _select,
    "unflatten": _view,
    "unsqueeze": _unsqueeze,
    "upsample_bicubic2d": _keep_leading,
    "upsample_bilinear2d": _keep_leading,
    "upsample_linear1d": _keep_leading,
    "upsample_nearest1d": _keep_leading,
    "upsample_nearest2d": _keep_leading,
    "upsample_nearest3d": _keep_leading,
    "var": _reduce,
    "view": _view,
    "view_as": _view,
}


def _matmul(call: Call, given: list[int | None], shapes: list[torch.Size], out: Tensor) -> int | None:
    """Samples along a leading dimension of both factors, or along the rows of the left one alone."""
    if len(given) == 1:
        given, shapes = given * 2, shapes * 2
    (left, right), (a, b) = given[:2], shapes[:2]
    if left is not None and right is None:
        return left if left < len(a) - 1 else None
    if left is None or right is None or len(a) != len(b):
        return None
    return left if left == right and left < len(a) - 2 else None


def _attention(call: Call, given: list[int | None], shapes: list[torch.Size], out: Tensor) -> int | None:
    dims = set(given)
    dim = dims.pop()
    return dim if not dims and dim is not None and dim < out.dim() - 2 else None


def _einsum(equation: str, given: list[int | None]) -> int | None:
    """Samples along one letter that the output keeps."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "." in equation or len(terms) != len(given):
        return None
    letters = {term[dim] for term, dim in zip(terms, given) if dim is not None}
    if len(letters) != 1 or any(letters & set(term) for term, dim in zip(terms, given) if dim is None):
        return None
    letter = letters.pop()
    return result.index(letter) if letter in result and all(term.count(letter) < 2 for term in terms) else None


_PRODUCTS: dict[str, Callable[[Call, list[int | None], list[torch.Size], Tensor], int | None]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "scaled_dot_product_attention": _attention,
}
