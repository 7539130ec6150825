"""Optimizers for critics whose weights are clipped."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .clipping import DTYPES, clip_range, clip_weights_

_clipped_rmsprop_ = torch.ops.wgan_fast.clipped_rmsprop_.default


class ClippedRMSprop(torch.optim.RMSprop):
    """RMSprop with the clip of the weights fused into its step: the critic's optimizer of the original WGAN.

    ``optimizer.step()`` does what ``torch.optim.RMSprop.step()`` followed by ``clip_weights_(parameters, clip)`` does
    (Arjovsky et al. 2017, Algorithm 1, lines 6 and 7; its RMSprop is that of Tieleman and Hinton 2012), reading and
    writing each parameter and each state tensor once: in one parallel region on a CPU, in one launch for each dtype
    on a GPU.

    Every parameter of a group is clipped, also one without a gradient, which is otherwise left alone; a parameter that
    is in no group is not clipped. A NaN stays NaN and an infinity moves to the bound.

    Results agree with those of ``torch.optim.RMSprop`` to rounding, and no worse with exact arithmetic. They have not
    the same bits: PyTorch's square root on a CPU is not correctly rounded and its sums are fused with products on some
    processors. float16 and bfloat16 are computed in float32, and each value is rounded once.

    The state and ``state_dict()`` are those of ``torch.optim.RMSprop``, and either loads the other's: a group without
    a ``clip`` keeps its own.

    Args:
        params: Parameters, named parameters or groups (dictionaries) of them, as for any optimizer; every option may
            be given per group. Dense float64, float32, float16 or bfloat16, of any strides and devices.
        lr: Learning rate; a number, or a tensor of one element, which on the parameters' GPU is read there, so that a
            captured CUDA graph follows its changes. The default is the paper's.
        alpha: Smoothing constant of the squared gradient's moving average.
        eps: Added to the denominator.
        clip: A number c > 0 for [-c, c], or a pair (low, high) with low <= high, as for :func:`clip_weights_`.
        weight_decay: Weight of the L2 penalty that is added to the gradient.
        momentum: Momentum factor; 0 keeps no momentum buffer.
        centered: Normalise by an estimate of the gradient's variance instead of its second moment.
        capturable: Keep the step counter on the GPU, so that the step may be captured in a CUDA graph.
        maximize: Go up the gradient instead of down.

    Raises:
        TypeError: If a parameter or a gradient is sparse or of another dtype, or ``clip`` is no number.
        ValueError: If an option is out of its range.

    Examples:
        >>> critic = torch.nn.Linear(3, 1)
        >>> optimizer = ClippedRMSprop(critic.parameters(), clip=0.01)
        >>> critic(torch.ones(5, 3)).sum().backward()
        >>> optimizer.step()
        >>> all(p.abs().max() <= 0.01 for p in critic.parameters())
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-5,
        alpha: float = 0.99,
        eps: float = 1e-8,
        clip: float | tuple[float, float] = 0.01,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        capturable: bool = False,
        maximize: bool = False,
    ) -> None:
        clip_range(clip, "clip")
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            maximize=maximize,
        )
        self.defaults["clip"] = clip
        for group in self.param_groups:
            group.setdefault("clip", clip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group` does."""
        if "clip" in param_group:
            clip_range(param_group["clip"], "clip")
        super().add_param_group(param_group)
        for at, parameter in enumerate(self.param_groups[-1]["params"]):
            if not _is_supported(parameter):
                name = f"params[{at}] of group {len(self.param_groups) - 1}"
                del self.param_groups[-1]
                raise TypeError(f"{name} must be a dense {_NAMES} tensor, got {_describe(parameter)}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a ClippedRMSprop or of a torch.optim.RMSprop, whose groups have no ``clip``."""
        clips = [group["clip"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, clip in zip(self.param_groups, clips):
            loaded = group.setdefault("clip", clip)
            # JSON has no tuples.
            group["clip"] = tuple(loaded) if isinstance(loaded, list) else loaded

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step and clip every parameter.

        Args:
            closure: Evaluates the loss anew and returns it; None where the gradients are there already.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: If a gradient is sparse or not of its parameter's dtype. No parameter was touched.
            RuntimeError: If the step is captured in a CUDA graph without ``capturable``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for at, group in enumerate(self.param_groups):
            _check(at, group)
        for group in self.param_groups:
            self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        square_avgs: list[Tensor] = []
        grad_avgs: list[Tensor] = []
        momentum_buffers: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, square_avgs, momentum_buffers, grad_avgs, steps)  # type: ignore[no-untyped-call]
        operands = (params, grads, square_avgs, grad_avgs, momentum_buffers)
        devices = {param.device for param in params}
        for device in devices:
            here = [at for at, param in enumerate(params) if param.device == device]
            lr = group["lr"]
            on_device = isinstance(lr, Tensor) and lr.is_cuda and lr.device == device
            _clipped_rmsprop_(
                *([tensors[at] for at in here] if tensors else [] for tensors in operands),
                lr if on_device else None,
                0.0 if on_device else float(lr),
                group["alpha"],
                group["eps"],
                group["weight_decay"],
                group["momentum"],
                group["maximize"],
                *clip_range(group["clip"], "clip"),
            )
        if steps:
            torch._foreach_add_(steps, 1)
        clip_weights_([param for param in group["params"] if param.grad is None], group["clip"])


_NAMES = "float64, float32, float16 or bfloat16"


def _is_supported(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.dtype in DTYPES


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} with layout {tensor.layout}"


def _check(at: int, group: dict[str, Any]) -> None:
    """Refuse a group that could not be stepped."""
    clip_range(group["clip"], "clip")
    for position, param in enumerate(group["params"]):
        grad = param.grad
        if grad is not None and not (grad.layout is torch.strided and grad.dtype == param.dtype):
            raise TypeError(
                f"the gradient of params[{position}] of group {at} must be a dense {param.dtype} tensor, "
                f"got {_describe(grad)}"
            )
        if param.is_cuda and not group["capturable"] and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("capturable must be True for a step that is captured in a CUDA graph, got False")
