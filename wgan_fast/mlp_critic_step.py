"""A critic step of a narrow MLP as one operator: which critics it takes, and its plain form in four passes."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from .double_backprop.passes import penalty_seed
from .models import Critic
from .reference import interpolate

MAX_WIDTH = 256
"""Of the input and the hidden layers: wider ones fill a GPU one at a time, and cuBLAS multiplies them faster."""
RUNS_ON = {("cuda", torch.float32)} if importlib.util.find_spec("triton") else set()
"""Where the kernels are the faster way; elsewhere the four passes compile to better code than the plain form."""
_CHAINS = (nn.Sequential.forward, Critic.forward)
"""Forward methods that call one module after the other."""
_PARTS = {nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Flatten, nn.Identity, nn.Sequential}
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_SETTINGS = "forward", "negative_slope", "start_dim", "end_dim"
_STATE = attrgetter("shape", "dtype", "device", "requires_grad")


@dataclass(frozen=True)
class FusedMLP:
    """What ``wgan_fast::mlp_critic_step`` asks of a critic.

    Attributes:
        parameters: Weight and bias of every linear layer, in order.
        negative_slope: Of the activation between them; 0 for ReLU.
    """

    parameters: list[Tensor]
    negative_slope: float


@dataclass(frozen=True)
class _Watched:
    """What of a critic may change between two steps; the dictionaries are the modules' own."""

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    hooks: list[dict[int, Any]]
    members: list[dict[str, Any]]
    parameters: list[nn.Parameter]

    def state(self, samples: Tensor) -> list[Any]:
        """What the decision rests on, read in a few microseconds."""
        return [
            any(self.hooks),
            *map(type, self.modules),
            *map(id, chain.from_iterable(map(dict.values, self.members))),
            *[attributes.get(name) for attributes in self.attributes for name in _SETTINGS],
            *map(_STATE, (samples, *self.parameters)),
        ]


def _watch(critic: nn.Module) -> _Watched:
    modules = list(critic.modules())
    attributes = [module.__dict__ for module in modules]
    return _Watched(
        modules,
        attributes,
        hooks=[own[name] for own in attributes for name in _HOOKS],
        members=[own[name] for own in attributes for name in ("_modules", "_parameters")],
        parameters=list(critic.parameters()),
    )


class FusedChoice:
    """Decides at every step whether the operator runs a critic, whose modules, hooks and parameters may change."""

    def __init__(self, critic: nn.Module) -> None:
        self._critic = critic
        self._watched: _Watched | None = None
        self._seen: list[Any] = []
        self._found: FusedMLP | str = ""

    def __call__(self, samples: object, *, group_size: int = 1, alone: bool = True) -> FusedMLP | str:
        """Look at what a step is given.

        Args:
            samples: A batch ``[N, *D]``.
            group_size: Samples that share one norm.
            alone: Whether the samples are all that the critic is called with.

        Returns:
            What the operator needs, or in a clause why it cannot be taken.
        """
        critic = self._critic
        if type(critic).forward not in _CHAINS:
            return "it is no nn.Sequential"
        if not _PARTS.issuperset(map(type, critic._modules.values())):
            return f"it has a {next(type(m).__name__ for m in critic.children() if type(m) not in _PARTS)}"
        if not isinstance(samples, Tensor) or (samples.device.type, samples.dtype) not in RUNS_ON:
            return "its samples are not float32 on a GPU that Triton compiles for"
        if group_size != 1 or not alone:
            return "it packs samples, or takes more than samples"
        if torch.is_autocast_enabled(samples.device.type):
            return "autocast is on around the step"
        if self._watched is None or self._watched.state(samples) != self._seen:
            self._watched = _watch(critic)
            self._seen, self._found = self._watched.state(samples), _decide(critic, samples)
        return self._found


def _decide(critic: nn.Module, samples: Tensor) -> FusedMLP | str:
    own = [module.__dict__ for module in critic.modules()]
    if any(attributes[name] for attributes in own for name in _HOOKS):
        return "it has hooks"
    if any("forward" in attributes for attributes in own):
        return "one of its modules has a forward method of its own"
    layers = list(_in_order(critic))
    if layers and _flattens_from(layers[0]) == 1:
        del layers[0]
    elif samples.dim() != 2:
        return "its samples are not flat"
    # A Critic squeezes its scores [N, 1] itself, and cannot where they are [N] already.
    ends = (1,) if type(critic).forward is Critic.forward else (0, 1)
    if layers and (type(layers[-1]) is nn.Identity or _flattens_from(layers[-1]) in ends):
        layers.pop()
    linear, activations = layers[::2], layers[1::2]
    in_turn = {nn.Linear}.issuperset(map(type, linear)) and {nn.ReLU, nn.LeakyReLU}.issuperset(map(type, activations))
    if not in_turn or len(linear) < 2 or len(layers) % 2 == 0:
        return "it is not linear layers with a ReLU or LeakyReLU between each two"
    slopes = {float(getattr(activation, "negative_slope", 0.0)) for activation in activations}
    if len(slopes) > 1 or min(slopes) < 0:
        return "its activations differ, or rise to the left of 0"
    parameters = [layer._parameters.get(name) for layer in linear for name in ("weight", "bias")]
    owned: list[Tensor] = [p for p in parameters if p is not None]
    if len(owned) < len(parameters):
        return "one of its layers has no bias"
    width, features = owned[0].shape[0], samples.shape[1:].numel()
    inputs = [features, *[width] * (len(linear) - 1)]
    if [p.shape for p in owned[::2]] != list(zip([*inputs[1:], 1], inputs)):
        return "its hidden layers are not equally wide, or it does not map such samples to one score"
    if max(inputs) > MAX_WIDTH:
        return f"it is wider than {MAX_WIDTH}"
    if len(set(map(id, owned))) < len(owned) or not all(p.requires_grad for p in owned):
        return "some of its parameters are shared or frozen"
    if any((p.dtype, p.device) != (samples.dtype, samples.device) for p in owned):
        return "its parameters are of another dtype, or on another device, than the samples"
    return FusedMLP(owned, slopes.pop())


def _flattens_from(layer: nn.Module) -> int | None:
    """The dimension from which a layer flattens all the others; None for any other layer."""
    return layer.start_dim if type(layer) is nn.Flatten and layer.end_dim == -1 else None


def _in_order(modules: nn.Module) -> Iterator[nn.Module]:
    for module in modules._modules.values():
        if type(module) is nn.Sequential:
            yield from _in_order(module)
        elif module is not None:
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
