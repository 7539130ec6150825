"""Which critics ``wgan_fast::mlp_critic_step`` takes: narrow MLPs, on a GPU."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..four_pass.capture import Captured

aten = torch.ops.aten

MEASURED = {(9, 0): 64}
"""By a GPU's compute capability: the widest layers, inputs too, at which the operator was measured not to be slower.

Than four passes, both as CUDA graphs, in float32 and in TF32 (docs/gpu.md). What was not measured runs in four passes.
"""
MOST_LAYERS, MOST_WIDTH = 6, 4080
"""Hidden layers that the operator takes at most, and how wide at most these and the inputs are."""
_RESHAPES = {
    "view", "reshape", "_unsafe_view", "flatten", "squeeze", "alias", "contiguous",
}  # fmt: skip
"""Operators that leave samples in rows where what they give has as many."""


@dataclass(frozen=True)
class FusedMLP:
    """What ``wgan_fast::mlp_critic_step`` asks of a critic.

    Attributes:
        parameters: Weight and bias of every linear layer, in order, as positions among the inputs of its graph.
        negative_slope: Of the activation between them; 0 for ReLU.
    """

    parameters: list[int]
    negative_slope: float


def widest(samples: Tensor) -> int:
    """Return how wide the critics are for which the operator is the faster way where the samples are; 0 for none."""
    if samples.device.type != "cuda" or samples.dtype != torch.float32 or not importlib.util.find_spec("triton"):
        return 0
    if torch.version.hip:  # AMD's have capabilities, too
        return 0
    return MEASURED.get(torch.cuda.get_device_capability(samples.device), 0)


def fused_mlp(captured: Captured, samples: Tensor, *, group_size: int = 1) -> FusedMLP | str:
    """Recognise a narrow MLP.

    Args:
        captured: The critic.
        samples: A batch ``[N, *D]``.
        group_size: Samples that share one norm.

    Returns:
        What the operator needs, or in a clause why it cannot be taken.
    """
    if (most := widest(samples)) == 0:
        return "its samples are not float32 on a GPU where it was measured to be faster (docs/gpu.md)"
    if group_size != 1 or len(captured.sampled) > 1:
        return "it packs samples, or takes more than samples"
    if torch.is_autocast_enabled(samples.device.type):
        return "autocast is on around the step"
    layers: list[fx.Node] = []
    slopes: set[float] = set()
    node, widths = captured.x, [samples.shape[1:].numel()]
    for call in captured.calls():
        name = getattr(call.target, "_schema", call.target)
        name = name.name.removeprefix("aten::") if hasattr(name, "name") else str(name)
        if name == "sym_size":
            continue
        if call.args[0] is not node or call.meta.get("stops_gradient"):
            return f"it is not one layer after the other, at {name}"
        if name == "linear":
            if len(layers) % 2:
                return "there is no ReLU or LeakyReLU between two of its linear layers"
            if layers == [] and node.meta["val"].dim() != 2:
                return "its samples are not flat"
            layers.append(call)
        elif name in ("relu", "leaky_relu"):
            if len(layers) % 2 == 0:
                return "it has an activation that follows no linear layer"
            slopes.add(0.0 if name == "relu" else float(call.args[1] if len(call.args) > 1 else 0.01))  # type: ignore[arg-type]
            layers.append(call)
        elif (
            name not in _RESHAPES
            or call.meta["val"].shape[:1] != captured.x.meta["val"].shape[:1]
            or (layers and call.meta["val"].numel() != node.meta["val"].numel())
        ):
            return f"it has an operator {name}"
        node = call
    linear = layers[::2]
    if len(linear) < 2 or len(layers) % 2 == 0:
        return "it is not linear layers with a ReLU or LeakyReLU between each two"
    if len(slopes) > 1 or min(slopes) < 0:
        return "its activations differ, or rise to the left of 0"
    parameters: list[Any] = [p for layer in linear for p in (*layer.args[1:3], None)[:2]]
    if None in parameters:
        return "one of its layers has no bias"
    if len(set(parameters)) < len(parameters) or not set(parameters) <= set(captured.trainable):
        return "some of its parameters are shared, frozen or computed"
    weights = [p.meta["val"] for p in parameters[::2]]
    inputs = [*widths, *[w.shape[0] for w in weights[:-1]]]
    if [tuple(w.shape) for w in weights] != list(zip([*inputs[1:], 1], inputs)):
        return "it does not map such samples to one score"
    if len(weights) > 1 + MOST_LAYERS or max(inputs) > MOST_WIDTH:
        return f"it has more than {MOST_LAYERS} hidden layers, or layers wider than {MOST_WIDTH}"
    if max(inputs) > most:
        return f"it is wider than {most}, up to where it was measured to be faster on this GPU (docs/gpu.md)"
    if any(p.meta["val"].dtype != samples.dtype or p.meta["val"].device != samples.device for p in parameters):
        return "its parameters are of another dtype, or on another device, than the samples"
    return FusedMLP([captured.inputs.index(p) for p in parameters], slopes.pop())
