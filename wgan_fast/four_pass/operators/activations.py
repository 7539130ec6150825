"""Activations, applied to each element: the Jacobian is diagonal, so VJP and JVP are one function."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .base import Call, Derivatives, Example, Output, Rule, W, X, add, fills, overwrites, register
from .rows import aligned, keep_leading

aten = torch.ops.aten

Along = Callable[[Call, Tensor], Tensor]


class Elementwise(Rule):
    """y = f(x) for each element of one tensor.

    Args:
        slope: Multiplies a vector by f'(x); None for autograd's VJP.
        bend: Multiplies one by f''(x); None where f is piecewise linear, "autograd" for its double backward.
    """

    def __init__(self, slope: Along | None = None, bend: Along | str | None = None) -> None:
        self._slope, self._bend = slope, bend

    def slope(self, call: Call, vector: Tensor) -> Tensor:
        """Return f'(x) · vector."""
        if self._slope is None:
            return Rule.vjp(self, call, vector, [0])[0]  # type: ignore[return-value]
        return self._slope(call, vector)

    def vjp(self, call: Call, cotangent: Output, wanted: Sequence[int]) -> Derivatives:
        """Return f'(x) δ."""
        return [self.slope(call, cotangent) for _ in wanted]

    def jvp(self, call: Call, tangents: Sequence[Tensor | None]) -> Output:
        """Return f'(x) t."""
        return self.slope(call, tangents[0])  # type: ignore[arg-type]

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return f''(x) t δ."""
        if self._bend is None:
            return [None for _ in wanted]
        if callable(self._bend) and not self._approximate(call):
            return [self._bend(call, tangents[0] * cotangent) for _ in wanted]
        return super().second(call, tangents, cotangent, wanted)

    @staticmethod
    def _approximate(call: Call) -> bool:
        return call.op is aten.gelu.default and call.argument("approximate") != "none"


def elementwise(name: str, *arguments: Example, slope: Along | None = None, bend: Along | str | None = None) -> None:
    """Add an activation; ``arguments`` are those of its examples besides the tensor."""
    add(name, Elementwise(slope, bend), aligned, *[(X((3, 4, 7)), *given) for given in arguments or [()]])


def _leaky(call: Call, vector: Tensor) -> Tensor:
    """Read from the output where the slope is positive, so that the input need not be kept."""
    slope = call.argument("negative_slope")
    x = call.output if slope > 0 else call.operands[0]
    return aten.leaky_relu_backward(vector, x, slope, slope > 0)  # type: ignore[no-any-return]


def _tanh(call: Call, vector: Tensor) -> Tensor:
    return aten.tanh_backward(vector, call.output)  # type: ignore[no-any-return]


def _sigmoid(call: Call, vector: Tensor) -> Tensor:
    return aten.sigmoid_backward(vector, call.output)  # type: ignore[no-any-return]


def _exp(call: Call, vector: Tensor) -> Tensor:
    return vector * call.output  # type: ignore[no-any-return]


def _silu(call: Call, vector: Tensor) -> Tensor:
    """Multiply by f'' = s(1 − s)(2 + x(1 − 2s)), with s the sigmoid of x."""
    x = call.operands[0]
    s = x.sigmoid()
    return aten.sigmoid_backward(vector, s) * (torch.addcmul(x, x, s, value=-2) + 2)  # type: ignore[no-any-return]


def _gelu(call: Call, vector: Tensor) -> Tensor:
    """Multiply by f'' = φ(x)(2 − x²), with φ the density of the normal distribution."""
    square = call.operands[0].square()
    return (square * -0.5).exp() * (vector * (2 - square)) * (2 * math.pi) ** -0.5  # type: ignore[no-any-return]


# Slopes are read from the output where they can be, so that the input need not be kept.
elementwise("relu", slope=lambda call, v: aten.threshold_backward(v, call.output, 0))
elementwise("leaky_relu", (0.2,), (-0.1,), slope=_leaky)
elementwise("tanh", slope=_tanh, bend=lambda call, v: _tanh(call, v) * call.output * -2)  # f' = 1 − y², f'' = −2 y f'
elementwise("sigmoid", slope=_sigmoid, bend=lambda call, v: _sigmoid(call, v) * (1 - 2 * call.output))
elementwise("exp", slope=_exp, bend=_exp)
elementwise("hardtanh", (-0.5, 0.7))
elementwise("clamp", (-0.5, 0.7))
elementwise("clamp_min", (0.1,))
elementwise("threshold", (0.2, -1.0))
elementwise("hardshrink", (0.3,))
elementwise("softshrink", (0.3,))
for _name in ("abs", "relu6", "hardsigmoid"):
    elementwise(_name)
elementwise("silu", slope=lambda call, v: aten.silu_backward(v, call.operands[0]), bend=_silu)
elementwise("gelu", bend=_gelu)
for _name in ("softplus", "elu", "mish", "hardswish", "log_sigmoid"):
    elementwise(_name, bend="autograd")

for _name in ("relu", "leaky_relu", "tanh", "sigmoid"):
    overwrites(_name, f"{_name}_")
for _name in ("threshold_backward", "leaky_relu_backward", "tanh_backward", "sigmoid_backward", "silu_backward"):
    fills(_name, "grad_input")


@register("feature_dropout", keep_leading, (X((3, 6, 7, 5)), 0.5, False), (X((3, 6, 7, 5)), 0.0, True))
@register("dropout", aligned, (X((3, 4, 7)), 0.5, False), (X((3, 4, 7)), 0.0, True))
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


@register("feature_alpha_dropout", keep_leading, (X((3, 6, 7, 5)), 0.5, False))
@register("alpha_dropout", aligned, (X((3, 4, 7)), 0.5, False))
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


@register("prelu", aligned, (X((3, 6, 7, 5)), W((6,))))
class PReLU(Rule):
    """Autograd's, less the zeros that it takes for the curvature of x; the slope's own share stays."""

    def second(
        self, call: Call, tangents: Sequence[Tensor | None], cotangent: Output, wanted: Sequence[int]
    ) -> Derivatives:
        """Return the slopes' share alone."""
        shares = super().second(call, tangents, cotangent, wanted)
        return [share if i == 1 else None for i, share in zip(wanted, shares)]
