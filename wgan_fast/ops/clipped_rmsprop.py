"""``wgan_fast::clipped_rmsprop_``: a step of RMSprop, and the clip of what it wrote."""

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from .clip_weights import clip_weights_
from .registry import operator, writes_only


@operator(
    "clipped_rmsprop_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
    "Tensor(d!)[] momentum_buffers, Tensor? device_lr, float lr, float alpha, float eps, float weight_decay, "
    "float momentum, bool maximize, float low, float high) -> ()",
    fake=writes_only,
)
def clipped_rmsprop_(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    momentum_buffers: list[Tensor],
    device_lr: Tensor | None,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: bool,
    low: float,
    high: float,
) -> None:
    """Step with PyTorch's own, centered where there are ``grad_avgs`` and with momentum where there are buffers."""
    if not low <= high:
        raise ValueError(f"low must be at most high, got low={low} and high={high}")
    with torch.no_grad():
        rmsprop(
            params,
            grads,
            square_avgs,
            grad_avgs,
            momentum_buffers,
            # It counts steps and does not use the count.
            [torch.zeros((), device=param.device) for param in params],
            foreach=True,
            maximize=maximize,
            capturable=device_lr is not None,
            lr=lr if device_lr is None else device_lr,  # type: ignore[arg-type]  # annotated as a number only
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum if momentum_buffers else 0.0,
            centered=bool(grad_avgs),
        )
        clip_weights_(params, low, high)
