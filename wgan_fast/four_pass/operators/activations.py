"""Activations, applied to each element: the Jacobian is diagonal, so VJP and JVP are one function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Output, Rule, register

aten = torch.ops.aten


class Elementwise(Rule):
    """y = f(x) for each element of one tensor; ``slope`` multiplies by f'(x)."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Return f'(x) · vector."""
        raise NotImplementedError

    def bend(self, call: Call, vector: Tensor) -> Tensor | None:
        """Return f''(x) · vector; None where f is piecewise linear."""
        return None

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """f'(x) δ."""
        return [self.slope(call, cotangent) for _ in wanted]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """f'(x) t."""
        return self.slope(call, tangents[0])  # type: ignore[arg-type]

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """f''(x) t δ."""
        if type(self).bend is Elementwise.bend:
            return [None for _ in wanted]
        return [self.bend(call, tangents[0] * cotangent) for _ in wanted]


@register("relu")
class ReLU(Elementwise):
    """max(0, x)."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output, so that the input need not be kept."""
        return aten.threshold_backward(vector, call.output, 0)  # type: ignore[no-any-return]


@register("leaky_relu")
class LeakyReLU(Elementwise):
    """x where x > 0, else slope · x."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output where the slope is positive, so that the input need not be kept."""
        slope = call.argument("negative_slope")
        from_output = slope > 0
        return aten.leaky_relu_backward(  # type: ignore[no-any-return]
            vector, call.output if from_output else call.operands[0], slope, from_output
        )


@register("hardtanh", "relu6", "clamp", "clamp_min", "threshold", "abs", "hardsigmoid", "hardshrink", "softshrink")
class GenericPiecewiseLinear(Elementwise):
    """Activations made of straight pieces, with the slope that autograd knows."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Autograd's VJP."""
        return Rule.vjp(self, call, vector, [0])[0]  # type: ignore[return-value]


@register("tanh")
class Tanh(Elementwise):
    """f' = 1 − y², f'' = −2 y f'."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return aten.tanh_backward(vector, call.output)  # type: ignore[no-any-return]

    def bend(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return self.slope(call, vector) * call.output * -2  # type: ignore[no-any-return]


@register("sigmoid")
class Sigmoid(Elementwise):
    """f' = y (1 − y), f'' = (1 − 2y) f'."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return aten.sigmoid_backward(vector, call.output)  # type: ignore[no-any-return]

    def bend(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return self.slope(call, vector) * (1 - 2 * call.output)  # type: ignore[no-any-return]


@register("exp")
class Exp(Elementwise):
    """f = f' = f''."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return vector * call.output  # type: ignore[no-any-return]

    def bend(self, call: Call, vector: Tensor) -> Tensor:
        """Read from the output."""
        return vector * call.output  # type: ignore[no-any-return]


class SmoothGeneric(Elementwise):
    """Smooth activations: autograd's VJP serves as the JVP too, its double backward as f''."""

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Autograd's VJP."""
        return Rule.vjp(self, call, vector, [0])[0]  # type: ignore[return-value]

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Autograd's double backward."""
        return Rule.second(self, call, tangents, cotangent, wanted)


register("silu", "gelu", "softplus", "elu", "mish", "hardswish", "log_sigmoid")(SmoothGeneric)


@register("dropout", "feature_dropout")
class Dropout(Elementwise):
    """Multiplies by a mask that forward, cotangent and tangent share."""

    def forward(self, call: Call) -> Output:
        """Draw the mask as PyTorch does, and keep it."""
        x, p = call.operands[0], call.argument("p")
        if not call.argument("train") or p == 0:
            return x.clone()
        if call.op is aten.dropout.default and x.device.type == "cpu" and p < 1:
            mask = call.blank(x).bernoulli_(1 - p).div_(1 - p)
        else:
            # The operator draws what it multiplies by; applied to ones it yields the mask, scale included, with the
            # same use of the random number generator.
            mask = call.op(call.blank(x).fill_(1), p, True)
        call.saved["mask"] = mask
        return x * mask

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Multiply by the mask."""
        return vector * call.saved["mask"] if "mask" in call.saved else vector


@register("alpha_dropout", "feature_alpha_dropout")
class AlphaDropout(Dropout):
    """Multiplies by a mask and shifts (Klambauer et al. 2017, arXiv:1706.02515, section 3)."""

    def forward(self, call: Call) -> Output:
        """Draw the shift, which says what was kept, as PyTorch does."""
        x, p = call.operands[0], call.argument("p")
        if not call.argument("train") or p == 0:
            return x.clone()
        shift = call.op(call.blank(x).zero_(), p, True)
        scale = ((_SELU_LIMIT**2 * p + 1) * (1 - p)) ** -0.5 if p < 1 else 0.0
        call.saved["mask"] = (shift > 0).to(x.dtype) * scale
        return x * call.saved["mask"] + shift


_SELU_LIMIT = 1.7580993408473766
"""Where SELU tends to at −∞, times −1; the constant of ``at::alpha_dropout``."""


@register("prelu")
class PReLU(Rule):
    """Autograd's, less the zeros that it takes for the curvature of x; the slope's own share stays."""

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Only the slopes have one."""
        shares = Rule.second(self, call, tangents, cotangent, wanted)
        return [share if i == 1 else None for i, share in zip(wanted, shares)]
