"""Operators that move, select, sum or average: linear in their tensor, so the JVP is the operator itself."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, PiecewiseLinear, Rule, register

aten = torch.ops.aten


@register(
    "reshape",
    "flatten.using_ints",
    "unflatten.int",
    "permute",
    "transpose.int",
    "t",
    "squeeze",
    "squeeze.dim",
    "squeeze.dims",
    "unsqueeze",
    "expand",
    "repeat",
    "slice.Tensor",
    "select.int",
    "narrow",
    "movedim.int",
    "contiguous",
    "clone",
    "alias",
    "neg",
    "flip",
    "roll",
    "mean",
    "mean.dim",
    "sum",
    "sum.dim_IntList",
    "pad",
    "constant_pad_nd",
    "pixel_shuffle",
    "pixel_unshuffle",
    "unfold",
    "cumsum",
    "to.dtype",
    "_to_copy",
    "swapaxes",
    "numpy_T",
)
class Linear(PiecewiseLinear):
    """A linear map of one tensor."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """The operator at the tangent."""
        if call.op in (aten.constant_pad_nd.default, aten.pad.default) and call.argument("value"):
            return Rule.jvp(self, call, tangents)
        return call.run([tangents[0]])  # type: ignore[list-item]


@register("view", "_unsafe_view", "view_as")
class View(Linear):
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


@register("as_strided")
class AsStrided(Rule):
    """Reads memory by its layout, which the critic does not decide here."""

    def forward(self, call: Call) -> Output:
        """Refuse."""
        raise NotImplementedError("an operator that reads memory by strides has no rule")


@register(
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "upsample_nearest2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_nearest1d.vec",
    "upsample_linear1d.vec",
    "upsample_bicubic2d.vec",
    "upsample_nearest3d.vec",
)
class Resampling(Linear):
    """Average pooling and interpolation."""


@register("split.Tensor", "split_with_sizes", "chunk", "unbind.int", "split.sizes")
class Splitting(Linear):
    """Operators that return views of parts of one tensor."""


@register("cat", "stack", "concat")
class Joining(PiecewiseLinear):
    """Tensors joined along a dimension."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Join the tangents, with zeros for what does not move."""
        return call.run([torch.zeros_like(x) if t is None else t for x, t in zip(call.operands, tangents)])


@register("add.Tensor", "sub.Tensor")
class Sum(PiecewiseLinear):
    """x ± α y, with broadcasting."""

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Add what moves."""
        if len(call.operands) == 2 and all(t is not None for t in tangents):
            return call.run(tangents)  # type: ignore[arg-type]
        return Rule.jvp(self, call, tangents)
