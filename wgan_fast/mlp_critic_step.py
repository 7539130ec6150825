"""A critic step of a narrow MLP as one operator: which critics it takes, and its plain form in four passes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from .double_backprop.passes import penalty_seed
from .reference import interpolate

MAX_WIDTH = 256
"""Of the input and the hidden layers: a product's columns are held at once."""


@dataclass(frozen=True)
class FusedMLP:
    """What ``wgan_fast::mlp_critic_step`` asks of a critic.

    Attributes:
        parameters: Weight and bias of every linear layer, in order.
        negative_slope: Of the activation between them; 0 for ReLU.
    """

    parameters: list[Tensor]
    negative_slope: float


def fused_mlp_step(critic: nn.Module) -> FusedMLP | str:
    """Return what the operator needs, or in a sentence why it cannot run this critic."""
    if type(critic) is not nn.Sequential:
        return "it is no nn.Sequential"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in critic.modules()):
        return "it has hooks"
    modules = list(_in_order(critic))
    if modules and type(modules[-1]) in (nn.Flatten, nn.Identity):
        modules.pop()
    linear: list[nn.Linear] = []
    slopes: set[float] = set()
    for index, module in enumerate(modules):
        if index % 2:
            if type(module) not in (nn.ReLU, nn.LeakyReLU):
                return f"its module {index} is neither ReLU nor LeakyReLU"
            slopes.add(float(getattr(module, "negative_slope", 0.0)))
        elif type(module) is nn.Linear and module.bias is not None:
            linear.append(module)
        else:
            return f"its module {index} is no linear layer with a bias"
    if len(linear) < 2 or len(modules) % 2 == 0:
        return "it is not linear layers with an activation between each two"
    if len(slopes) > 1 or min(slopes) < 0:
        return "its activations differ, or rise to the left of 0"
    if len({layer.out_features for layer in linear[:-1]}) > 1 or linear[-1].out_features != 1:
        return "its hidden layers are not equally wide, or it does not end in one score"
    if max(layer.in_features for layer in linear) > MAX_WIDTH:
        return f"it is wider than {MAX_WIDTH}"
    parameters = [p for layer in linear for p in (layer.weight, layer.bias)]
    if len({id(p) for p in parameters}) < len(parameters) or not all(p.requires_grad for p in parameters):
        return "some of its parameters are shared or frozen"
    return FusedMLP(parameters, slopes.pop())


def _in_order(modules: nn.Sequential) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential:
            yield from _in_order(module)
        else:
            yield module


def four_passes(
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
    v, penalty, norm = penalty_seed(gradient, weight=weight, target=target, one_sided=one_sided, group_size=1)

    tangents = [v]
    for W, slope in zip(weights[:-1], slopes):
        tangents.append(tangents[-1] @ W.T * slope[2 * N :])
    gradients = []
    for delta, a, t in zip(deltas, activations, tangents):
        gradients += [delta.T @ torch.cat([a[: 2 * N], t]), delta[: 2 * N].sum(0)]
    figures = torch.stack([scores[:N].mean(), scores[N : 2 * N].mean(), penalty, norm])
    return figures, torch.linalg.vector_norm(gradient, dim=1), gradients
