"""Linear layers and convolutions: linear in the data for fixed weights and in the weights for fixed data."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...backends import convolves_in_tensor_cores
from . import rows
from .base import FLOPS, Call, Derivatives, Output, Rule, W, X, on_gpu, register

aten = torch.ops.aten


class Affine(Rule):
    """f(x) = W x + b. Tangents and cotangents move through W; the bias sees neither."""

    data = "input"

    def forward(self, call: Call) -> Output:
        """Run the layer, in the autocast dtype where autocast is on."""
        call.operands = [x.to(_computed_in(x)) for x in call.operands]
        return call.run()

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """With fixed weights only the weights themselves have one: the VJP at the tangent."""
        data, weight, _bias = call.slot("input"), call.slot("weight"), call.slot("bias")
        if any(t is not None for i, t in enumerate(tangents) if i != data):
            return super().second(call, tangents, cotangent, wanted)
        tangent = tangents[data]  # type: ignore[index]
        if tangent is None or weight not in wanted:
            return [None] * len(wanted)
        gradients = self.vjp(call.with_operand(data, tangent), cotangent, [weight])  # type: ignore[arg-type,list-item]
        return [gradients[0] if i == weight else None for i in wanted]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Apply the layer without its bias to the tangent."""
        data = call.slot("input")
        if any(t is not None for i, t in enumerate(tangents) if i != data):
            return super().jvp(call, tangents)
        return self.apply(call, tangents[data])  # type: ignore[index,arg-type]

    def apply(self, call: Call, x: Tensor) -> Tensor:
        """W x."""
        raise NotImplementedError


@register(
    "linear",
    rows.before_last(lambda call: 1),
    (X((3, 4, 7)), W((5, 7)), W((5,))),
    (X((3, 5)), W((1, 5))),
)
class Linear(Affine):
    """x Wᵀ + b over the last dimension."""

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Return δ W, δᵀ x and Σ δ."""
        data, weight = call.slot("input"), call.slot("weight")
        if call.operands[weight].dim() != 2:  # type: ignore[index]
            return super().vjp(call, cotangent, wanted)
        rows = cotangent.flatten(0, -2) if cotangent.dim() > 2 else cotangent
        gradients: Derivatives = []
        for i in wanted:
            if i == data:
                W = call.operands[weight]  # type: ignore[index]
                # A product of one column and one row is no sum over anything.
                gradients.append(cotangent * W[0] if W.shape[0] == 1 else cotangent @ W)
            elif i == weight:
                x = call.operands[data]  # type: ignore[index]
                gradients.append(rows.t() @ (x.flatten(0, -2) if x.dim() > 2 else x))
            else:
                gradients.append(_sum(rows))
        return gradients

    def apply(self, call: Call, x: Tensor) -> Tensor:
        """X Wᵀ."""
        return torch.nn.functional.linear(x, call.tensor("weight"))  # type: ignore[arg-type]


@register(
    "conv1d",
    rows.keep_leading,
    (X((3, 4, 7)), W((6, 2, 3)), W((6,)), [2], [1], [2], 2),
    (X((3, 4, 7)), W((8, 2, 3)), W((8,)), [2], [1], [2], 2),
)
@register(
    "conv2d",
    rows.keep_leading,
    (X((3, 6, 7, 5)), W((4, 3, 3, 2)), W((4,)), [2, 1], [1, 0], [1, 2], 2),
    (X((3, 6, 7, 5), torch.channels_last), W((8, 6, 3, 2), torch.channels_last), W((8,))),
)
@register("conv3d", rows.keep_leading, (X((2, 3, 4, 5, 6)), W((2, 3, 2, 2, 3)), W((2,)), [2, 1, 3]))
@register(
    "conv_transpose1d",
    rows.keep_leading,
    (X((3, 4, 7)), W((4, 3, 3)), W((3,)), [2], [1], [1]),
    (X((3, 8, 7)), W((8, 2, 3)), W((4,)), [2], [1], [1], 2, [2]),
)
@register(
    "conv_transpose2d.input",
    rows.keep_leading,
    (X((3, 6, 7, 5)), W((6, 2, 3, 3)), W((4,)), [2, 2], [1, 0], [1, 0], 2, [1, 2]),
)
@register("conv_transpose3d.input", rows.keep_leading, (X((2, 3, 3, 4, 2)), W((3, 2, 2, 3, 2)), W((2,)), [2, 1, 1]))
class Convolution(Affine):
    """Convolutions and transposed convolutions of every stride, padding, dilation and grouping."""

    def forward(self, call: Call) -> Output:
        """Run the layer, over channels-last memory where that is faster."""
        if not _goes_along_channels(call):
            return super().forward(call)
        bias = call.slot("bias")
        call.operands = [
            x.to(_computed_in(x)) if i == bias else self._along_channels(call, x) for i, x in enumerate(call.operands)
        ]
        return self._convolve(call, call.tensor("input"), call.tensor("bias")) if self._lifts(call) else call.run()

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """One call of PyTorch's convolution backward."""
        data, weight, bias = call.slot("input"), call.slot("weight"), call.slot("bias")
        x = call.operands[data]  # type: ignore[index]
        if x.dim() != self._geometry(call)["dims"] + 2:
            return super().vjp(call, cotangent, wanted)
        if x.shape[0] == 1 and x.stride(1) == 1 and _goes_along_channels(call):
            x = self._along_channels(call, x)  # a tangent, perhaps
        # With the weight's gradient comes the bias's at no cost; alone it is a sum.
        mask = [data in wanted, weight in wanted, weight in wanted and bias is not None and bias in wanted]
        gx = gw = gb = None
        if any(mask):
            lifts = self._lifts(call)
            operands = [cotangent, x, call.operands[weight]]  # type: ignore[index]
            gx, gw, gb = aten.convolution_backward(
                *[_lifted(each) if lifts else each for each in operands],
                [cotangent.shape[1]],
                *self._settings(call),
                mask,
            )
            if lifts:
                gx, gw = (each if each is None else each.squeeze(2) for each in (gx, gw))
        if bias is not None and bias in wanted and weight not in wanted:
            channels = [0, *range(2, x.dim())]
            along = cotangent.stride(1) == 1 and on_gpu(cotangent)
            gb = _sum(cotangent.permute(*channels, 1).flatten(0, -2)) if along else cotangent.sum(channels)
        return [{data: gx, weight: gw, bias: gb}[i] for i in wanted]

    def apply(self, call: Call, x: Tensor) -> Tensor:
        """Return the convolution of x without a bias."""
        if _goes_along_channels(call):
            x = self._along_channels(call, x)
        return self._convolve(call, x, None)

    def _convolve(self, call: Call, x: Any, bias: Tensor | None) -> Tensor:
        weight: Any = call.tensor("weight")
        if not self._lifts(call):
            return aten.convolution(x, weight, bias, *self._settings(call))  # type: ignore[no-any-return]
        return aten.convolution(_lifted(x), _lifted(weight), bias, *self._settings(call)).squeeze(2)  # type: ignore[no-any-return]

    def _along_channels(self, call: Call, x: Tensor) -> Tensor:
        return _channels_last(_lifted(x)).squeeze(2) if self._lifts(call) else _channels_last(x)

    def _lifts(self, call: Call) -> bool:
        """Whether it runs over images of height 1: PyTorch's own 1-D form has no channels-last memory."""
        x = call.tensor("input")
        assert x is not None
        one = self._geometry(call)["dims"] == 1 and x.dim() == 3
        return one and x.device.type == "cpu" and not on_gpu(x) and _goes_along_channels(call)

    def _geometry(self, call: Call) -> dict[str, Any]:
        name = call.op._schema.name
        return {"dims": int(name[-2]), "transposed": "transpose" in name}

    def _settings(self, call: Call) -> list[Any]:
        dims, transposed = self._geometry(call).values()
        lifts = self._lifts(call)

        def each(name: str, of_height: int) -> list[int]:
            value = call.argument(name)
            value = [value] if isinstance(value, int) else list(value)
            value = value * dims if len(value) == 1 else value
            return [of_height, *value] if lifts else value

        output_padding = each("output_padding", 0) if transposed else [0] * (dims + lifts)
        return [
            each("stride", 1), each("padding", 0), each("dilation", 1), transposed, output_padding,
            call.argument("groups"),
        ]  # fmt: skip


def _sum(rows: Tensor) -> Tensor:
    """Σ over the rows ``[M, C]``; on a GPU as a product, which takes a third of a reduction's time or less."""
    if not on_gpu(rows):
        return rows.sum(0)
    ones = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
    if rows.dtype in (torch.float32, torch.float64):
        return rows.t().mv(ones)
    return torch.mm(ones[None], rows, out_dtype=torch.float32)[0]


def _goes_along_channels(call: Call) -> bool:
    """Whether a convolution is to run channels-last: what stands beside it goes along channels in vectors of 8.

    On a CPU, oneDNN's kernels for it are up to twice as fast. On a GPU it is what tensor cores take: around every call
    cuDNN would transpose what lies otherwise, a third of a DCGAN's step in bfloat16 on an H200. In float32 proper its
    kernels are others, and grouped convolutions have their own.
    """
    weight = call.tensor("weight")
    assert weight is not None
    if max(weight.shape[:2]) < 8:
        return False
    if not on_gpu(weight):
        return weight.device.type == "cpu"
    return call.argument("groups") == 1 and convolves_in_tensor_cores(_computed_in(weight), weight.device)


def _lifted(x: Tensor) -> Tensor:
    return x.unsqueeze(2)


def _channels_last(x: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    dtype = _computed_in(x)
    # Whether memory is channels-last cannot be told from one channel; its stride says what PyTorch takes it for. One
    # sample has a stride as well: where it is no sample's size, grouped convolutions in float64 (PyTorch 2.13) leave a
    # wrong gradient in weights that are channels-last.
    if layout is None or (x.stride(1) == 1 and (x.shape[0] > 1 or x.stride(0) == x.numel())):
        return x.to(dtype)
    return x.clone(memory_format=layout) if dtype == x.dtype else x.to(dtype, memory_format=layout)


def _computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product takes an operand: autocast's for float32 where it is on, else its own."""
    device = x.device.type
    return (
        torch.get_autocast_dtype(device) if x.dtype == torch.float32 and torch.is_autocast_enabled(device) else x.dtype
    )


@register("scaled_dot_product_attention", rows.attention, (X((3, 5, 4)), X((3, 6, 4)), X((3, 6, 7))))
class Attention(Rule):
    """Attention in plain matrix products: the fused kernels have no double backward."""

    def forward(self, call: Call) -> Output:
        """Run the composite form from here on."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call.args = tuple(call.argument(name) for name in names)
        call.kwargs = {"scale": call.argument("scale"), "enable_gqa": call.argument("enable_gqa")}
        call.op = _attention
        return call.run()


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    if args[4]:
        raise NotImplementedError("attention with dropout has no rule: its mask would be drawn twice")
    return aten._scaled_dot_product_attention_math(*args[:4], 0.0, args[5], **kwargs)[0]  # type: ignore[no-any-return]


# What a fused product with its activation counts; see ``optimize``.
FLOPS[aten._addmm_activation] = lambda bias, a, b, *args, **kwargs: 2 * a.shape[0] * a.shape[1] * b.shape[1]
