"""Max pooling: the indices of the forward say where every cotangent and tangent goes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, PiecewiseLinear, X, register
from .rows import keep_leading

aten = torch.ops.aten


@register("max_pool3d", keep_leading, (X((2, 3, 4, 5, 6)), [2, 2, 2]))
@register("max_pool2d", keep_leading, (X((3, 6, 7, 5)), [3, 2], [2, 1], [1, 0]))
class MaxPool(PiecewiseLinear):
    """Max pooling over two or three dimensions."""

    def forward(self, call: Call) -> Output:
        """Pool and keep the indices."""
        op = getattr(aten, f"{call.op._schema.name.removeprefix('aten::')}_with_indices").default
        output, call.saved["indices"] = op(*[call.operands[0], *call.args[1:]], **call.kwargs)
        return output

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Scatter to the indices."""
        x, indices, dims = call.operands[0], call.saved["indices"], self._dims(call)
        flat = torch.zeros_like(x).flatten(-dims)
        return [flat.scatter_add(-1, indices.flatten(-dims), cotangent.flatten(-dims)).view_as(x)]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Gather from the indices."""
        indices, dims = call.saved["indices"], self._dims(call)
        return tangents[0].flatten(-dims).gather(-1, indices.flatten(-dims)).view(indices.shape)  # type: ignore[union-attr]

    def _dims(self, call: Call) -> int:
        return int(call.op._schema.name[-2])


@register("max_pool1d", keep_leading, (X((3, 4, 7)), [3], [2], [1]))
class MaxPool1d(MaxPool):
    """Max pooling over one dimension, run as two."""

    def forward(self, call: Call) -> Output:
        """Pool with a dimension of one in front."""

        def padded(name: str, fill: int) -> list[int]:
            value = call.argument(name)
            return [fill, *([value] if isinstance(value, int) else value)]

        x = call.operands[0].unsqueeze(-2)
        stride = padded("stride", 1) if call.argument("stride") else []
        output, indices = aten.max_pool2d_with_indices(
            x,
            padded("kernel_size", 1),
            stride,
            padded("padding", 0),
            padded("dilation", 1),
            call.argument("ceil_mode"),
        )
        call.saved["indices"] = indices.squeeze(-2)
        return output.squeeze(-2)


@register("adaptive_max_pool3d", keep_leading, (X((2, 3, 4, 5, 6)), [2, 2, 3]))
@register("adaptive_max_pool2d", keep_leading, (X((3, 6, 7, 5)), [3, 2]))
class AdaptiveMaxPool(MaxPool):
    """Adaptive max pooling, which returns the indices itself."""

    def forward(self, call: Call) -> Output:
        """Pool and keep the indices."""
        output = call.run()
        call.saved["indices"] = output[1]
        return output

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Scatter to the indices."""
        return super().vjp(call, cotangent[0], wanted)

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Gather from the indices, which have no tangent themselves."""
        return [super().jvp(call, tangents), None]
