"""Operators that move, select, sum or average: linear in their tensor, so the JVP is the operator itself."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, PiecewiseLinear, Rule, on_gpu, register

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


@register("avg_pool1d", "avg_pool2d", "avg_pool3d")
class AveragePooling(Linear):
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
        """The windows' sizes where they tile the samples; None where they do not."""
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


@register(
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
