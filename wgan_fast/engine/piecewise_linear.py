"""ReLU and leaky ReLU for double backward without the dead pass.

PyTorch's second derivative of these activations is a tensor of zeros, which autograd then carries back through the
whole critic. Here it is absent (Etmann 2019, arXiv:1906.06637), so that what follows it is never computed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..backends import switched_off

aten = torch.ops.aten


class PiecewiseLinear(TorchFunctionMode):
    """While active, large differentiable ReLUs and leaky ReLUs have no second derivative instead of one that is zero.

    Recurrent layers, which cuDNN cannot differentiate twice, are PyTorch's own meanwhile.

    Attributes:
        before: What came before the activations, as nodes of autograd's graph.
        used: Whether anything was met that is replaced, be it too small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Any] = []
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the activations that can be."""
        replace = _REPLACED.get(func)
        if replace is not None and args and args[0].requires_grad and _replaceable():
            self.used = True
            if not _is_large(args[0]):
                return func(*args, **(kwargs or {}))
            if args[0].grad_fn is not None:
                self.before.append(args[0].grad_fn)
            return replace(*args, **(kwargs or {}))
        if func in _RECURRENT and args[0].device.type != "cpu":
            self.used = True
            with switched_off(torch.backends.cudnn):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Activation(torch.autograd.Function):
    """x where x > 0, else slope · x."""

    # With a separate setup_context, as torch.func asks for it, a call takes 30 us longer.
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        if slope == 0:
            y = x.relu_() if inplace else x.relu()
        else:
            y = aten.leaky_relu_(x, slope) if inplace else aten.leaky_relu(x, slope)
        if inplace:
            ctx.mark_dirty(x)
        ctx.slope = slope
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return _Slope.apply(cotangent, y.detach(), ctx.slope), None, None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """The activation's derivative times a vector: linear in the vector, and constant in all else."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(y)
        if slope == 0:
            return aten.threshold_backward(vector, y, 0)  # type: ignore[no-any-return]
        return aten.leaky_relu_backward(vector, y, slope, True)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return _Slope.apply(cotangent, y, ctx.slope), None, None  # type: ignore[no-untyped-call]


LARGE = 2**21
"""Elements of an activation times its second size (features, channels), about half the FLOPs of the layer before it.
Measured on MLPs 32 to 512 wide: an activation here takes 50 us longer than PyTorch's own, and is worth it from there
on (1.06 at 2^22, 0.95 at 2^20)."""


def _is_large(x: Tensor) -> bool:
    return x.dim() > 1 and x.numel() * x.shape[1] >= LARGE


def _replaceable() -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled()


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _Activation.apply(input, 0.0, inplace)  # type: ignore[no-any-return,no-untyped-call]


def _relu_(input: Tensor) -> Tensor:
    return _relu(input, True)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    # The sign of x can be read from the output of a rising function only.
    if negative_slope < 0:
        return F.leaky_relu(input, negative_slope, inplace)
    return _Activation.apply(input, float(negative_slope), inplace)  # type: ignore[no-any-return,no-untyped-call]


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    torch.relu: _relu,
    torch.relu_: _relu_,
    F.relu: _relu,
    Tensor.relu: _relu,
    Tensor.relu_: _relu_,
    F.leaky_relu: _leaky_relu,
}

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
