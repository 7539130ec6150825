"""``wgan_fast::mlp_critic_step``: a whole WGAN-GP critic step of a narrow MLP."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from ..reference import interpolate
from .registry import kernels, operator


def _fake(
    real: Tensor, fake: Tensor, alpha: Tensor, parameters: list[Tensor], *_: object
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return real.new_empty(4), real.new_empty(real.shape[0]), [p.new_empty(p.shape) for p in parameters]


def _launch(
    real: Tensor, fake: Tensor, alpha: Tensor, parameters: list[Tensor], *options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    given = [tensor.contiguous() for tensor in (real, fake, alpha)]
    with torch.cuda.device_of(real):  # type: ignore[no-untyped-call]
        result: tuple[Tensor, Tensor, list[Tensor]]
        result = kernels("mlp_critic_step").mlp_critic_step(*given, parameters, *options)
    return result


@operator(
    "mlp_critic_step(Tensor real, Tensor fake, Tensor alpha, Tensor[] parameters, float negative_slope, float weight, "
    "float target, bool one_sided, str precision) -> (Tensor, Tensor, Tensor[])",
    fake=_fake,
    launch=_launch,
)
def mlp_critic_step(
    real: Tensor,
    fake: Tensor,
    alpha: Tensor,
    parameters: list[Tensor],
    negative_slope: float,
    weight: float,
    target: float,
    one_sided: bool,
    precision: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Run the step on plain tensors.

    Args:
        real: x ``[N, D]``.
        fake: x̃ ``[N, D]``.
        alpha: α ``[N]``.
        parameters: Weight and bias of every linear layer.
        negative_slope: Of the activation between them.
        weight: The penalty's.
        target: The norm that costs nothing.
        one_sided: Whether only norms above it cost.
        precision: For the kernels; products are taken in the dtype of ``real`` here.

    Returns:
        ``[4]``: mean scores of real and fake, penalty, mean norm; the norms ``[N]``; the gradient of every parameter
        of the Wasserstein loss and the penalty.
    """
    N = real.shape[0]
    weights, biases = parameters[::2], parameters[1::2]
    activations = [torch.cat([real, fake, interpolate(real, fake, alpha)])]
    for W, b in zip(weights[:-1], biases[:-1]):
        activations.append(leaky_relu(activations[-1] @ W.T + b, negative_slope))
    scores = activations[-1] @ weights[-1].T + biases[-1]
    slopes = [torch.full_like(a, negative_slope).masked_fill_(a > 0, 1) for a in activations[1:]]

    unit = torch.ones_like(scores[:N])
    delta = torch.cat([-unit / N, unit / N, unit])
    deltas = [delta]
    for W, slope in zip(reversed(weights[1:]), reversed(slopes)):
        deltas.insert(0, deltas[0] @ W * slope)
    gradient = deltas[0][2 * N :] @ weights[0]
    penalty, norm, norms, v = torch.ops.wgan_fast.gradient_norm_penalty(gradient, weight, target, one_sided)

    tangents = [v]
    for W, slope in zip(weights[:-1], slopes):
        tangents.append(tangents[-1] @ W.T * slope[2 * N :])
    gradients = []
    for delta, a, t in zip(deltas, activations, tangents):
        gradients += [delta.T @ torch.cat([a[: 2 * N], t]), delta[: 2 * N].sum(0)]
    figures = torch.stack([scores[:N].mean(), scores[N : 2 * N].mean(), penalty, norm])
    return figures, norms, gradients
