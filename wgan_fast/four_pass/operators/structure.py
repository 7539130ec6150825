"""Operators that move, select, sum or average: linear in their tensor, so the JVP is the operator itself."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import rows
from .base import (
    Call,
    Derivatives,
    Output,
    PiecewiseLinear,
    Rule,
    W,
    X,
    add,
    fills,
    follows,
    on_gpu,
    overwrites,
    register,
)

aten = torch.ops.aten


class LinearMap(PiecewiseLinear):
    """A linear map of one tensor."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Apply the operator to the tangent."""
        return call.run([tangents[0]])  # type: ignore[list-item]


_PADDED = rows.before_last(lambda call: len(call.argument("pad")) // 2)


@register("constant_pad_nd", _PADDED, (X((3, 4, 7)), [1, 2], 0.5))
@register("pad", _PADDED, (X((3, 6, 7, 5)), [1, 2, 0, 1], "reflect"), (X((3, 6, 7, 5)), [1, 2], "constant", 3.0))
class Padding(LinearMap):
    """Linear up to the value that is put around."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Pad the tangent, with zeros where the operator puts a value."""
        return Rule.jvp(self, call, tangents) if call.argument("value") else super().jvp(call, tangents)


X2, X3, X4 = X((3, 5)), X((3, 4, 7)), X((3, 6, 7, 5))

_LINEAR: list[tuple[Any, ...]] = [
    ("reshape", rows.view, X3, [-1, 28]), ("flatten.using_ints", rows.view, X4, 1, 2),
    ("unflatten.int", rows.view, X4, 1, [2, 3]), ("squeeze", rows.view, X((3, 1, 5))),
    ("squeeze.dim", rows.view, X((3, 1, 5)), 1), ("squeeze.dims", rows.view, X((3, 1, 5, 1)), [1, 3]),
    ("permute", rows.permute, X4, [2, 3, 0, 1]), ("transpose.int", rows.transpose, X3, 1, 2),
    ("swapaxes", rows.transpose, X3, 0, 2), ("t", rows.transpose, X2), ("numpy_T", rows.transpose, X2),
    ("movedim.int", rows.movedim, X4, 1, 3), ("unsqueeze", rows.unsqueeze, X3, 0),
    ("expand", rows.expand, X((3, 1, 7)), [2, -1, 4, 7]), ("repeat", rows.repeat, X2, [4, 1, 2]),
    ("slice.Tensor", rows.take, X3, 1, 1, 4, 2), ("narrow", rows.along, X3, 1, 1, 2),
    ("select.int", rows.select, X3, 1, 2), ("contiguous", rows.aligned, X3), ("clone", rows.aligned, X3),
    ("alias", rows.aligned, X3), ("to.dtype", rows.aligned, X3, torch.float64), ("_to_copy", rows.aligned, X3),
    ("neg", None, X3), ("flip", rows.roll, X3, [1]), ("roll", rows.roll, X3, [2], [1]),
    ("mean", None, X3), ("mean.dim", rows.reduce, X4, [2, 3]), ("sum", None, X3),
    ("sum.dim_IntList", rows.reduce, X3, [1], True), ("cumsum", rows.along, X3, 1),
    ("unfold", rows.windows, X3, 2, 3, 2), ("pixel_shuffle", rows.keep_leading, X((2, 8, 3, 3)), 2),
    ("pixel_unshuffle", rows.keep_leading, X((2, 2, 4, 6)), 2),
    ("adaptive_avg_pool1d", rows.keep_leading, X3, [3]), ("adaptive_avg_pool2d", rows.keep_leading, X4, [3, 2]),
    ("adaptive_avg_pool3d", rows.keep_leading, X((2, 3, 4, 5, 6)), [2, 3, 2]),
    ("upsample_nearest1d.vec", rows.keep_leading, X3, None, [2.0]),
    ("upsample_nearest2d.vec", rows.keep_leading, X4, None, [2.0, 1.5]),
    ("upsample_nearest3d.vec", rows.keep_leading, X((2, 3, 2, 3, 4)), None, [2.0, 1.0, 1.5]),
    ("upsample_linear1d.vec", rows.keep_leading, X3, None, True, [2.0]),
    ("upsample_bilinear2d.vec", rows.keep_leading, X4, None, False, [2.0, 1.5]),
    ("upsample_bicubic2d.vec", rows.keep_leading, X4, None, False, [2.0, 1.5]),
    ("chunk", rows.along, X3, 3, 2), ("split.Tensor", rows.along, X3, 3, 2), ("split.sizes", rows.along, X3, [3, 4], 2),
    ("split_with_sizes", rows.along, X3, [1, 2, 4], 2), ("unbind.int", rows.select, X3, 1),
]  # fmt: skip
for _name, _rows, *_example in _LINEAR:
    add(_name, LinearMap(), _rows, tuple(_example))


@register("view_as", rows.view_as, (X3, X((3, 28))))
@register("_unsafe_view", rows.view, (X3, [-1, 7]))
@register("view", rows.view, (X3, [-1, 28]))
class View(LinearMap):
    """A view in the critic may have to be a copy here, where convolutions choose how memory is laid out."""

    def forward(self, call: Call) -> Output:
        """Reshape."""
        shape = call.tensor("other").shape if call.op is aten.view_as.default else call.argument("size")  # type: ignore[union-attr]
        return call.operands[0].reshape(shape)

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Reshape back."""
        return [cotangent.reshape(call.operands[0].shape) if i == 0 else None for i in wanted]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Reshape the tangent."""
        return None if tangents[0] is None else tangents[0].reshape(call.output.shape)


@register("as_strided", None)
class AsStrided(Rule):
    """Reads memory by its layout, which the critic does not decide here."""

    def forward(self, call: Call) -> Output:
        """Refuse."""
        raise NotImplementedError("an operator that reads memory by strides has no rule")


@register("avg_pool1d", rows.keep_leading, (X3, [3], [2], [1]), (X((3, 4, 6)), [3]))
@register(
    "avg_pool2d",
    rows.keep_leading,
    (X4, [3, 2], [2, 1], [1, 0]),
    (X((3, 6, 8, 6)), [2, 3]),
    (X((3, 6, 8, 6), torch.channels_last), [2]),
)
@register("avg_pool3d", rows.keep_leading, (X((2, 3, 4, 5, 6)), [2, 2, 3]), (X((2, 3, 4, 2, 6)), [2, 1, 3]))
class AveragePooling(LinearMap):
    """Means over windows. Where these tile the samples, reshapes take a GPU a fraction of the pooling's time."""

    def forward(self, call: Call) -> Output:
        """Pool."""
        return self._pool(call, call.operands[0])

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Share every mean's cotangent out among its window."""
        windows = self._tiles(call)
        if windows is None or not on_gpu(cotangent):
            return super().vjp(call, cotangent, wanted)
        last = cotangent.stride(1) == 1
        shared = (cotangent.movedim(1, -1) if last else cotangent) / math.prod(windows)
        first = 1 if last else 2
        for dim, size in enumerate(windows, first):
            tiled = shared.unsqueeze(dim + 1)
            sizes = [size if d == dim + 1 else -1 for d in range(tiled.dim())]
            shared = tiled.expand(sizes).flatten(dim, dim + 1)
        return [shared.movedim(-1, 1) if last else shared]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Pool the tangent."""
        return self._pool(call, tangents[0])  # type: ignore[arg-type]

    def _pool(self, call: Call, x: Tensor) -> Tensor:
        windows = self._tiles(call)
        if windows is None or not on_gpu(x) or x.stride(1) != 1:
            return call.run([x])  # type: ignore[no-any-return]
        x = x.movedim(1, -1)
        for dim, size in enumerate(windows):
            x = x.unflatten(1 + 2 * dim, (-1, size))  # type: ignore[no-untyped-call]
        return x.mean([2 + 2 * dim for dim in range(len(windows))]).movedim(-1, 1)

    @staticmethod
    def _tiles(call: Call) -> list[int] | None:
        """Return the windows' sizes where they tile the samples; None where they do not."""
        x, dims = call.operands[0], int(call.op._schema.name[-2])

        def each(name: str) -> list[int]:
            value = call.argument(name)
            value = [value] if isinstance(value, int) else list(value)
            return value * dims if len(value) == 1 else value

        windows, settings = each("kernel_size"), {argument.name for argument in call.op._schema.arguments}
        tile = (
            x.dim() == dims + 2
            and each("stride") in ([], windows)
            and not any(each("padding"))
            and ("divisor_override" not in settings or call.argument("divisor_override") is None)
            and not any(length % size for length, size in zip(x.shape[2:], windows))
        )
        return windows if tile else None


@register("cat", rows.joined, ([X2, X((3, 2))], 1), ([X3, X3], -2))
@register("concat", rows.joined, ([X2, X((3, 2))], 1))
@register("stack", rows.joined, ([X2, X2], 1), ([X2, X2], 0))
class Joining(PiecewiseLinear):
    """Tensors joined along a dimension."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Join the tangents, with zeros for what does not move."""
        return call.run([torch.zeros_like(x) if t is None else t for x, t in zip(call.operands, tangents)])


@register("add.Tensor", None, (X3, W((7,)), {"alpha": 0.5}))
@register("sub.Tensor", None, (X3, X3, {"alpha": 2}))
class Sum(PiecewiseLinear):
    """x ± α y, with broadcasting."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Add what moves."""
        if len(call.operands) == 2 and all(t is not None for t in tangents):
            return call.run(tangents)  # type: ignore[arg-type]
        return Rule.jvp(self, call, tangents)


for _name in ("mul.Tensor", "add.Tensor", "sub.Tensor"):
    overwrites(_name, _name.replace(".", "_."))
fills("mul.Tensor", "out")

# What the generic rule differentiates.
follows(
    rows.aligned,
    "bernoulli", "celu", "copy", "detach", "expand_as", "fill", "full_like", "lerp", "masked_fill", "ones_like",
    "rand_like", "randn_like", "rrelu", "selu", "square", "type_as", "where", "zeros_like",
)  # fmt: skip
follows(rows.made, "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full")
follows(
    rows.reduce, "amax", "amin", "linalg_vector_norm", "logsumexp", "max", "min", "norm", "prod", "std", "var"
)  # fmt: skip
follows(rows.along, "glu", "index_select", "log_softmax", "softmax", "sort", "topk")
follows(rows.indexed, "index")
follows(rows.keep_leading, "channel_shuffle")
follows(rows.same, "one_hot")
follows(rows.looked_up, "embedding")
follows(rows.before_last(lambda call: len(call.argument("normalized_shape"))), "rms_norm")
follows(rows.matmul, "matmul", "bmm", "mm")
follows(rows.einsum, "einsum")

SIZED = {
    "_unsafe_view", "empty", "expand", "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "rand",
    "randn", "repeat", "reshape", "slice", "split_with_sizes", "sym_size", "unflatten", "view", "zeros",
}  # fmt: skip
"""Operators that take numbers as sizes alone; where rows mix all the same, the dimensions tell."""
